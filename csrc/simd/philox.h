// The random bits of dropout: Philox 4x32-10 (Salmon et al. 2011), counted by position.
#pragma once

#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kPhiloxBlock = 64;  // one call of sixteen counters serves 64 neighbouring keys

FASTATTN_INLINE void multiply_wide(VecU x, uint32_t factor, VecU& high, VecU& low) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  // Forms whose mask keeps all lanes: GCC 12 warns of its own undefined operand in the plain ones.
  // Shuffles move words between odd and even lanes, for shifts would share a port with products.
  const __m512i v = bits<__m512i>(x), f = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_maskz_mul_epu32(0xff, v, f);
  const __m512i odd =
      _mm512_maskz_mul_epu32(0xff, _mm512_maskz_shuffle_epi32(0xffff, v, _MM_PERM_DDBB), f);
  high = bits<VecU>(_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB));
  low = bits<VecU>(_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA));
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  const __m256i v = bits<__m256i>(x), f = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_mul_epu32(v, f);
  const __m256i odd = _mm256_mul_epu32(_mm256_shuffle_epi32(v, 0xf5), f);
  high = bits<VecU>(_mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xf5), odd, 0xaa));
  low = bits<VecU>(_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa));
#else
  uint32_t upper[lanes<float>], lower[lanes<float>];
  for (int i = 0; i < lanes<float>; i++) {
    const uint64_t product = static_cast<uint64_t>(x[i]) * factor;
    upper[i] = static_cast<uint32_t>(product >> 32);
    lower[i] = static_cast<uint32_t>(product);
  }
  std::memcpy(&high, upper, sizeof high);
  std::memcpy(&low, lower, sizeof low);
#endif
}

// The factors of dropout with probability p: 0 where a position is dropped, else 1 / (1 - p).
template <class A>
class Dropout {
 public:
  Dropout(double p, uint64_t seed)
      : seed_(seed), threshold_(threshold(p)), kept_(static_cast<A>(p < 1 ? 1 / (1 - p) : 0)) {}

  // Those of `count` keys from `first` on, which is a multiple of kPhiloxBlock, for a row of a
  // head; writes whole blocks.
  void factors(uint32_t head, uint32_t row, int64_t first, int64_t count, A* to) const {
    for (int64_t c = 0; c < count; c += kPhiloxBlock)
      block(head, row, (first + c) / kPhiloxBlock, to + c);
  }

 private:
  static uint32_t threshold(double p) {
    const double scaled = std::nearbyint(p * 4294967296.0);
    return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
  }

  // The four words of counter block * 16 + lane belong to the keys lane, lane + 16, lane + 32 and
  // lane + 48 of the block.
  void block(uint32_t head, uint32_t row, int64_t block, A* to) const {
    constexpr int n = lanes<float>;
    uint32_t counter[16];
    for (int i = 0; i < 16; i++) counter[i] = static_cast<uint32_t>(block * 16 + i);
    for (int part = 0; part < 16; part += n) {
      VecU c[4] = {{}, VecU{} + row, VecU{} + head, {}};
      std::memcpy(&c[0], counter + part, sizeof(VecU));
      VecU key0 = VecU{} + static_cast<uint32_t>(seed_);
      VecU key1 = VecU{} + static_cast<uint32_t>(seed_ >> 32);
      for (int round = 0; round < 10; round++) {
        VecU high0, low0, high1, low1;
        multiply_wide(c[0], 0xD2511F53u, high0, low0);
        multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
      }
      for (int word = 0; word < 4; word++) {
        A* keys = to + word * 16 + part;
        if constexpr (std::is_same_v<A, float>) {
          store(keys, c[word] >= threshold_ ? set(kept_) : Vec<A>{});
        } else {
          for (int i = 0; i < n; i++) keys[i] = c[word][i] >= threshold_ ? kept_ : A{0};
        }
      }
    }
  }

  uint64_t seed_;
  uint32_t threshold_;
  A kept_;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
