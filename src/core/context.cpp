// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/context.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// Threads that sleep between parallel regions; the caller is worker 0. Spinning would win a few
// microseconds per region on an idle machine and lose milliseconds on a busy one.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int worker = 1; worker < threads; ++worker) {
      threads_.emplace_back([this, worker] { serve(worker); });
    }
  }

  ~ThreadPool() {
    {
      const std::scoped_lock lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  void run(int workers, const std::function<void(int)>& body) {
    // One region at a time: two host threads may share a context.
    const std::scoped_lock region(region_);
    const int helpers = std::min(workers - 1, static_cast<int>(threads_.size()));
    {
      const std::scoped_lock lock(mutex_);
      body_ = &body;
      helpers_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    if (helpers > 0) start_.notify_all();
    body(0);
    for (int worker = helpers + 1; worker < workers; ++worker) body(worker);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int worker) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      start_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      if (worker > helpers_) continue;
      const std::function<void(int)>* body = body_;
      lock.unlock();
      (*body)(worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex region_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const std::function<void(int)>* body_ = nullptr;
  uint64_t generation_ = 0;
  int helpers_ = 0;
  int running_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

std::shared_ptr<void> allocate_host(size_t bytes) {
  // Large blocks in huge pages: faulting in 4 KiB pages takes longer than filling a large map (65
  // against 9 ms for 111 MB on Zen 5).
  constexpr size_t huge_page = size_t{2} << 20;
  const size_t alignment = bytes >= 2 * huge_page ? huge_page : 64;
  const size_t rounded = std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
  void* data = std::aligned_alloc(alignment, rounded);
  check(data != nullptr, ErrorCode::out_of_memory, "no memory for ", bytes, " bytes");
#if defined(__linux__)
  if (alignment == huge_page) madvise(data, rounded, MADV_HUGEPAGE);
#endif
  return {data, std::free};
}

// The CPUs that the process may run on: a container or taskset leaves fewer than the machine has.
int usable_cpus() {
#if defined(__linux__)
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

Context Context::cpu(int threads) {
  check(threads >= 0, "threads is ", threads, ", expected 0 (all) or more");
  Context ctx;
  ctx.threads = threads > 0 ? threads : usable_cpus();
  ctx.run = [pool = std::make_shared<ThreadPool>(ctx.threads)](
                int workers, const std::function<void(int)>& body) { pool->run(workers, body); };
  ctx.allocate = allocate_host;
  return ctx;
}

Matrix make_matrix(const Context& ctx, int64_t rows, int64_t cols, Dtype dtype) {
  size_t bytes = size_of(dtype);
  const bool countable = !__builtin_mul_overflow(bytes, rows, &bytes) &&
                         !__builtin_mul_overflow(bytes, cols, &bytes) && bytes <= PTRDIFF_MAX;
  check(countable, ErrorCode::out_of_memory, "no memory for a ", rows, " x ", cols, " matrix of ",
        name(dtype));
  Matrix matrix;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.stride = cols;
  matrix.dtype = dtype;
  matrix.device = ctx.device;
  matrix.storage = ctx.allocate(bytes);
  matrix.data = matrix.storage.get();
  return matrix;
}

void parallel_for(const Context& ctx,
                  int64_t tasks,
                  const std::function<void(int64_t, int)>& body) {
  if (tasks <= 0) return;
  const int workers = static_cast<int>(std::min<int64_t>(std::max(ctx.threads, 1), tasks));
  if (workers == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next = 0;
  std::exception_ptr error;
  std::mutex error_mutex;
  ctx.run(workers, [&](int worker) {
    try {
      for (int64_t task = next++; task < tasks; task = next++) body(task, worker);
    } catch (...) {
      next = tasks;
      const std::scoped_lock lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace voxgemm
