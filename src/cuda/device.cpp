// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "conv/passes.h"
#include "voxgemm/cuda.h"

namespace voxgemm {
namespace cuda {
namespace {

// Read once, as every launch asks.
const cudaDeviceProp& properties_of(const Device& device) {
  static const std::vector<cudaDeviceProp> all = [] {
    int devices = 0;
    check_cuda(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    std::vector<cudaDeviceProp> found(devices);
    for (int i = 0; i < devices; ++i) {
      check_cuda(cudaGetDeviceProperties(&found[i], i), "cudaGetDeviceProperties");
    }
    return found;
  }();
  return all.at(device.index);
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check_cuda(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
};

// A stream and a memory pool, released after the last memory taken from them.
struct Lane {
  cudaStream_t stream = nullptr;
  cudaMemPool_t pool = nullptr;

  explicit Lane(int index) {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = index;
    const cudaError_t status = cudaMemPoolCreate(&pool, &properties);
    if (status != cudaSuccess) cudaStreamDestroy(stream);
    check_cuda(status, "cudaMemPoolCreate");
    // Memory stays with the pool: giving it back at every wait costs milliseconds.
    uint64_t keep = std::numeric_limits<uint64_t>::max();
    cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep);
  }
  ~Lane() {
    cudaStreamSynchronize(stream);
    cudaMemPoolDestroy(pool);
    cudaStreamDestroy(stream);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
};

}  // namespace

void check_cuda(cudaError_t status, const char* call, const Condition& place) {
  if (status == cudaSuccess) return;
  // A failure that is not sticky stays the thread's last error until someone asks for it.
  cudaGetLastError();
  const auto code =
      status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device;
  fail(code, place,
       join(call, " failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status)));
}

DeviceGuard::DeviceGuard(const Device& device) {
  check(device.kind == DeviceKind::cuda, "the context is on the CPU, expected a CUDA device");
  check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
  // Where it is already, too: the driver's functions need a context, which a new thread lacks.
  check_cuda(cudaSetDevice(device.index), "cudaSetDevice");
  changed_ = previous_ != device.index;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(previous_);
}

bool is_capturing(const Context& ctx) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream_of(ctx), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

int architecture(const Device& device) {
  return 10 * properties_of(device).major + properties_of(device).minor;
}
int multiprocessors(const Context& ctx) { return properties_of(ctx.device).multiProcessorCount; }
std::string model(const Device& device) { return properties_of(device).name; }

double time_calls(const Context& ctx, int calls, const std::function<void()>& work) {
  const DeviceGuard guard(ctx.device);
  check(!is_capturing(ctx), ErrorCode::unsupported,
        "the stream is being captured into a graph, but measuring waits for the device");
  const Event begin;
  const Event end;
  check_cuda(cudaEventRecord(begin.event, stream_of(ctx)), "cudaEventRecord");
  for (int call = 0; call < calls; ++call) work();
  check_cuda(cudaEventRecord(end.event, stream_of(ctx)), "cudaEventRecord");
  check_cuda(cudaEventSynchronize(end.event), "cudaEventSynchronize");
  float milliseconds = 0;
  check_cuda(cudaEventElapsedTime(&milliseconds, begin.event, end.event), "cudaEventElapsedTime");
  return milliseconds * 1e-3;
}

void fill_bytes(const Context& ctx, void* data, int value, size_t bytes) {
  if (bytes == 0) return;
  check_cuda(cudaMemsetAsync(data, value, bytes, stream_of(ctx)), "cudaMemsetAsync");
}

void read_back(const Context& ctx, const void* device, void* host, size_t bytes) {
  check(!is_capturing(ctx), ErrorCode::unsupported,
        "the stream is being captured into a graph, but this result's size depends on the data, "
        "which the host must wait for");
  const DeviceGuard guard(ctx.device);
  check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_of(ctx)),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream_of(ctx)), "cudaStreamSynchronize");
}

}  // namespace cuda

Context cuda_context(int index) {
  int devices = 0;
  cuda::check_cuda(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  check(index >= 0 && index < devices, ErrorCode::device, "there is no CUDA device ", index,
        ", the machine has ", devices);
  Context ctx;
  ctx.device = {DeviceKind::cuda, index};
  const cuda::DeviceGuard guard(ctx.device);
  const auto lane = std::make_shared<cuda::Lane>(index);
  ctx.stream = lane->stream;
  ctx.run = [](int workers, const std::function<void(int)>& body) {
    for (int worker = 0; worker < workers; ++worker) body(worker);
  };
  ctx.allocate = [lane](size_t bytes) {
    void* data = nullptr;
    cuda::check_cuda(
        cudaMallocFromPoolAsync(&data, std::max<size_t>(bytes, 1), lane->pool, lane->stream),
        "cudaMallocFromPoolAsync");
    return std::shared_ptr<void>(data,
                                 [lane](void* memory) { cudaFreeAsync(memory, lane->stream); });
  };
  return ctx;
}

void synchronize(const Context& cuda) {
  const cuda::DeviceGuard guard(cuda.device);
  cuda::check_cuda(cudaStreamSynchronize(cuda::stream_of(cuda)), "cudaStreamSynchronize");
}

void copy(const Context& cuda, const MatrixRef& from, const MatrixRef& to) {
  check(from.rows == to.rows && from.cols == to.cols && from.dtype == to.dtype, "cannot copy ",
        from.rows, " x ", from.cols, " ", name(from.dtype), " to ", to.rows, " x ", to.cols, " ",
        name(to.dtype));
  if (from.rows == 0 || from.cols == 0) return;
  const cuda::DeviceGuard guard(cuda.device);
  const size_t size = size_of(from.dtype);
  cuda::check_cuda(
      cudaMemcpy2DAsync(to.data, to.stride * size, from.data, from.stride * size, from.cols * size,
                        from.rows, cudaMemcpyDefault, cuda::stream_of(cuda)),
      "cudaMemcpy2DAsync");
  if (from.device == cuda.device && to.device == cuda.device) return;
  cuda::check_cuda(cudaStreamSynchronize(cuda::stream_of(cuda)), "cudaStreamSynchronize");
}

}  // namespace voxgemm
