// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show nsa-decode-3-lengths-only
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, nsa_cache_seqlens, nsa_cu_seqlens_k
//   distinct                all
//   target                  cuda
//   checked                 False
// key 07858aa8f5e4c3249e030a59c0b275e4a76754d4e88a6a09c30740bd9523cdb4

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr std::int32_t kIndexTopk = 2048;
using SeqLen = std::int64_t;
constexpr int kThreads = 256;  // a block
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kFullMask = 0xffffffffu;

// ---- arguments ---------------------------------------------------------------------------------------------------
// Every member is 64 bits wide, so that the host can fill the block as an array of words. It travels by value: no
// pointer table in device memory, nothing to copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  std::int64_t batch_size;  // requests
  // set when a plan is bound
  std::int64_t device;  // ordinal
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* nsa_cache_seqlens[kBackends];  // [bs]
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 16;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// ---- running sums ------------------------------------------------------------------------------------------------
// Unsigned, because sums wrap at 2^32 as they do in PyTorch's int32, and signed overflow isn't defined.

// The inclusive running sum of `value` over the lanes of a warp, doubling the distance.
__device__ __forceinline__ std::uint32_t warp_running_sum(std::uint32_t value) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::uint32_t other = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  return value;
}

// The same over the threads of the block; `total` gets the block's sum. The warps' totals meet in shared memory: right
// for any block of whole warps, whatever part of it holds requests.
__device__ __forceinline__ std::uint32_t block_running_sum(std::uint32_t value, std::uint32_t& total) {
  __shared__ std::uint32_t warp_totals[kWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const std::uint32_t in_warp = warp_running_sum(value);
  if (static_cast<int>(threadIdx.x % kWarpSize) == kWarpSize - 1) warp_totals[warp] = in_warp;
  __syncthreads();
  std::uint32_t sum = 0;
  std::uint32_t before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = sum;
    sum += warp_totals[w];
  }
  __syncthreads();  // the next sum writes warp_totals again
  total = sum;
  return before + in_warp;
}

// ---- lengths -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk: no limit on the batch.
__device__ void refresh_lengths(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  std::uint32_t cu_seqlens_k_carry = 0;
  std::uint32_t nsa_cu_seqlens_k_carry = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.cu_seqlens_k[b][0] = 0;
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.nsa_cu_seqlens_k[b][0] = 0;
  }
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    // Lengths are int32 in every consumer; a wider input is truncated as tensor.to(torch.int32) does it.
    const std::int32_t length = present ? static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]) : 0;
    const std::int32_t nsa_length = length < kIndexTopk ? length : kIndexTopk;
    std::uint32_t cu_seqlens_k_chunk;
    const std::uint32_t cu_seqlens_k =
        cu_seqlens_k_carry + block_running_sum(static_cast<std::uint32_t>(length), cu_seqlens_k_chunk);
    cu_seqlens_k_carry += cu_seqlens_k_chunk;
    std::uint32_t nsa_cu_seqlens_k_chunk;
    const std::uint32_t nsa_cu_seqlens_k =
        nsa_cu_seqlens_k_carry + block_running_sum(static_cast<std::uint32_t>(nsa_length), nsa_cu_seqlens_k_chunk);
    nsa_cu_seqlens_k_carry += nsa_cu_seqlens_k_chunk;
    if (present) {
#pragma unroll
      for (int b = 0; b < kBackends; ++b) p.cache_seqlens[b][request] = length;
#pragma unroll
      for (int b = 0; b < kBackends; ++b) p.nsa_cache_seqlens[b][request] = nsa_length;
#pragma unroll
      for (int b = 0; b < kBackends; ++b) {
        p.cu_seqlens_k[b][request + 1] = static_cast<std::int32_t>(cu_seqlens_k);
      }
#pragma unroll
      for (int b = 0; b < kBackends; ++b) {
        p.nsa_cu_seqlens_k[b][request + 1] = static_cast<std::int32_t>(nsa_cu_seqlens_k);
      }
    }
  }
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_broadcast_decode_n3_07858aa8f5e4c324(const __grid_constant__ Params p) {
  refresh_lengths(p);
}

}  // namespace

// ---- host side ---------------------------------------------------------------------------------------------------
// Runs `call` with the plan's device as the current one.
template <typename Call>
static cudaError_t on_device(std::int64_t device, const Call& call) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess || current == device) return error != cudaSuccess ? error : call();
  error = cudaSetDevice(static_cast<int>(device));
  if (error != cudaSuccess) return error;
  error = call();
  const cudaError_t restored = cudaSetDevice(current);
  return error != cudaSuccess ? error : restored;
}

extern "C" {

// Launches the kernel once on `stream` with the parameter block in `words`; returns a cudaError_t.
int onelaunch_broadcast_decode_n3_07858aa8f5e4c324_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_07858aa8f5e4c324, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_07858aa8f5e4c324_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_07858aa8f5e4c324);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_07858aa8f5e4c324_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
