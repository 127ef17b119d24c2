// ---- CPU target: the CUDA names that the code below uses. A block is one thread; blocks run one after another ----
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

namespace {

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct __attribute__((aligned(16), may_alias)) int4 {
  int x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes, localSizeBytes;
  int numRegs;
};

constexpr dim3 threadIdx(0, 0, 0);
thread_local dim3 blockIdx;
thread_local dim3 gridDim;

inline void __syncthreads() {}
inline int __syncthreads_or(int predicate) {
  return predicate;
}

inline void __syncwarp() {}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  return value;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return value;
}

inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return value;
}

inline unsigned __reduce_xor_sync(unsigned, unsigned value) {
  return value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return vote ? 1u : 0u;
}

template <typename T>
T __shfl_sync(unsigned, T value, int) {
  return value;
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned) {
  return value;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

inline std::uint64_t __umul64hi(std::uint64_t a, std::uint64_t b) {
  return static_cast<std::uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T found = *address;
  if (found == expected) *address = value;
  return found;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Arguments...), const Arguments&... arguments) {
  gridDim = config->gridDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) kernel(arguments...);
  return cudaSuccess;
}

}  // namespace
