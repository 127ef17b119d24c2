// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show sglang-draft-extend-layout
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            1
//   fields                  extend_seq_lens, extend_start_loc, positions, prefix_lens, seq_lens
//   distinct                all
//   target                  cuda
//   checked                 False
//   declare                 extend_seq_lens = vector('draft_tokens', per='request'); extend_start_loc =
//                           vector('request * draft_tokens', per='request'); positions = vector('base_len + row',
//                           dtype='int64', rows=4, pad=0); prefix_lens = vector('base_len', per='request'); seq_lens =
//                           vector('base_len + draft_tokens', per='request', dtype='int64')
//   constants               draft_tokens: 4
// key aa360cc95c96ae6538f1b49d1059fed90ef53a948d316d4386b3ed20a73b805b

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- settings ----------------------------------------------------------------------------------------------------
constexpr int kBackends = 1;
constexpr int kThreads = 256;  // per block
constexpr int kLengthSets = 1;  // lengths per request: one for all backends, or one per backend
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
constexpr std::int32_t user_draft_tokens = 4;  // declared

// ---- arguments ---------------------------------------------------------------------------------------------------
// Every member is 64 bits wide, so that the host can fill the block as an array of words. It is passed by value, which
// needs no pointer table in device memory and no copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t captured_size;  // requests, padding included
  // set when a plan is bound
  std::int64_t device;  // ordinal
  std::int32_t* user_extend_seq_lens[kBackends];  // [bs]
  std::int32_t* user_extend_start_loc[kBackends];  // [bs]
  std::int64_t* user_positions[kBackends];  // [bs * 4]
  std::int32_t* user_prefix_lens[kBackends];  // [bs]
  std::int64_t* user_seq_lens[kBackends];  // [bs]
};
constexpr int kParamWords = 10;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// Every consumer reads int32 lengths; a wider input is truncated, as by tensor.to(torch.int32).
__device__ __forceinline__ std::int32_t request_length(const Params& p, std::int64_t request) {
  const SeqLen length = p.seq_lens[request * p.seq_lens_stride];
  return static_cast<std::int32_t>(length);
}

// The offset that every backend adds to seq_lens.
__device__ __forceinline__ std::int32_t length_offset(int) {
  return kLongestOffset;
}

// ---- destinations ------------------------------------------------------------------------------------------------
// The unroll factor of a loop over destinations: a few are unrolled fully, many not at all, to keep the code short.
[[maybe_unused]] __host__ __device__ constexpr int unrolled(int destinations) {
  return destinations <= 8 ? destinations : 1;
}

// ---- writing an element ------------------------------------------------------------------------------------------
// What writes 16 bytes at once stores them itself.
template <typename T>
__device__ __forceinline__ void put(T* address, std::common_type_t<T> value) {
  *address = value;
}

// ---- storing an element ------------------------------------------------------------------------------------------
// Stores one element of a vector or a schedule to every backend; where the backends' lengths differ, to backend b.
// The destinations decide the type: to a bool goes whether the value isn't 0.
template <typename T, int N>
__device__ __forceinline__ void store(T* const (&to)[N], int b, std::int64_t index, std::common_type_t<T> value) {
  if constexpr (kLengthSets > 1) {
    put(to[b] + index, value);
  } else {
#pragma unroll(unrolled(N))
    for (int i = 0; i < N; ++i) put(to[i] + index, value);
  }
}

// ---- arithmetic that wraps ---------------------------------------------------------------------------------------
// wrap(bits(a) + b) is a sum that wraps at 2^32, as PyTorch's int32 does; signed overflow is undefined in C++.
template <typename T>
__device__ __forceinline__ std::make_unsigned_t<T> bits(T value) {
  return static_cast<std::make_unsigned_t<T>>(value);
}

template <typename T>
__device__ __forceinline__ std::make_signed_t<T> wrap(T value) {
  return static_cast<std::make_signed_t<T>>(value);
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int32_t user_extend_start_loc = wrap(bits(request) * user_draft_tokens);
    const std::int64_t user_seq_lens = wrap(bits(std::int64_t{base_len}) + user_draft_tokens);
    if (!present) continue;
    store(p.user_extend_seq_lens, b, request, user_draft_tokens);
    store(p.user_extend_start_loc, b, request, user_extend_start_loc);
    store(p.user_prefix_lens, b, request, base_len);
    store(p.user_seq_lens, b, request, user_seq_lens);
    for (int row = 0; row < 4; ++row) {
      const std::int64_t user_positions = wrap(bits(std::int64_t{base_len}) + row);
      store(p.user_positions, b, std::int64_t{request} * 4 + row, user_positions);
    }
  }
  // Padding, up to the captured size.
  for (std::int64_t request = batch_size + threadIdx.x; request < p.captured_size; request += kThreads) {
    for (int row = 0; row < 4; ++row) store(p.user_positions, b, request * 4 + row, 0);
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_broadcast_decode_n1_aa360cc95c96ae65(const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return refresh_vectors(p, block);
}

// ---- host side ---------------------------------------------------------------------------------------------------
// Runs `call` while `device` is the current device.
template <typename Call>
cudaError_t on_device(std::int64_t device, const Call& call) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess || current == device) return error != cudaSuccess ? error : call();
  error = cudaSetDevice(static_cast<int>(device));
  if (error != cudaSuccess) return error;
  error = call();
  const cudaError_t restored = cudaSetDevice(current);
  return error != cudaSuccess ? error : restored;
}

}  // namespace

extern "C" {

// Launches the kernel once on `stream` with the parameter block in `words`; returns a cudaError_t.
int onelaunch_broadcast_decode_n1_aa360cc95c96ae65_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kFirstTableBlock, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n1_aa360cc95c96ae65, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n1_aa360cc95c96ae65_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n1_aa360cc95c96ae65);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n1_aa360cc95c96ae65_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
