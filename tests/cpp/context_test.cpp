// SPDX-License-Identifier: Apache-2.0
#include "voxgemm/context.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <filesystem>
#include <iterator>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/message_of.h"

namespace voxgemm {
namespace {

using test::message_of;

TEST(ContextCpu, TakesThreads) {
  EXPECT_EQ(Context::cpu(1).threads, 1);
  EXPECT_EQ(Context::cpu(5).threads, 5);
  EXPECT_GE(Context::cpu().threads, 1);
  EXPECT_EQ(Context::cpu().device, Device{});
  EXPECT_EQ(message_of([] { Context::cpu(-2); }), "threads is -2, expected 0 (all) or more");
}

// A container or taskset leaves a process fewer CPUs than the machine has.
TEST(ContextCpu, TakesNoMoreThreadsThanTheProcessMayUse) {
  cpu_set_t before;
  if (sched_getaffinity(0, sizeof before, &before) != 0) GTEST_SKIP() << "no list of CPUs";
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(Context::cpu().threads, 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
  EXPECT_EQ(Context::cpu().threads, CPU_COUNT(&before));
}

TEST(MakeMatrix, IsAlignedAndContiguous) {
  const Context ctx = Context::cpu(1);
  for (const Dtype dtype : {Dtype::f16, Dtype::f64, Dtype::i32}) {
    for (const int64_t rows : {0, 1, 7}) {
      const Matrix matrix = make_matrix(ctx, rows, 5, dtype);
      EXPECT_EQ(matrix.rows, rows);
      EXPECT_EQ(matrix.cols, 5);
      EXPECT_EQ(matrix.stride, 5);
      EXPECT_EQ(matrix.dtype, dtype);
      EXPECT_EQ(matrix.device, ctx.device);
      EXPECT_EQ(matrix.empty(), rows == 0);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(matrix.data) % 64, 0U);
    }
  }
}

TEST(MakeMatrix, LivesAsLongAsACopy) {
  Matrix copy;
  {
    const Matrix matrix = make_matrix(Context::cpu(2), 3, 2, Dtype::i32);
    *matrix.row<int32_t>(2) = 42;
    copy = matrix;
  }
  EXPECT_EQ(*copy.row<int32_t>(2), 42);
}

std::string out_of_memory(int64_t rows, int64_t cols) {
  return message_of([&] { make_matrix(Context::cpu(1), rows, cols, Dtype::f64); },
                    ErrorCode::out_of_memory);
}

TEST(MakeMatrix, RefusesMoreThanMemoryHolds) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer ends the program where an allocation fails";
#endif
  EXPECT_EQ(out_of_memory(int64_t{1} << 40, 1 << 16), "no memory for 576460752303423488 bytes");
}

TEST(MakeMatrix, RefusesMoreBytesThanItCanCount) {
  EXPECT_EQ(out_of_memory(int64_t{1} << 40, int64_t{1} << 40),
            "no memory for a 1099511627776 x 1099511627776 matrix of f64");
  EXPECT_EQ(out_of_memory(int64_t{1} << 40, 1 << 20),
            "no memory for a 1099511627776 x 1048576 matrix of f64");
}

// The contexts that a user may hand over: own threads, one thread, a body after the other, fresh
// threads.
std::vector<Context> contexts() {
  std::vector<Context> list = {Context::cpu(1), Context::cpu(2), Context::cpu(7)};
  Context serial = Context::cpu(4);
  serial.run = [](int workers, const std::function<void(int)>& body) {
    for (int worker = workers - 1; worker >= 0; --worker) body(worker);
  };
  list.push_back(serial);
  Context fresh = Context::cpu(4);
  fresh.run = [](int workers, const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    threads.reserve(workers);
    for (int worker = 0; worker < workers; ++worker) threads.emplace_back(body, worker);
    for (std::thread& thread : threads) thread.join();
  };
  list.push_back(fresh);
  list.push_back(Context::shared(3));
  return list;
}

TEST(ContextRun, RunsEveryWorkerOnce) {
  for (const Context& ctx : contexts()) {
    // More than the context's threads, too.
    for (const int workers : {0, 1, 2, 11}) {
      std::vector<std::atomic<int>> runs(workers);
      ctx.run(workers, [&](int worker) { ++runs[worker]; });
      for (const auto& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

TEST(ParallelFor, RunsEveryTaskOnceAndEachWorkersInRisingOrder) {
  for (const Context& ctx : contexts()) {
    for (const int64_t tasks : {-1, 0, 1, 3, 1000}) {
      SCOPED_TRACE(join(ctx.threads, " threads, ", tasks, " tasks"));
      const int64_t workers = std::min<int64_t>(ctx.threads, std::max<int64_t>(tasks, 0));
      std::vector<std::atomic<int>> runs(std::max<int64_t>(tasks, 0));
      std::vector<std::vector<int64_t>> lists(ctx.threads);
      std::vector<std::atomic<int>> inside(ctx.threads);
      parallel_for(ctx, tasks, [&](int64_t task, int worker) {
        ASSERT_GE(worker, 0);
        ASSERT_LT(worker, workers);
        // A worker's memory is its own: no two tasks of a worker at once.
        ASSERT_EQ(inside[worker]++, 0);
        ++runs[task];
        lists[worker].push_back(task);
        --inside[worker];
      });
      for (const auto& count : runs) EXPECT_EQ(count, 1);
      for (const auto& list : lists) {
        for (size_t i = 1; i < list.size(); ++i) EXPECT_LT(list[i - 1], list[i]);
      }
    }
  }
}

TEST(ParallelFor, RethrowsOnceAllWorkersHaveStopped) {
  for (const Context& ctx : contexts()) {
    SCOPED_TRACE(join(ctx.threads, " threads"));
    std::atomic<int> inside = 0;
    std::atomic<int64_t> ran = 0;
    constexpr int64_t tasks = 1 << 20;
    try {
      parallel_for(ctx, tasks, [&](int64_t task, int) {
        ++inside;
        ++ran;
        if (task == 3) {
          --inside;
          throw std::runtime_error("task 3");
        }
        --inside;
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "task 3");
    }
    EXPECT_EQ(inside, 0);
    EXPECT_LT(ran, tasks) << "tasks are not handed out after an exception";
    // The context still works.
    std::atomic<int> after = 0;
    parallel_for(ctx, 10, [&](int64_t, int) { ++after; });
    EXPECT_EQ(after, 10);
  }
}

TEST(ParallelFor, ManyExceptionsGiveOne) {
  for (const Context& ctx : contexts()) {
    EXPECT_THROW(parallel_for(ctx, 100,
                              [](int64_t task, int) {
                                throw Error(ErrorCode::unsupported, std::to_string(task));
                              }),
                 Error);
  }
}

TEST(ParallelFor, TwoHostThreadsShareAContext) {
  const Context ctx = Context::cpu(3);
  std::vector<std::thread> hosts;
  hosts.reserve(2);
  std::atomic<int64_t> sum = 0;
  for (int host = 0; host < 2; ++host) {
    hosts.emplace_back([&] {
      for (int repeat = 0; repeat < 200; ++repeat) {
        std::vector<std::atomic<int>> inside(3);
        parallel_for(ctx, 20, [&](int64_t task, int worker) {
          EXPECT_EQ(inside[worker]++, 0);
          sum += task;
          --inside[worker];
        });
      }
    });
  }
  for (std::thread& host : hosts) host.join();
  EXPECT_EQ(sum, 2 * 200 * 190);
}

// All workers wait for each other, so each has a thread.
void run_at_once(const Context& ctx, int workers, const std::function<void(int)>& body) {
  std::atomic<int> inside = 0;
  ctx.run(workers, [&](int worker) {
    body(worker);
    ++inside;
    while (inside < workers) std::this_thread::yield();
  });
}

std::set<std::thread::id> threads_of(const Context& ctx, int workers) {
  std::set<std::thread::id> ids;
  std::mutex mutex;
  run_at_once(ctx, workers, [&](int) {
    const std::scoped_lock lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  return ids;
}

// Sums 1 to 10 in a region of each task of a region.
int64_t nested_sum(const Context& ctx) {
  std::atomic<int64_t> sum = 0;
  parallel_for(ctx, 20, [&](int64_t, int) {
    parallel_for(ctx, 11, [&](int64_t task, int worker) {
      EXPECT_LT(worker, ctx.threads);
      sum += task;
    });
  });
  return sum;
}

TEST(ParallelFor, MayBeNested) {
  for (const Context& ctx : contexts()) {
    SCOPED_TRACE(join(ctx.threads, " threads"));
    for (int repeat = 0; repeat < 20; ++repeat) ASSERT_EQ(nested_sum(ctx), 20 * 55);
  }
}

TEST(ParallelFor, MayBeNestedByTwoHostThreads) {
  const Context ctx = Context::cpu(3);
  std::vector<std::thread> hosts;
  hosts.reserve(2);
  for (int host = 0; host < 2; ++host) {
    hosts.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat) EXPECT_EQ(nested_sum(ctx), 20 * 55);
    });
  }
  for (std::thread& host : hosts) host.join();
}

// The only helper is held by another thread's region; this one must not wait for it.
TEST(ParallelFor, DoesNotWaitForAThreadThatDoesNotCome) {
  const Context ctx = Context::cpu(2);
  std::atomic<int> held = 0;
  std::atomic<bool> release = false;
  std::thread holder([&] {
    parallel_for(ctx, 2, [&](int64_t, int) {
      ++held;
      while (!release) std::this_thread::yield();
    });
  });
  while (held < 2) std::this_thread::yield();
  std::atomic<int> ran = 0;
  parallel_for(ctx, 100, [&](int64_t, int worker) { ran += worker == 0 ? 1 : 1000; });
  EXPECT_EQ(ran, 100);
  release = true;
  holder.join();
}

// Rounding and the treatment of subnormals are the caller's, or results would depend on threads.
TEST(ParallelFor, TakesTheCallersFloatingPointEnvironment) {
  for (const Context& ctx : {Context::cpu(4), Context::shared(4)}) {
    for (const int rounding : {FE_UPWARD, FE_TONEAREST}) {
      ASSERT_EQ(std::fesetround(rounding), 0);
      std::atomic<int> same = 0;
      run_at_once(ctx, 4, [&](int) { same += std::fegetround() == rounding ? 1 : 0; });
      EXPECT_EQ(same, 4);
    }
  }
}

TEST(ContextShared, TakesThreads) {
  EXPECT_EQ(Context::shared(3).threads, 3);
  EXPECT_EQ(Context::shared(3).device, Device{});
  EXPECT_THROW(Context::shared(0), Error);
}

TEST(ContextCpu, KeepsItsThreadsAndGrows) {
  const Context ctx = Context::cpu(4);
  const std::set<std::thread::id> few = threads_of(ctx, 4);
  EXPECT_EQ(few.size(), 4U);
  EXPECT_EQ(threads_of(ctx, 4), few);
  const std::set<std::thread::id> many = threads_of(ctx, 6);
  EXPECT_EQ(many.size(), 6U);
  EXPECT_TRUE(std::includes(many.begin(), many.end(), few.begin(), few.end()));
}

// More workers than this process has threads.
int more_workers() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks))) + 2;
}

TEST(ContextShared, SharesItsThreads) {
  const int workers = more_workers();  // so that all shared threads take part
  const std::set<std::thread::id> threads = threads_of(Context::shared(workers), workers);
  EXPECT_EQ(threads.size(), static_cast<size_t>(workers));
  EXPECT_EQ(threads_of(Context::shared(workers), workers), threads);
}

// Other threads that come late: their CPUs are taken.
void run_late(int workers, const std::function<void(int)>& body) {
  body(0);
  std::thread([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    for (int worker = 1; worker < workers; ++worker) body(worker);
  }).join();
}

TEST(ContextShared, LeavesThreadsThatKeepComingLateForAWhile) {
  constexpr int workers = 3;
  threads_of(Context::shared(workers), workers);
  int called = 0;
  const Context punctual =
      Context::shared(workers, [&](int count, const std::function<void(int)>& body) {
        ++called;
        for (int worker = 0; worker < count; ++worker) body(worker);
      });
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));
  for (int region = 0; region < 5; ++region) punctual.run(workers, [](int) {});
  EXPECT_EQ(called, 5) << "theirs while they come at once";
  // This thread may itself sleep too long between the two lines.
  for (int attempt = 0; attempt < 20 && called > 0; ++attempt) {
    for (int late = 0; late < 5; ++late) {
      Context::shared(workers, run_late).run(workers, [](int) {});
    }
    called = 0;
    punctual.run(workers, [](int) {});
  }
  EXPECT_EQ(called, 0) << "others while they come late";
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));
  punctual.run(workers, [](int) {});
  EXPECT_EQ(called, 1) << "theirs again";
}

