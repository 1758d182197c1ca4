// The random bits of dropout: Philox 4x32-10 (Salmon et al. 2011), counted by position.
#pragma once

#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kPhiloxBlock = 64;  // one call of sixteen counters serves 64 neighbouring keys

// Words of 32 bits, each the lower one of 64: where a product puts its own two for the next round.
using Words = Vector<uint64_t, lanes<double>>;

FASTATTN_INLINE Words product(Words x, uint32_t factor) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  // Forms whose mask keeps all lanes: GCC 12 warns of its own undefined operand in the plain ones.
  return bits<Words>(_mm512_maskz_mul_epu32(0xff, bits<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  return bits<Words>(_mm256_mul_epu32(bits<__m256i>(x), _mm256_set1_epi64x(factor)));
#else
  return (x & 0xFFFFFFFFu) * factor;
#endif
}

FASTATTN_INLINE Words upper(Words x) {
  // Shuffles, for shifts would share a port with products.
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return bits<Words>(_mm512_maskz_shuffle_epi32(0xffff, bits<__m512i>(x), _MM_PERM_DDBB));
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  return bits<Words>(_mm256_shuffle_epi32(bits<__m256i>(x), 0xf5));
#else
  return x >> 32;
#endif
}

// The factors of dropout with probability p: 0 where a position is dropped, else 1 / (1 - p).
template <class A>
class Dropout {
 public:
  Dropout(double p, uint64_t seed)
      : threshold_(threshold(p)), kept_(static_cast<A>(p < 1 ? 1 / (1 - p) : 0)) {
    for (uint32_t round = 0; round < kRounds; round++) {
      keys_[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      keys_[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }

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
    constexpr int n = lanes<float>, width = lanes<double>, pair = n / width;
    constexpr int sets = width < 8 ? 4 : 2;  // of counters, side by side: a round is a long chain
    for (int part = 0; part < 16; part += sets * width) {
      Words c[sets][4];
#pragma GCC unroll 4
      for (int s = 0; s < sets; s++) {
        const int64_t first = block * 16 + part + s / pair * n + s % pair;  // then each pair-th
        for (int i = 0; i < width; i++) c[s][0][i] = static_cast<uint64_t>(pair * i);
        c[s][0] += static_cast<uint64_t>(first);
        c[s][1] = Words{} + row;
        c[s][2] = Words{} + head;
        c[s][3] = Words{};
      }
#pragma GCC unroll 10
      for (int round = 0; round < kRounds; round++)
#pragma GCC unroll 4
        for (int s = 0; s < sets; s++) {
          const Words one = product(c[s][0], 0xD2511F53u), two = product(c[s][2], 0xCD9E8D57u);
          c[s][0] = upper(two) ^ (c[s][1] ^ keys_[round][0]);
          c[s][1] = two;
          c[s][2] = upper(one) ^ (c[s][3] ^ keys_[round][1]);
          c[s][3] = one;
        }
#pragma GCC unroll 4
      for (int s = 0; s < sets; s += pair)
#pragma GCC unroll 4
        for (int word = 0; word < 4; word++) {
          VecU drawn;
          if constexpr (pair == 2)
            drawn = bits<VecU>((c[s][word] & 0xFFFFFFFFu) | c[s + 1][word] << 32);
          else
            drawn = VecU{} + static_cast<uint32_t>(c[s][word][0]);
          A* keys = to + word * 16 + part + s / pair * n;
          if constexpr (std::is_same_v<A, float>) {
            store(keys, drawn >= threshold_ ? set(kept_) : Vec<A>{});
          } else {
            for (int i = 0; i < n; i++) keys[i] = drawn[i] >= threshold_ ? kept_ : A{0};
          }
        }
    }
  }

  static constexpr int kRounds = 10;
  uint64_t keys_[kRounds][2];
  uint32_t threshold_;
  A kept_;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
