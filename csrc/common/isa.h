// The instruction sets that the CPU kernels are compiled for, and the choice among them.
#pragma once

// One entry an ISA, narrowest first; each has its own objects and its own namespace. A build with
// some of them alone defines it on the command line.
#if defined(FASTATTN_FOREACH_ISA)
#elif defined(__x86_64__)
#define FASTATTN_FOREACH_ISA(X, ...) \
  X(scalar, __VA_ARGS__) X(emu16, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__)
#elif defined(__aarch64__)
#define FASTATTN_FOREACH_ISA(X, ...) \
  X(scalar, __VA_ARGS__) X(emu16, __VA_ARGS__) X(neon, __VA_ARGS__)
#else
#define FASTATTN_FOREACH_ISA(X, ...) X(scalar, __VA_ARGS__) X(emu16, __VA_ARGS__)
#endif

namespace fastattn {

enum class Isa : int {
#define FASTATTN_ENUMERATOR(isa, ...) isa,
  FASTATTN_FOREACH_ISA(FASTATTN_ENUMERATOR)
#undef FASTATTN_ENUMERATOR
};

// The ISA in use: the widest that the machine has, or FASTATTN_ISA, or what was selected last.
Isa current_isa();

// Whether the ISA's kernels add up products of bf16 in pairs here: AVX-512's do where the processor
// has an instruction for it, and the emulated vector's do anywhere.
bool multiplies_pairs(Isa isa);

// Every kernel reports its own ISA, so that a test can prove which body ran.
void note_run(Isa isa);

}  // namespace fastattn

#define FASTATTN_DECLARE(isa, name, Args) \
  namespace isa {                         \
  void name(const Args&);                 \
  }
#define FASTATTN_ENTRY(isa, name) &isa::name,

// Declares `void name(const Args&)` for every ISA, and `fastattn::name`, which calls the one in
// use.
#define FASTATTN_KERNEL(name, Args)                                                               \
  FASTATTN_FOREACH_ISA(FASTATTN_DECLARE, name, Args)                                              \
  inline void name(const Args& args) {                                                            \
    static constexpr void (*table[])(const Args&) = {FASTATTN_FOREACH_ISA(FASTATTN_ENTRY, name)}; \
    table[static_cast<int>(current_isa())](args);                                                 \
  }
