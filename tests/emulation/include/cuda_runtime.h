// The emulation prelude: the CUDA names that emitted kernels use, for a host compiler. It is found in place of CUDA's
// own <cuda_runtime.h>, so the emitted source is compiled as it is. driver.cpp runs what is declared here.
//
// Every CUDA thread is a thread of its own to the sanitizers. What CUDA orders is ordered here and no more: __syncthreads
// and __syncwarp are visible to ThreadSanitizer, while shuffles and votes, which imply no memory barrier on a GPU,
// exchange their values behind its back. An intrinsic that isn't here doesn't compile, which is the point: add it with its
// checks, and a case that fails without it to faults/.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

using std::max;
using std::min;

// ---- what the driver provides --------------------------------------------------------------------------------------
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
using cudaStream_t = struct CUstream_st*;

namespace emulation {

constexpr int kWarp = 32;

// The lane of the calling thread.
int lane();

// One value of each lane of a warp; those outside the mask are zero.
struct Lanes {
  std::uint64_t value[kWarp];
};

// All threads of the block meet; true if one of them votes yes. `line` tells barriers apart: threads that wait at two of
// them are an error.
bool barrier(int line, bool yes = false);

// The lanes in `mask` meet and see one another's value. They must all come, with the same mask, operation and line.
// `orders` says whether the operation orders memory too.
Lanes exchange(const char* operation, int line, unsigned mask, std::uint64_t value, bool orders);

// Stops the run unless the bytes are constant while the kernel runs, as the read-only data path requires.
void check_constant(const void* address, std::size_t bytes, int line);

// Stops the run: the program did what CUDA leaves undefined.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Launch {
  dim3 grid, block;
  std::size_t dynamic_shared_bytes;
  std::size_t parameter_bytes;
  cudaStream_t stream;
  std::function<void()> thread;  // the kernel with its arguments, as one thread runs it
};
int launch(Launch launch);
int device();
int set_device(int device);

template <typename T>
std::uint64_t pack(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(std::uint64_t), "CUDA exchanges arithmetic types only");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T unpack(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of another lane, which must be in the mask: the value of any other lane is undefined.
template <typename T>
T take(const char* operation, int line, unsigned mask, T value, int from) {
  const Lanes lanes = exchange(operation, line, mask, pack(value), false);
  if (!(mask >> from & 1u)) fail("%s, line %d: lane %d isn't in the mask 0x%08x", operation, line, from, mask);
  return unpack<T>(lanes.value[from]);
}

inline unsigned vote(const char* operation, int line, unsigned mask, bool yes) {
  const Lanes lanes = exchange(operation, line, mask, yes, false);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<unsigned>(lanes.value[lane]) << lane;
  return votes;
}

}  // namespace emulation

// ---- qualifiers ----------------------------------------------------------------------------------------------------
#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
// Static, and so one copy for each copy of the object file: every block of a grid runs on its own (see harness.py).
// The section's name lets the driver fill the variables with garbage before a block starts, as a GPU does.
#define __shared__ __attribute__((section("emulated_shared"))) static

// ---- built-in variables and vector types ---------------------------------------------------------------------------
// The driver sets them whenever it switches threads, which it does only inside the functions that it provides.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) int4 {
  int x, y, z, w;
};

// ---- intrinsics. The line is the caller's ---------------------------------------------------------------------------
inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emulation::barrier(line, predicate != 0) ? 1 : 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::exchange("__syncwarp", line, mask, 0, true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return emulation::take("__shfl_sync", line, mask, value, lane & (emulation::kWarp - 1));
}

// A lane without a source lane that far below it keeps its own value.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned lane = static_cast<unsigned>(emulation::lane());
  return emulation::take("__shfl_up_sync", line, mask, value, static_cast<int>(lane >= delta ? lane - delta : lane));
}

inline unsigned __ballot_sync(unsigned mask, bool yes, int line = __builtin_LINE()) {
  return emulation::vote("__ballot_sync", line, mask, yes);
}

// The lanes of the mask only.
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  const emulation::Lanes lanes = emulation::exchange("__reduce_xor_sync", line, mask, value, false);
  unsigned all = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) all ^= static_cast<unsigned>(lanes.value[lane]);
  return all;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  const emulation::Lanes lanes = emulation::exchange("__reduce_add_sync", line, mask, value, false);
  unsigned all = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) all += static_cast<unsigned>(lanes.value[lane]);
  return all;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  const emulation::Lanes lanes = emulation::exchange("__reduce_max_sync", line, mask, value, false);
  unsigned all = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane) all = std::max(all, static_cast<unsigned>(lanes.value[lane]));
  return all;
}

// The complements of lanes that aren't in the mask are 0.
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return ~__reduce_max_sync(mask, ~value, line);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline std::uint64_t __umul64hi(std::uint64_t a, std::uint64_t b) {
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

// Atomic only: like CUDA's, it doesn't order other accesses.
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// An ordinary read, so the sanitizers see it, of memory that nothing writes during the launch.
template <typename T>
T __ldg(const T* address, int line = __builtin_LINE()) {
  emulation::check_constant(address, sizeof(T), line);
  return *address;
}

// ---- host side -----------------------------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return static_cast<cudaError_t>(emulation::set_device(device)); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  static_assert(std::is_function_v<Kernel>, "cudaFuncGetAttributes takes a kernel");
  attributes->maxThreadsPerBlock = kernel != nullptr ? 1024 : 0;
  return cudaSuccess;
}

// Every thread gets the arguments by value, from one copy made here.
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  std::tuple<std::decay_t<Expected>...> arguments(std::forward<Actual>(actual)...);
  return static_cast<cudaError_t>(emulation::launch(
      {config->gridDim, config->blockDim, config->dynamicSmemBytes, (std::size_t{0} + ... + sizeof(Expected)),
       config->stream, [kernel, arguments] { std::apply(kernel, arguments); }}));
}
