// Attention of many queries to a cache, by the kernel that packs keys: it finds keys where they
// lie, or, if they are spread over pages, in a copy.
#pragma once

#include "attention/decode.h"
#include "attention/forward.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// What sequences have in the pages of a cache, one behind the other: [1, Hkv, keys, cols]. Only the
// blocks of keys that some query sees are copied.
template <class T>
Source gathered(const AttentionDecode& args, const Source& cache, int64_t cols, int64_t keys,
                const Sequence* sequences, Scratch& scratch) {
  const int64_t heads = args.in.kv_heads;
  T* to = scratch.take<T>(heads * keys * cols);
  parallel(args.in.batch * heads, [&](int64_t task) {
    const Sequence& own = sequences[task / heads];
    const int64_t h = task % heads;
    const Range seen = visible_keys(sequence(args.in, task / heads), 0, own.q_len);
    const int64_t first = seen.first / kKeys * kKeys;
    T* row = to + (h * keys + own.key + first) * cols;
    Walk<T> walk(args.paging, own.index, first);
    for (int64_t j = first; j < seen.end; j++, walk.skip(1), row += cols)
      copy_row(row, 1, walk(cache, h), cache.stride[3], cols);
  });
  return {to, {0, keys * cols, cols, 1}};
}

template <class T>
void forward_cached(const AttentionDecode& args) {
  Scratch scratch;
  AttentionForward own{args.in, args.out, args.lse};
  Attention& in = own.in;
  bool in_place = args.paging.columns == 1;
  for (int64_t n = 0; n < in.batch && in_place; n++) in_place = args.paging.pages[n] == n;
  if (in_place) {
    in.key = args.key_cache;
    in.value = args.value_cache;
  } else {
    auto* sequences = scratch.take<Sequence>(in.batch);
    int64_t keys = 0;
    for (int64_t n = 0; n < in.batch; n++) {
      sequences[n] = in.sequences[n];
      sequences[n].key = keys;
      keys += sequences[n].kv_len;
    }
    in.key = gathered<T>(args, args.key_cache, in.head_dim, keys, sequences, scratch);
    in.value = gathered<T>(args, args.value_cache, in.value_dim, keys, sequences, scratch);
    in.sequences = sequences;
  }
  forward<T>(own, args.rotary);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
