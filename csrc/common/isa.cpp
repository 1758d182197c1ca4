// Chooses the ISA by cpuid or FASTATTN_ISA, and tells Python about it through plain C functions.
#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "simd/peak.h"

namespace fastattn {
namespace {

#define FASTATTN_NAME(isa, ...) #isa,
constexpr const char* kNames[] = {FASTATTN_FOREACH_ISA(FASTATTN_NAME)};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

bool supported(int index) {
  if (index < 0 || index >= kCount) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const std::string_view isa = kNames[index];
  // F16C is older than AVX2 on every processor, and clang cannot ask for it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && avx2;
#endif
  return true;
}

int from_environment() {
  const char* wanted = std::getenv("FASTATTN_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    std::string runnable;
    for (int i = 0; i < kCount; i++) {
      if (!supported(i)) continue;
      if (std::strcmp(wanted, kNames[i]) == 0) return i;
      runnable += std::string(runnable.empty() ? "" : ", ") + kNames[i];
    }
    throw std::runtime_error("FASTATTN_ISA must be one of " + runnable + " on this machine, got " +
                             wanted);
  }
  int widest = kCount - 1;
  while (!supported(widest)) widest--;
  // The emulated vector is for tests; a machine without its own vectors runs the scalar body.
  return std::string_view(kNames[widest]) == "emu16" ? static_cast<int>(Isa::scalar) : widest;
}

std::atomic<int> selected{-1};
std::atomic<int> last_run{-1};

}  // namespace

Isa current_isa() {
  int isa = selected.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = from_environment();
    selected.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool multiplies_pairs(Isa isa) {
  const std::string_view name = kNames[static_cast<int>(isa)];
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("avx512bf16");
  if (name == "avx512") return has_instruction;
#endif
  return name == "emu16";
}

void note_run(Isa isa) { last_run.store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace fastattn

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

FASTATTN_EXPORT const char* fastattn_isa_name(int index) {
  return index >= 0 && index < fastattn::kCount ? fastattn::kNames[index] : nullptr;
}
FASTATTN_EXPORT int fastattn_isa_supported(int index) { return fastattn::supported(index); }
FASTATTN_EXPORT int fastattn_isa_current() {
  try {
    return static_cast<int>(fastattn::current_isa());
  } catch (const std::exception&) {
    return -1;  // FASTATTN_ISA names none; Python says so
  }
}
FASTATTN_EXPORT int fastattn_isa_select(int index) {
  if (!fastattn::supported(index)) return -1;
  fastattn::selected.store(index, std::memory_order_relaxed);
  return 0;
}
FASTATTN_EXPORT int fastattn_isa_last_run() {
  return fastattn::last_run.load(std::memory_order_relaxed);
}
// GFLOP/s of fp32 multiply-adds on `threads` threads, measured for `seconds`.
FASTATTN_EXPORT double fastattn_fma_peak(int threads, double seconds) {
  double gflops = 0;
  fastattn::fma_peak({threads, seconds, &gflops});
  return gflops;
}
FASTATTN_EXPORT const char* fastattn_build_info() {
  return "compiler " __VERSION__ ", torch ABI 2.10";
}