TEST(ContextShared, StartsItsThreadsInsideTheOthers) {
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0) GTEST_SKIP() << "no list of CPUs";
  if (CPU_COUNT(&all) < 2) GTEST_SKIP() << "one CPU only";
  const int workers = more_workers();  // so that some have to start
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  // Threads inherit the CPUs of the thread that starts them.
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  int called = 0;
  const Context ctx =
      Context::shared(workers, [&](int count, const std::function<void(int)>& body) {
        ++called;
        std::thread([&] {
          sched_setaffinity(0, sizeof all, &all);
          run_late(count, body);
        }).join();
      });
  // Late, then to start threads, then not at all, unless this thread itself sleeps too long.
  do {
    called = 0;
    ctx.run(workers, [](int) {});
  } while (called > 0);
  std::atomic<int> free = 0;
  run_at_once(Context::shared(workers), workers, [&](int) {
    cpu_set_t mine;
    sched_getaffinity(0, sizeof mine, &mine);
    free += CPU_EQUAL(&mine, &all) != 0 ? 1 : 0;
  });
  ASSERT_EQ(sched_setaffinity(0, sizeof all, &all), 0);
  EXPECT_EQ(free, workers - 1) << "all but this thread";
}

// A forked child has none of its parent's threads, and finds locks as they were.
TEST(ParallelFor, WorksInAForkedChild) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the sanitizers' allocators and threads do not survive a fork";
#endif
  const pid_t parent = getpid();
  // Threads of a library that does not expect forks.
  const auto theirs = [parent](int workers, const std::function<void(int)>& body) {
    if (getpid() != parent) _exit(2);
    for (int worker = 0; worker < workers; ++worker) body(worker);
  };
  for (const Context& ctx : {Context::cpu(3), Context::shared(3), Context::shared(3, theirs)}) {
    std::atomic<bool> stop = false;
    std::thread busy([&] {
      while (!stop) parallel_for(ctx, 5, [](int64_t, int) {});
    });
    for (int repeat = 0; repeat < 20; ++repeat) {
      const pid_t child = fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        alarm(60);  // a child that hangs dies
        std::atomic<int64_t> sum = 0;
        for (int region = 0; region < 10; ++region) {
          parallel_for(ctx, 100, [&](int64_t task, int) { sum += task; });
        }
        _exit(sum == 49500 && threads_of(ctx, 3).size() == 3 ? 0 : 1);
      }
      int status = -1;
      ASSERT_EQ(waitpid(child, &status, 0), child);
      EXPECT_EQ(status, 0);
    }
    stop = true;
    busy.join();
  }
}

TEST(ParallelFor, WritesOfTasksAreSeenAfterIt) {
  const Context ctx = Context::cpu(4);
  std::vector<int> values(1000);
  for (int round = 1; round <= 50; ++round) {
    parallel_for(ctx, 1000, [&](int64_t task, int) { values[task] += static_cast<int>(task); });
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(values[i], i * round);
  }
}

}  // namespace
}  // namespace voxgemm
