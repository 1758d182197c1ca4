// The instructions that C++ has no words for; the only file that holds PTX.
#pragma once

#include <cstdint>

namespace fastattn::cuda::ptx {

// Stores to global memory of 8 and 16 bytes, which the compiler would at times take apart.
__device__ inline void store_global(void* to, const uint2& words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y)
               : "memory");
}
__device__ inline void store_global(void* to, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

}  // namespace fastattn::cuda::ptx
