// Work on torch's own thread pool, and scratch memory that each thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn {

// Threads that torch would use here: at least 1.
int thread_count();

// Hands out each task of [0, tasks) once, in order, to whichever thread asks: unequal ones balance.
class TaskQueue {
 public:
  __attribute__((always_inline)) explicit TaskQueue(int64_t tasks) : tasks_(tasks) {}
  bool next(int64_t& task);

 private:
  int64_t tasks_;
  int64_t next_ = 0;
};

// Tasks that all threads need done before they go on, and do together: each does what next() hands
// it, says so, and waits for the others' last tasks once there are no more.
class SharedTasks {
 public:
  // Inlined always, as Scratch::take() is.
  __attribute__((always_inline)) explicit SharedTasks(int64_t tasks)
      : queue_(tasks), undone_(tasks) {}
  bool next(int64_t& task);
  void done();
  void wait();

 private:
  TaskQueue queue_;
  int64_t undone_;
};

// Runs body(queue, context) on several threads at once, no more than there are tasks. Rethrows a
// failed allocation.
void run_workers(int64_t tasks, void (*body)(TaskQueue& queue, const void* context),
                 const void* context);

// Runs body(task, context) once for each task. A thread has a share of them, the same in each call
// with as many tasks, so that it finds in its caches what it left there; when its own are done, it
// helps others with their last. Rethrows a failed allocation.
void run_shares(int64_t tasks, void (*body)(int64_t task, const void* context),
                const void* context);

// Bytes of the second-level cache of one core.
int64_t cache_bytes();

// Asks for huge pages under fresh memory if it is large: the first touch of a small page costs more
// than the arithmetic of a norm on it.
void prefer_huge_pages(void* memory, size_t size);

// Whether a page of memory is there already, or will be zeroed when it is first touched.
bool is_resident(const void* memory);

// A stack of scratch memory in the calling thread; what an object took is released with it.
// Contents are undefined, and NaN while tests poison it. Aligned to 64 bytes.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Inlined always: an object with wide flags must not emit a copy that others could link to.
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* bytes(size_t size);
  size_t mark_;
};

}  // namespace fastattn
