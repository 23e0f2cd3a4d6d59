// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/context.h"

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// One call of Context::run: its body's workers are claimed one by one, by whoever is free.
struct Region {
  const std::function<void(int)>& body;
  int workers;
  std::fenv_t floats = {};       // of the caller
  int next = 1;                  // the first worker that nobody has claimed; the caller begins as 0
  std::atomic<int> running = 0;  // claimed by the pool's threads and not done
  std::condition_variable done = {};
};

// How long a thread looks out for work, and a caller for its last worker, before it sleeps. A
// thread that sleeps needs 5 us of its caller and comes 10 to 60 us later, which small layers feel;
// more than this is lost beside a busy neighbour, for every region once.
constexpr std::chrono::microseconds lookout(20);

template <class Condition>
void look_out_for(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + lookout;
  while (!condition() && std::chrono::steady_clock::now() < end) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// The threads of a pool in one process.
class Team {
 public:
  Team() : process_(getpid()) {}

  ~Team() {
    {
      const std::scoped_lock lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  bool alive() const { return process_ == getpid(); }

  // At least `helpers` threads where the system allows, each started inside a worker of `start`.
  void grow(int helpers, const Context::Run& start) {
    if (size_.load(std::memory_order_acquire) >= helpers) return;
    const std::scoped_lock growth(growth_);
    if (size_.load(std::memory_order_relaxed) >= helpers) return;
    const auto birth = [this](int worker) {
      if (worker <= size_.load(std::memory_order_relaxed)) return;
      const std::scoped_lock lock(mutex_);
      try {
        threads_.emplace_back([this] { serve(); });
      } catch (const std::system_error&) {
        // No more threads: callers claim the workers that no thread comes for.
      }
    };
    if (start) {
      start(helpers + 1, birth);
    } else {
      for (int worker = 1; worker <= helpers; ++worker) birth(worker);
    }
    size_.store(helpers, std::memory_order_release);
  }

  void run(int workers, const std::function<void(int)>& body) {
    Region region{.body = body, .workers = workers};
    std::fegetenv(&region.floats);
    std::unique_lock lock(mutex_);
    regions_.push_back(&region);
    open_ += workers - 1;
    // Those that look out need no waking.
    const int woken = std::min(workers - 1 - looking_, sleeping_);
    lock.unlock();
    for (int i = 0; i < woken; ++i) work_.notify_one();
    body(0);
    lock.lock();
    // Workers that no thread has come for are not waited for.
    while (region.next < workers) {
      const int worker = claim(&region);
      lock.unlock();
      body(worker);
      lock.lock();
    }
    if (region.running == 0) return;
    lock.unlock();
    look_out_for([&] { return region.running == 0; });
    lock.lock();
    region.done.wait(lock, [&] { return region.running == 0; });
  }

 private:
  // Under mutex_.
  int claim(Region* region) {
    --open_;
    if (region->next + 1 == region->workers) std::erase(regions_, region);
    return region->next++;
  }

  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      if (open_ == 0) {
        ++looking_;
        lock.unlock();
        look_out_for([this] { return open_ > 0; });
        lock.lock();
        --looking_;
        ++sleeping_;
        work_.wait(lock, [this] { return stopping_ || open_ > 0; });
        --sleeping_;
      }
      if (stopping_) return;
      Region& region = *regions_.front();
      const int worker = claim(&region);
      ++region.running;
      lock.unlock();
      std::fesetenv(&region.floats);
      region.body(worker);
      lock.lock();
      if (--region.running == 0) region.done.notify_one();
    }
  }

  const pid_t process_;
  std::mutex growth_;
  std::atomic<int> size_ = 0;  // helpers asked for
  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<Region*> regions_;  // with unclaimed workers, oldest first
  std::atomic<int> open_ = 0;     // their unclaimed workers
  int looking_ = 0;
  int sleeping_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// Threads that sleep between parallel regions; the caller of a region is its worker 0. Spinning
// would win a few microseconds per region on an idle machine and lose milliseconds on a busy one.
// Any number of threads may call run at once, the pool's own included: a nested region is a region
// like others.
class ThreadPool {
 public:
  ThreadPool() : team_(new Team) {}

  ~ThreadPool() {
    Team* team = team_;
    // The threads of a parent process are not in this one, and nobody can wait for them.
    if (team->alive()) delete team;
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Missing threads start inside `start`.
  void run(int workers, const std::function<void(int)>& body, const Context::Run& start = nullptr) {
    if (workers == 1) return body(0);
    if (workers <= 0) return;
    Team& team = current();
    team.grow(workers - 1, start);
    team.run(workers, body);
  }

  // On the threads of `theirs`, unless their CPUs are known to be taken.
  void run_on(const Context::Run& theirs, int workers, const std::function<void(int)>& body) {
    // Nor in a forked child: it has none of the threads that the other library counts on.
    if (process_ != getpid()) return run(workers, body);
    const auto begin = Clock::now();
    if (begin < taken_until_.load(std::memory_order_relaxed)) return run(workers, body, theirs);
    const auto caller = std::this_thread::get_id();
    theirs(workers, [&](int worker) {
      if (std::this_thread::get_id() != caller) {
        const auto now = Clock::now();
        if (now - begin > late) note_late(begin, now);
      }
      body(worker);
    });
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Milliseconds = std::chrono::milliseconds;
  // A sleeping thread comes in 0.1 ms; one whose CPU another program has, in a slice of 1 to 4 ms.
  static constexpr Milliseconds late{1};
  // Any system makes a thread wait now and then; a program that has as much right to the CPU makes
  // it wait most of the time. This much of a window is between the two.
  static constexpr Milliseconds most_late{20};
  static constexpr Milliseconds window{100};
  // Finding out again costs about most_late.
  static constexpr Milliseconds penalty{1000};

  // In a region that began at `begin`.
  void note_late(Clock::time_point begin, Clock::time_point now) {
    const auto last = last_late_.exchange(now, std::memory_order_relaxed);
    if (last > begin) return;  // another of its threads
    if (now - window_begin_.load(std::memory_order_relaxed) > window) {
      window_begin_.store(begin, std::memory_order_relaxed);
      lateness_.store({}, std::memory_order_relaxed);
    }
    const auto lateness = lateness_.load(std::memory_order_relaxed) + (now - begin);
    lateness_.store(lateness, std::memory_order_relaxed);
    if (lateness > most_late) taken_until_.store(now + penalty, std::memory_order_relaxed);
  }

  // After a fork a new team: another thread may have held the old one's mutex, so it is not touched
  // again.
  Team& current() {
    Team* team = team_.load(std::memory_order_acquire);
    if (team->alive()) return *team;
    auto fresh = std::make_unique<Team>();
    if (team_.compare_exchange_strong(team, fresh.get())) return *fresh.release();
    return *team;
  }

  const pid_t process_ = getpid();
  std::atomic<Team*> team_;
  // Of theirs. Threads that write at once lose some lateness, which is no harm.
  std::atomic<Clock::time_point> last_late_ = Clock::time_point();
  std::atomic<Clock::time_point> window_begin_ = Clock::time_point();
  std::atomic<Clock::duration> lateness_ = Clock::duration();  // in the window, a region's once
  std::atomic<Clock::time_point> taken_until_ = Clock::time_point();
};

constexpr size_t huge_page = size_t{2} << 20;

std::shared_ptr<void> allocate_host(size_t bytes) {
  const size_t alignment = bytes >= 2 * huge_page ? huge_page : 64;
  const size_t rounded = std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
  void* data = std::aligned_alloc(alignment, rounded);
  check(data != nullptr, ErrorCode::out_of_memory, "no memory for ", bytes, " bytes");
  prefer_huge_pages(data, rounded);
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
  ctx.run = [pool = std::make_shared<ThreadPool>()](
                int workers, const std::function<void(int)>& body) { pool->run(workers, body); };
  ctx.allocate = allocate_host;
  return ctx;
}

Context Context::shared(int threads, const Run& theirs) {
  check(threads > 0, "threads is ", threads, ", expected 1 or more");
  // Never destroyed: a thread may still compute while the process exits.
  static ThreadPool* const pool = new ThreadPool;
  Context ctx;
  ctx.threads = threads;
  ctx.run = [theirs](int workers, const std::function<void(int)>& body) {
    if (theirs) return pool->run_on(theirs, workers, body);
    pool->run(workers, body);
  };
  ctx.allocate = allocate_host;
  return ctx;
}

void prefer_huge_pages([[maybe_unused]] void* data, size_t bytes) {
  if (bytes < 2 * huge_page) return;
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const size_t before = (huge_page - address % huge_page) % huge_page;
  const size_t whole = (bytes - before) / huge_page * huge_page;
  if (whole > 0) madvise(static_cast<char*>(data) + before, whole, MADV_HUGEPAGE);
#endif
}

Matrix make_matrix(const Context& ctx, int64_t rows, int64_t cols, Dtype dtype) {
  size_t bytes = size_of(dtype);
  check(bytes > 0, "the dtype of a matrix is number ", static_cast<int>(dtype), ", expected 0 to ",
        static_cast<int>(Dtype::i64));
  const bool countable = !__builtin_mul_overflow(bytes, rows, &bytes) &&
                         !__builtin_mul_overflow(bytes, cols, &bytes) && bytes <= PTRDIFF_MAX;
  check(ctx.allocate != nullptr, "the context has no allocate, expected one as of Context::cpu()");
  check(countable, ErrorCode::out_of_memory, "no memory for a ", rows, " x ", cols, " matrix of ",
        name(dtype));
  Matrix matrix;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.stride = cols;
  matrix.dtype = dtype;
  matrix.device = ctx.device;
  matrix.storage = ctx.allocate_matrix ? ctx.allocate_matrix(matrix) : ctx.allocate(bytes);
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
  check(ctx.run != nullptr, "the context has no run, expected one as of Context::cpu()");
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
