// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>

#include "voxgemm/types.h"

namespace voxgemm {

// Where work runs and what it may use: a device, a stream, threads and memory. All of it is the
// caller's to say (under torch: as many threads as torch has, on torch's CPUs, and torch's memory).
// Several threads may use one CPU context at once.
struct VOXGEMM_EXPORT Context {
  // Calls body(worker) once for every worker in [0, workers), on several threads or not, and
  // returns when all have returned. body does not throw. Several threads may call it at once, and a
  // body may call it again.
  using Run = std::function<void(int workers, const std::function<void(int worker)>& body)>;
  // Returns `bytes` bytes aligned to 64, or throws.
  using Allocate = std::function<std::shared_ptr<void>(size_t bytes)>;
  // The same for a matrix that knows its rows, columns and dtype.
  using AllocateMatrix = std::function<std::shared_ptr<void>(const MatrixRef& shape)>;

  Device device = {};
  void* stream = nullptr;  // cudaStream_t; null on the CPU
  int threads = 1;         // the most workers a pass uses; results do not depend on it
  Run run;
  Allocate allocate;
  AllocateMatrix allocate_matrix;  // what make_matrix() asks instead, or null

  // A CPU context with `threads` threads of its own (0: as many as the process may use) that sleep
  // between parallel regions. They start when first needed, and anew in a forked child.
  static Context cpu(int threads = 0);
  // The same on `theirs`, threads of another library, which may spin while they wait. Where these
  // keep coming late because other programs have their CPUs, the next regions run on sleeping
  // threads that all shared contexts of the process have in common; each of them starts inside a
  // body of `theirs`, from where it has its CPUs and priority. Without `theirs`, always on those.
  static Context shared(int threads, const Run& theirs = nullptr);
};

// Asks the system for huge pages under a fresh block of host memory, whole ones inside of it, where
// there are two or more: faulting in 4 KiB pages takes longer than filling a large map (65 against
// 9 ms for 111 MB on Zen 5). Advice alone: where the system does not take it, nothing changes.
VOXGEMM_EXPORT void prefer_huge_pages(void* data, size_t bytes);

// A [rows, cols] matrix of the context's memory, not initialised.
VOXGEMM_EXPORT Matrix make_matrix(const Context& ctx, int64_t rows, int64_t cols, Dtype dtype);

// Runs body(task, worker) for every task in [0, tasks). Tasks are handed out in rising order to at
// most ctx.threads workers; the first exception is rethrown once all workers have stopped. body may
// call parallel_for itself.
VOXGEMM_EXPORT void parallel_for(const Context& ctx,
                                 int64_t tasks,
                                 const std::function<void(int64_t task, int worker)>& body);

}  // namespace voxgemm
