// The attention kernels on the CPU: products of packed panels, softmax on blocks that stay in
// cache.
#include "attention/backward.h"
#include "attention/cached.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Whether keys are read where they lie: to pack them pays once some queries share them.
bool few_queries(const Attention& in) {
  constexpr int64_t few = 8;
  return in.q_len <= few;
}

}  // namespace

void attention_forward(const AttentionForward& args) {
  note_run(kIsa);
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (few_queries(args.in) && args.in.sequences == nullptr && args.in.dropout_p == 0) {
      forward_few<T>(args);
    } else {
      forward<T>(args);
    }
  });
}

void attention_backward(const AttentionBackward& args) {
  note_run(kIsa);
  with_type(args.in.dtype,
            [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(args); });
}

void attention_decode(const AttentionDecode& args) {
  note_run(kIsa);
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (few_queries(args.in)) {
      decode<T>(args);
    } else {
      forward_cached<T>(args);
    }
  });
}

void attention_append(const AttentionAppend& args) {
  note_run(kIsa);
  with_type(args.dtype, [&](auto* type) { append<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace fastattn::FASTATTN_ISA
