// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show flashinfer-decode-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  kv_indptr, kv_indices
//   distinct                all
//   target                  cuda
//   checked                 False
//   seqlen_offsets          1, 2, 3
// key 567ba8e3cc7b9b8541fac0a0a18966dec6e82fa4b2ad24dfad80c1b6edfd89b4

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr std::int32_t kLongestOffset = 3;  // the most that a backend's lengths have more than seq_lens
using SeqLen = std::int64_t;
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kThreads = 256;  // a block
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kBlocksPerSm = 4;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // groups of four words that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // one warp's share of a row
constexpr int kLengthBlocks = kBackends;  // block b writes the lengths of backend b, the rest the tables

// ---- arguments ---------------------------------------------------------------------------------------------------
struct Table {
  std::int32_t* data;
  std::int64_t row_stride;  // elements
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It travels by value: no
// pointer table in device memory, nothing to copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  const PoolIndex* req_pool_indices;  // [batch_size], rows of req_to_token
  std::int64_t req_pool_indices_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t columns;  // no column from here on is written
  // set when a plan is bound
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // multiprocessors of the device
  std::int64_t kv_indices_capacity;  // elements
  std::int32_t* kv_indptr[kBackends];  // [bs + 1]
  std::int32_t* kv_indices[kBackends];  // [capacity]
};
constexpr int kParamWords = 17;
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

// The same for what may not wrap.
__device__ __forceinline__ std::uint64_t warp_running_sum(std::uint64_t value) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::uint64_t other = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  return value;
}

__device__ __forceinline__ std::uint64_t block_running_sum(std::uint64_t value, std::uint64_t& total) {
  __shared__ std::uint64_t warp_totals[kWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const std::uint64_t in_warp = warp_running_sum(value);
  if (static_cast<int>(threadIdx.x % kWarpSize) == kWarpSize - 1) warp_totals[warp] = in_warp;
  __syncthreads();
  std::uint64_t sum = 0;
  std::uint64_t before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = sum;
    sum += warp_totals[w];
  }
  __syncthreads();  // the next sum writes warp_totals again
  total = sum;
  return before + in_warp;
}

// ---- requests ----------------------------------------------------------------------------------------------------
// What the lengths of backend b have more than seq_lens. Static: an array that a block indexes would be on its stack.
__device__ __forceinline__ std::int32_t length_offset(int b) {
  static constexpr std::int32_t offsets[kBackends] = {1, 2, 3};
  return offsets[b];
}

// ---- lengths -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk: no limit on the batch.
__device__ void refresh_lengths(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  std::uint32_t kv_indptr_carry = 0;
  if (threadIdx.x == 0) {
    p.kv_indptr[b][0] = 0;
  }
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    // Lengths are int32 in every consumer; a wider input is truncated as tensor.to(torch.int32) does it.
    const std::int32_t seq_len = present ? static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]) : 0;
    // A length below zero counts as no tokens, so that requests never overlap.
    const std::uint32_t more = static_cast<std::uint32_t>(length_offset(b));
    const std::uint32_t kv_length = present ? static_cast<std::uint32_t>(seq_len > 0 ? seq_len : 0) + more : 0;
    std::uint32_t kv_indptr_chunk;
    const std::uint32_t kv_indptr = kv_indptr_carry + block_running_sum(kv_length, kv_indptr_chunk);
    kv_indptr_carry += kv_indptr_chunk;
    if (present) {
      p.kv_indptr[b][request + 1] = static_cast<std::int32_t>(kv_indptr);
    }
  }
}

// ---- the tokens of all requests, one after the other -------------------------------------------------------------
// Where a request's tokens go depends on the lengths of all requests before it. Every block adds those up for itself,
// beside the tiles that it counts anyhow, and carries the sum from window to window: no block waits for another, and
// the sum has no limit. Nothing is written beyond the destinations' capacity.

// The tokens of a request, without what backends have more.
__device__ __forceinline__ std::int32_t request_tokens(const Params& p, int request) {
  const std::int32_t length = static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]);
  return length > 0 ? length : 0;
}

// The tokens of a request that are read for a backend whose lengths have so many `more`.
__device__ __forceinline__ int read_columns(const Params& p, std::int32_t tokens, std::int32_t more) {
  const std::int64_t length = std::int64_t{tokens} + more;
  return static_cast<int>(length < p.columns ? length : p.columns);
}

