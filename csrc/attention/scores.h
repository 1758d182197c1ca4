// What happens to a block of scores between the product and the softmax, for one sequence and head.
#pragma once

#include "attention/attention.h"
#include "simd/pack.h"
#include "simd/philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kKeys = 192;  // keys in a block: a multiple of the tile's rows and columns and of
static_assert(kKeys % Tile<float>::rows == 0 && kKeys % Tile<float>::cols == 0);  // Philox' block
static_assert(kKeys % kPhiloxBlock == 0);
constexpr int64_t kRowsAhead = 4;  // a bias is fetched by: its rows are far apart, and slow to come

// The n-th sequence of a batch, as a batch of its own.
inline Attention sequence(const Attention& in, int64_t n) {
  const Sequence own =
      in.sequences != nullptr ? in.sequences[n] : Sequence{n, 0, in.q_len, 0, in.kv_len, in.offset};
  Attention one = in;
  one.index = own.index;
  one.q_len = own.q_len;
  one.kv_len = own.kv_len;
  one.offset = own.offset;
  one.query = sequence(in.query, own.index, own.query);
  one.key = sequence(in.key, own.index, own.key);
  one.value = sequence(in.value, own.index, own.key);
  one.mask = sequence(in.mask, own.index);
  one.bias = sequence(in.bias, own.index);
  one.first_query = own.query;
  one.first_key = own.key;
  one.first_row = own.index * in.row_stride[0] + own.query;
  return one;
}
inline int64_t row_number(const Attention& in, int64_t h, int64_t i) {
  return in.first_row + h * in.row_stride[1] + i;
}

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

// Numbers the pieces into which the sequences of a batch are cut, one sequence after the other.
class Pieces {
 public:
  struct Piece {
    int64_t sequence, index, count;  // which of how many of its sequence
  };

  template <class F>
  Pieces(Scratch& scratch, int64_t sequences, const F& count)
      : sequences_(sequences), first_(scratch.take<int64_t>(sequences + 1)) {
    first_[0] = 0;
    for (int64_t n = 0; n < sequences; n++) first_[n + 1] = first_[n] + count(n);
  }
  int64_t total() const { return first_[sequences_]; }
  int64_t first(int64_t n) const { return first_[n]; }
  int64_t count(int64_t n) const { return first_[n + 1] - first_[n]; }
  Piece operator[](int64_t piece) const {
    int64_t low = 0, high = sequences_;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (piece < first_[middle] ? high : low) = middle;
    }
    return {low, piece - first_[low], count(low)};
  }

 private:
  int64_t sequences_;
  int64_t* first_;
};

// How many of `parts`, rounded up, are a sequence's share of the batch by the number of its scores.
class Shares {
 public:
  explicit Shares(const Attention& in) : in_(in) {
    for (int64_t n = 0; n < in.batch; n++) total_ += scores(n);
  }
  int64_t operator()(int64_t n, int64_t parts, int64_t by) const {
    return static_cast<int64_t>(
        std::ceil(static_cast<double>(parts) * scores(n) / (total_ * static_cast<double>(by))));
  }

 private:
  double scores(int64_t n) const {
    const Attention one = sequence(in_, n);
    return static_cast<double>(one.q_len) * static_cast<double>(one.kv_len) + 1;
  }
  const Attention& in_;
  double total_ = 0;
};

// Logits in base 2, so that softmax needs only exp2: `product` is query * scale * log2(e) * key.
template <class A>
class Scores {
 public:
  Scores(const Attention& in, int64_t h)
      : in_(in),
        h_(h),
        slope_(in.alibi_slopes == nullptr
                   ? A{0}
                   : static_cast<A>(in.alibi_slopes[in.index * in.heads + h])),
        plain_(in.softcap == 0 && in.bias.data == nullptr && in.alibi_slopes == nullptr),
        dropout_(in.dropout_p, in.seed) {}

  // The factor of a query, or of its products.
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
    const auto* mask = at<uint8_t>(in_.mask, h_, i, j);
    const int64_t step = in_.mask.stride[3];
    if (step == 1) {
      for (int64_t c = first; c < end; c++) row[c] = mask[c] ? row[c] : minus_infinity<A>;
    } else {
      for (int64_t c = first; c < end; c++) row[c] = mask[c * step] ? row[c] : minus_infinity<A>;
    }
  }

  // 0 or 1 / (1 - p) for the keys j ... j + width of query i; j is a multiple of kPhiloxBlock.
  void dropout(int64_t i, int64_t j, int64_t width, A* factors) const {
    const auto head = static_cast<uint32_t>(in_.index * in_.heads + h_);
    dropout_.factors(head, static_cast<uint32_t>(i), j, width, factors);
  }

 private:
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
          const T* bias = at<T>(in_.bias, h_, i, j);
          if (step == 1) {
            const T* later = bias + kRowsAhead * in_.bias.stride[2];
            each_vector<A>(count, [&](int64_t c, auto n) {
              __builtin_prefetch(later + c);
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
          const float* bias = at<float>(in_.bias, h_, i, j);
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
  int64_t h_;
  A slope_;
  bool plain_;
  Dropout<A> dropout_;
};

// Logits become weights relative to `top`, which none exceeds. Returns sums of them.
template <class A>
FASTATTN_INLINE Vec<A> weights_below(A* row, int64_t width, A top) {
  Vec<A> sums[4] = {};  // short chains, for their error as for their overlap
  const auto one = [&](int64_t c, Vec<A>& total) {
    const Vec<A> weight = exp2_nonpositive(load<A>(row + c) - top);
    total += weight;
    store(row + c, weight);
  };
  int64_t done = 0;
  for (; done + 4 * lanes<A> <= width; done += 4 * lanes<A>)
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) one(done + part * lanes<A>, sums[part]);
  for (; done < width; done += lanes<A>) one(done, sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same for rows `stride` apart, no more than lanes<A>: relative to the highest logit of a row
// and of its `top`, which rises to it. `totals` receives the sums of weights.
template <class A>
void weigh(A* rows, int64_t stride, int64_t count, int64_t width, A* tops, A* totals) {
  Vec<A> each[lanes<A>] = {};
  for (int64_t r = 0; r < count; r++) {
    each[r] = set<A>(tops[r]);
    for (int64_t c = 0; c < width; c += lanes<A>)
      each[r] = max(each[r], load<A>(rows + r * stride + c));
  }
  A now[lanes<A>];
  highest_each(each, now);
  for (int64_t r = 0; r < count; r++) {
    A* row = rows + r * stride;
    if (now[r] == minus_infinity<A>)
      // Nothing is visible, unless it is NaN, which no comparison finds.
      for (int64_t c = 0; c < width; c++)
        if (row[c] != row[c]) now[r] = row[c];
    if (now[r] == minus_infinity<A>) {
      std::memset(row, 0, static_cast<size_t>(width) * sizeof(A));
      each[r] = Vec<A>{};
    } else {
      each[r] = weights_below(row, width, now[r]);
    }
    tops[r] = now[r];
  }
  for (int64_t r = count; r < lanes<A>; r++) each[r] = Vec<A>{};
  A sums[lanes<A>];
  sum_each(each, sums);
  std::memcpy(totals, sums, static_cast<size_t>(count) * sizeof(A));
}

// Whether something can be invisible, so that what is hidden must be kept from leaking.
inline bool can_hide(const Attention& in) {
  return in.mask.data != nullptr || in.bias.data != nullptr || in.left < kUnbounded ||
         in.right < kUnbounded;
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
