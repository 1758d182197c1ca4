// What happens to a block of scores between the product and the softmax, for one batch and head.
#pragma once

#include "attention/attention.h"
#include "simd/gemm.h"
#include "simd/philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kKeys = 192;  // keys in a block: a multiple of the tile's rows and columns and of
static_assert(kKeys % Tile<float>::rows == 0 && kKeys % Tile<float>::cols == 0);  // Philox' block
static_assert(kKeys % kPhiloxBlock == 0);

// Keys [first, end) that a query can see at all, before the mask.
struct Range {
  int64_t first, end;
};
inline Range visible_keys(const Attention& in, int64_t i) {
  const int64_t own = i + in.offset;
  const int64_t first = in.left >= kUnbounded ? 0 : own - in.left;
  const int64_t end = in.right >= kUnbounded ? in.kv_len : own + in.right + 1;
  const int64_t clipped = larger(0, smaller(end, in.kv_len));
  return {smaller(larger(0, first), clipped), clipped};
}
// The same for the queries [i, i + count): both ends grow with i.
inline Range visible_keys(const Attention& in, int64_t i, int64_t count) {
  return {visible_keys(in, i).first, visible_keys(in, i + count - 1).end};
}

// Logits in base 2, so that softmax needs only exp2: `product` is query * scale * log2(e) * key.
template <class A>
class Scores {
 public:
  Scores(const Attention& in, int64_t b, int64_t h)
      : in_(in),
        b_(b),
        h_(h),
        slope_(in.alibi_slopes == nullptr ? A{0}
                                          : static_cast<A>(in.alibi_slopes[b * in.heads + h])),
        plain_(in.softcap == 0 && in.bias.data == nullptr && in.alibi_slopes == nullptr),
        threshold_(drop_threshold(in.dropout_p)),
        kept_(static_cast<A>(in.dropout_p < 1 ? 1 / (1 - in.dropout_p) : 0)) {}

  // The factor by which a query is multiplied before the product.
  static A query_factor(const Attention& in) {
    return static_cast<A>(in.softcap == 0 ? in.scale * kLog2e : in.scale / in.softcap);
  }

  // Turns the products of query i with keys j ... j + count into logits, -inf where invisible, and
  // fills up to `width` with -inf. `cap_slope` receives d logit / d product if there is a softcap.
  void finish(A* row, int64_t i, int64_t j, int64_t count, int64_t width, A* cap_slope) const {
    if (!plain_) add_terms(row, i, j, count, cap_slope);
    const Range range = visible_keys(in_, i);
    const int64_t first = smaller(larger(range.first - j, 0), count);
    const int64_t end = larger(smaller(range.end - j, count), first);
    for (int64_t c = 0; c < first; c++) row[c] = minus_infinity<A>;
    for (int64_t c = end; c < width; c++) row[c] = minus_infinity<A>;
    if (in_.mask.data == nullptr) return;
    const auto* mask = at<uint8_t>(in_.mask, b_, h_, i, j);
    const int64_t step = in_.mask.stride[3];
    if (step == 1) {
      for (int64_t c = first; c < end; c++) row[c] = mask[c] ? row[c] : minus_infinity<A>;
    } else {
      for (int64_t c = first; c < end; c++) row[c] = mask[c * step] ? row[c] : minus_infinity<A>;
    }
  }

  // 0 or 1 / (1 - p) for the keys j ... j + width of query i; j is a multiple of kPhiloxBlock.
  void dropout(int64_t i, int64_t j, int64_t width, A* factors) const {
    const auto head = static_cast<uint32_t>(b_ * in_.heads + h_);
    for (int64_t c = 0; c < width; c += kPhiloxBlock)
      dropout_factors(in_.seed, head, static_cast<uint32_t>(i), (j + c) / kPhiloxBlock, threshold_,
                      kept_, factors + c);
  }

 private:
  static uint32_t drop_threshold(double p) {
    const double scaled = std::nearbyint(p * 4294967296.0);
    return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
  }

  void add_terms(A* row, int64_t i, int64_t j, int64_t count, A* cap_slope) const {
    const A log2e = static_cast<A>(kLog2e);
    if (in_.softcap != 0) {
      const A cap = static_cast<A>(in_.softcap * kLog2e);
      for (int64_t c = 0; c < count; c += lanes<A>) {
        const Vec<A> t = tanh(load<A>(row + c));
        store(row + c, t * cap);
        if (cap_slope != nullptr) store(cap_slope + c, 1 - t * t);
      }
    }
    if (in_.bias.data != nullptr)
      with_type(in_.bias_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t step = in_.bias.stride[3];
        if constexpr (std::is_same_v<Acc<T>, A>) {
          const T* bias = at<T>(in_.bias, b_, h_, i, j);
          if (step == 1) {
            each_vector<A>(count, [&](int64_t c, auto n) {
              const Vec<A> term = load_count<A>(bias + c, n) * log2e;
              const Vec<A> sum = load<A>(row + c) + term;  // -inf hides even a NaN
              store_count<A>(row + c, term == minus_infinity<A> ? term : sum, n);
            });
          } else {
            for (int64_t c = 0; c < count; c++) {
              const A term = load_one<A>(bias + c * step) * log2e;
              row[c] = term == minus_infinity<A> ? term : row[c] + term;
            }
          }
        } else if constexpr (std::is_same_v<T, float>) {  // fp32 bias of fp64 attention
          const float* bias = at<float>(in_.bias, b_, h_, i, j);
          for (int64_t c = 0; c < count; c++) {
            const A term = static_cast<A>(bias[c * step]) * log2e;
            row[c] = term == minus_infinity<A> ? term : row[c] + term;
          }
        }
      });
    if (in_.alibi_slopes != nullptr) {
      const A slope = slope_ * log2e;
      const int64_t own = i + in_.offset - j;
      for (int64_t c = 0; c < count; c++)
        row[c] -= slope * static_cast<A>(own > c ? own - c : c - own);
    }
  }

  const Attention& in_;
  int64_t b_, h_;
  A slope_;
  bool plain_;
  uint32_t threshold_;
  A kept_;
};

// Whether something can be invisible, so that what is hidden must be kept from leaking.
inline bool can_hide(const Attention& in) {
  return in.mask.data != nullptr || in.bias.data != nullptr || in.left < kUnbounded ||
         in.right < kUnbounded;
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