// One warp reads the columns [first, first + kTileColumns) of a row once, and writes them to every backend. There are
// `before` tokens of the requests before.
__device__ __forceinline__ void copy_indices(
    const Params& p, std::int64_t request, std::int64_t pool_row, std::int64_t before, std::int32_t tokens, int first) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int end = read_columns(p, tokens, kLongestOffset);
  constexpr int kWords = kTileColumns / kWarpSize;
  std::int32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int column = first + lane + i * kWarpSize;
    words[i] = column < end ? static_cast<std::int32_t>(__ldg(source + column)) : 0;
  }
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    const int end_of_b = read_columns(p, tokens, length_offset(b));
    const std::int64_t begin = before + request * length_offset(b);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int column = first + lane + i * kWarpSize;
      const std::int64_t at = begin + column;
      if (column < end_of_b && at < p.kv_indices_capacity) p.kv_indices[b][at] = words[i];
    }
  }
}

__device__ void gather_indices(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int slot = static_cast<int>(threadIdx.x);
  const int lane = slot % kWarpSize;
  const std::uint32_t warps = (gridDim.x - kLengthBlocks) * kWarps;
  std::uint32_t tile = (blockIdx.x - kLengthBlocks) * kWarps + threadIdx.x / kWarpSize;
  __shared__ std::uint32_t tile_end[kThreads];  // tiles up to and with a request of the window
  __shared__ std::int32_t window_tokens[kThreads];
  __shared__ std::uint64_t tokens_before[kThreads];
  __shared__ std::int64_t pool_rows[kThreads];
  static_assert(kWarps <= kWarpSize, "one lane looks after each warp");
  std::uint64_t carry = 0;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int asked = first + slot;
    std::int32_t tokens = 0;
    std::uint32_t tiles = 0;
    std::int64_t pool_row = 0;
    if (asked < batch_size) {
      tokens = request_tokens(p, asked);
      const int columns = read_columns(p, tokens, kLongestOffset);
      if (columns > 0) tiles = static_cast<std::uint32_t>((columns - 1) / kTileColumns + 1);
      pool_row = p.req_pool_indices[asked * p.req_pool_indices_stride];
    }
    std::uint64_t tokens_of_window;
    const std::uint64_t tokens_end = carry + block_running_sum(static_cast<std::uint64_t>(tokens), tokens_of_window);
    carry += tokens_of_window;
    std::uint32_t window_tiles;
    // Behind the sums' barriers nobody is at the last window any more.
    tile_end[slot] = block_running_sum(tiles, window_tiles);
    pool_rows[slot] = pool_row;
    window_tokens[slot] = tokens;
    tokens_before[slot] = tokens_end - static_cast<std::uint64_t>(tokens);
    __syncthreads();
    for (; tile < window_tiles; tile += warps) {
      // Whose tile it is: how many warps, then how many of the next warp's requests, end at or before it.
      const bool passed_warp = lane < kWarps && tile_end[lane * kWarpSize + kWarpSize - 1] <= tile;
      const int group = __popc(__ballot_sync(kFullMask, passed_warp));
      const int passed = __popc(__ballot_sync(kFullMask, tile_end[group * kWarpSize + lane] <= tile));
      const int found = group * kWarpSize + passed;
      const std::uint32_t in_row = tile - (found > 0 ? tile_end[found - 1] : 0);
      const std::int64_t before = static_cast<std::int64_t>(tokens_before[found]);
      const int column = static_cast<int>(in_row) * kTileColumns;
      copy_indices(p, first + found, pool_rows[found], before, window_tokens[found], column);
    }
    tile -= window_tiles;  // the tiles of the next window follow on, so that no warp gets ahead
  }
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85(const __grid_constant__ Params p) {
  if (blockIdx.x < kLengthBlocks) {
    refresh_lengths(p, static_cast<int>(blockIdx.x));
  } else {
    gather_indices(p);
  }
}

}  // namespace

// ---- host side ---------------------------------------------------------------------------------------------------
// As many blocks as the tables could need, up to a number that suits the device.
static unsigned grid_blocks(const Params& p) {
  std::int64_t tiles = 0;
  tiles += p.batch_size * ((p.columns + kVectorWords - 2) / kTileColumns + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const std::int64_t most = p.sm_count * kBlocksPerSm;
  const std::int64_t blocks = wanted < most ? wanted : most;
  return static_cast<unsigned>(kLengthBlocks + (blocks > 1 ? blocks : 1));
}

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
int onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid_blocks(params), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
