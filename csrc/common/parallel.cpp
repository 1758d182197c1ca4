// Tasks on torch's thread pool through its stable C interface, and the per-thread scratch arena.
#include "common/parallel.h"

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastattn {
namespace {

// One point that comes before others in time, which torch's pool sees to. ThreadSanitizer has to be
// told: the pool is not compiled for it.
struct Order {
  void before() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(this);
#endif
  }
  void after() {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(this);
#endif
  }
};

constexpr size_t kAlign = 64;
constexpr size_t kKept = size_t{64} << 20;  // a larger arena is given back after the call

std::atomic<bool> poison{false};

struct Arena {
  char* block = nullptr;
  size_t capacity = 0;
  size_t used = 0;  // also counts what overflowed
  size_t highest = 0;
  int depth = 0;
  std::vector<void*> overflow;

  ~Arena() { std::free(block); }
};

thread_local Arena arena;

char* allocate(size_t size) {
  void* memory = std::aligned_alloc(kAlign, size);
  if (memory == nullptr) throw std::bad_alloc();
  prefer_huge_pages(memory, size);
  return static_cast<char*>(memory);
}

// Calls body(worker) on `threads` threads at once. Rethrows a failed allocation.
template <class Body>
void run_on_threads(int64_t threads, const Body& body) {
  struct Run {
    const Body& body;
    std::atomic<bool> out_of_memory{false};
    // Two, or a worker that has ended would seem to come before one that starts later.
    Order start{}, end{};

    void work(int64_t worker) {
      start.after();
      try {
        body(worker);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
      end.before();
    }
  } run{body};
  run.start.before();
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      0, threads, 1,
      [](int64_t begin, int64_t end, void* shared) {
        for (; begin < end; begin++) static_cast<Run*>(shared)->work(begin);
      },
      &run));
  run.end.after();
  if (run.out_of_memory) throw std::bad_alloc();
}

// Tasks [first, first + count) of a thread, which takes them from the front; others help from the
// back, so that most tasks stay with their thread. On a line of its own: threads count without
// waiting for each other.
struct alignas(kAlign) Share {
  int64_t first = 0, count = 0;
  std::atomic<int64_t> taken{0}, from_front{0}, from_back{0};

  bool next(bool own, int64_t& task) {
    if (taken.fetch_add(1, std::memory_order_relaxed) >= count) return false;
    task = own ? first + from_front.fetch_add(1, std::memory_order_relaxed)
               : first + count - 1 - from_back.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
};

}  // namespace

int thread_count() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return std::max(1, static_cast<int>(threads));
}

bool TaskQueue::next(int64_t& task) {
  task = std::atomic_ref<int64_t>(next_).fetch_add(1, std::memory_order_relaxed);
  return task < tasks_;
}

bool SharedTasks::next(int64_t& task) { return queue_.next(task); }

void SharedTasks::done() {
  std::atomic_ref<int64_t>(undone_).fetch_sub(1, std::memory_order_release);
}

// No thread waits for one that has not come yet: whoever waits has seen all tasks taken.
void SharedTasks::wait() {
  const std::atomic_ref<int64_t> undone(undone_);
  for (int spins = 0; undone.load(std::memory_order_acquire) > 0; spins++)
    if (spins > 1000) std::this_thread::yield();
}

void run_workers(int64_t tasks, void (*body)(TaskQueue& queue, const void* context),
                 const void* context) {
  const int64_t threads = std::min<int64_t>(tasks, thread_count());
  if (threads <= 0) return;
  TaskQueue queue(tasks);
  if (threads == 1) return body(queue, context);
  run_on_threads(threads, [&](int64_t) { body(queue, context); });
}

void run_shares(int64_t tasks, void (*body)(int64_t task, const void* context),
                const void* context) {
  const int64_t threads = std::min<int64_t>(tasks, thread_count());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(task, context);
    return;
  }
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; i++) {
    Share& own = shares[static_cast<size_t>(i)];
    own.first = i * tasks / threads;
    own.count = (i + 1) * tasks / threads - own.first;
  }
  run_on_threads(threads, [&](int64_t worker) {
    for (int64_t i = 0; i < threads; i++) {
      Share& share = shares[static_cast<size_t>((worker + i) % threads)];
      for (int64_t task; share.next(i == 0, task);) body(task, context);
    }
  });
}

int64_t cache_bytes() {
  static const int64_t bytes = [] {
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return found > 0 ? static_cast<int64_t>(found) : int64_t{512} << 10;
  }();
  return bytes;
}

void prefer_huge_pages(void* memory, size_t size) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + page - 1) / page * page, end = (start + size) / page * page;
  // A kernel without them refuses, which costs nothing.
  if (size >= 2 * page && first < end)
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

bool is_resident(const void* memory) {
#if defined(__linux__)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char found = 0;
  const auto start = reinterpret_cast<uintptr_t>(memory) / page * page;
  return mincore(reinterpret_cast<void*>(start), page, &found) == 0 && (found & 1);
#else
  (void)memory;
  return false;
#endif
}

Scratch::Scratch() : mark_(arena.used) { arena.depth++; }

Scratch::~Scratch() {
  arena.used = mark_;
  if (--arena.depth > 0) return;
  for (void* memory : arena.overflow) std::free(memory);
  arena.overflow.clear();
  const bool grow = arena.highest > arena.capacity && arena.highest <= kKept;
  if (grow || arena.capacity > kKept) {
    std::free(arena.block);
    arena.block = grow ? static_cast<char*>(std::aligned_alloc(kAlign, arena.highest)) : nullptr;
    arena.capacity = arena.block == nullptr ? 0 : arena.highest;
    prefer_huge_pages(arena.block, arena.capacity);
  }
  arena.highest = 0;
}

void* Scratch::bytes(size_t size) {
  size = std::max(kAlign, (size + kAlign - 1) / kAlign * kAlign);
  const size_t start = arena.used;
  arena.used += size;
  arena.highest = std::max(arena.highest, arena.used);
  char* memory;
  if (arena.used <= arena.capacity) {
    memory = arena.block + start;
  } else {
    arena.overflow.reserve(arena.overflow.size() + 1);
    memory = allocate(size);
    arena.overflow.push_back(memory);
  }
  if (poison.load(std::memory_order_relaxed)) std::memset(memory, 0xff, size);
  return memory;
}

}  // namespace fastattn

extern "C" __attribute__((visibility("default"))) void fastattn_poison_scratch(int on) {
  fastattn::poison = on != 0;
}
