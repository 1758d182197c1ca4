// Rotary position embedding on the CPU; backward is the rotation by the negative angles.
#include "rope/rope.h"
#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// first, second = first * cos - second * sin, second * cos + first * sin; From may be To.
template <class A, class T>
FASTATTN_INLINE void rotate(const T* from_first, const T* from_second, T* to_first, T* to_second,
                            const A* cos, const A* sin, A sign, int64_t count) {
  each_vector<A>(count, [&](int64_t c, auto n) {
    const Vec<A> first = load_count<A>(from_first + c, n);
    const Vec<A> second = load_count<A>(from_second + c, n);
    const Vec<A> cosine = load_count<A>(cos + c, n), sine = load_count<A>(sin + c, n) * sign;
    store_count<A>(to_first + c, first * cosine - second * sine, n);
    store_count<A>(to_second + c, second * cosine + first * sine, n);
  });
}

template <class A, class To, class From>
void convert(const From* from, To* to, int64_t count) {
  each_vector<A>(count,
                 [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(from + c, n), n); });
}

// One row at a time, with scratch for those whose pairs do not lie in two halves side by side.
template <class T>
class Rotation {
 public:
  using A = Acc<T>;

  Rotation(const Rope& args, Scratch& scratch)
      : args_(args),
        gathered_(args.x_stride[3] == 1 ? nullptr : scratch.take<T>(args.head_dim)),
        result_(args.out_stride[3] == 1 ? nullptr : scratch.take<T>(args.head_dim)),
        pairs_(args.interleaved ? scratch.take<A>(2 * args.angles) : nullptr),
        halves_(args.interleaved ? scratch.take<A>(2 * args.angles) : nullptr) {}

  void row(const T* x, T* out, const A* cos, const A* sin) const {
    const int64_t count = args_.angles, dim = args_.head_dim;
    const T* from = x;
    if (gathered_ != nullptr) {
      for (int64_t c = 0; c < dim; c++) gathered_[c] = x[c * args_.x_stride[3]];
      from = gathered_;
    }
    T* to = result_ == nullptr ? out : result_;
    const A sign = args_.inverse ? A{-1} : A{1};
    if (args_.interleaved) {
      convert<A>(from, pairs_, 2 * count);
      for (int64_t c = 0; c < count; c++) {
        halves_[c] = pairs_[2 * c];
        halves_[count + c] = pairs_[2 * c + 1];
      }
      rotate<A>(halves_, halves_ + count, halves_, halves_ + count, cos, sin, sign, count);
      for (int64_t c = 0; c < count; c++) {
        pairs_[2 * c] = halves_[c];
        pairs_[2 * c + 1] = halves_[count + c];
      }
      convert<A>(pairs_, to, 2 * count);
    } else {
      rotate<A>(from, from + count, to, to + count, cos, sin, sign, count);
    }
    if (from != to) std::memcpy(to + 2 * count, from + 2 * count, (dim - 2 * count) * sizeof(T));
    if (result_ != nullptr)
      for (int64_t c = 0; c < dim; c++) out[c * args_.out_stride[3]] = result_[c];
  }

 private:
  const Rope& args_;
  T *gathered_, *result_;  // [D] where the elements of a row lie apart
  A *pairs_, *halves_;     // [2 * angles] if interleaved
};

constexpr int64_t kElementsPerTask = 16384;

template <class T>
void run(const Rope& args) {
  using A = Acc<T>;
  const int64_t positions = args.batch * args.rows, width = args.heads * args.head_dim;
  const int64_t step = larger(1, kElementsPerTask / larger(1, width));
  parallel(ceil_div(positions, step), [&](int64_t task) {
    Scratch scratch;
    const Rotation<T> rotation(args, scratch);
    for (int64_t i = task * step; i < smaller((task + 1) * step, positions); i++) {
      const int64_t b = i / args.rows, s = i % args.rows;
      const int64_t position =
          args.positions == nullptr
              ? s
              : args.positions[b * args.positions_stride[0] + s * args.positions_stride[1]];
      const auto angle = [&](const void* table, const int64_t* stride) {
        return static_cast<const A*>(table) + b * stride[0] + position * stride[1];
      };
      for (int64_t h = 0; h < args.heads; h++) {
        const auto offset = [&](const int64_t* stride) {
          return b * stride[0] + h * stride[1] + s * stride[2];
        };
        rotation.row(static_cast<const T*>(args.x) + offset(args.x_stride),
                     static_cast<T*>(args.out) + offset(args.out_stride),
                     angle(args.cos, args.cos_stride), angle(args.sin, args.sin_stride));
      }
    }
  });
}

}  // namespace

void rope(const Rope& args) {
  note_run(kIsa);
  with_type(args.dtype, [&](auto* type) { run<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace fastattn::FASTATTN_ISA
