// Rotary embedding of the queries and new keys of a cache, as they are read.
#pragma once

#include "attention/attention.h"
#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// The cosines and sines of one position, by which rows are turned in the planes of their pairs.
template <class A>
class Rotation {
 public:
  Rotation(const Rotary& rotary, Scratch& scratch, int64_t position)
      : rotary_(rotary), cos_(scratch.take<A>(rotary.pairs)), sin_(scratch.take<A>(rotary.pairs)) {
    with_type(rotary.dtype, [&](auto* type) {
      using B = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_same_v<Acc<B>, A>) {
        load_row(cos_, at<B>(rotary.cos, 0, position, 0), rotary.cos.stride[3], rotary.pairs);
        load_row(sin_, at<B>(rotary.sin, 0, position, 0), rotary.sin.stride[3], rotary.pairs);
      }
    });
  }
  // Row i of a head, turned.
  template <class T>
  void load(A* row, const Source& from, int64_t h, int64_t i, int64_t cols) const {
    load_row(row, at<T>(from, h, i, 0), from.stride[3], cols);
    turn(row);
  }

 private:
  void turn(A* row) const {
    const int64_t step = rotary_.interleaved ? 2 : 1,
                  apart = rotary_.interleaved ? 1 : rotary_.pairs;
    for (int64_t c = 0; c < rotary_.pairs; c++) {
      const A x = row[c * step], y = row[c * step + apart];
      row[c * step] = x * cos_[c] - y * sin_[c];
      row[c * step + apart] = x * sin_[c] + y * cos_[c];
    }
  }
  const Rotary& rotary_;
  A *cos_, *sin_;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
