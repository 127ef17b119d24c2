// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show flashmla-decode-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, real_page_table
//   distinct                all
//   target                  cuda
//   checked                 False
//   page_fill               -1
// key 44bc678e2472d90ce476b513b798a6ce7a3300a0ebc982332ad48e4468863bb5

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kPageSize = 64;  // tokens
constexpr std::int32_t kPageFill = -1;  // in columns that aren't live
using SeqLen = std::int64_t;
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kThreads = 256;  // a block
constexpr int kResidentBlocks = 4;  // of a multiprocessor at least: 64 registers a thread
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // groups of four words that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // one warp's share of a row
constexpr int kSpreadTiles = 16;  // a multiprocessor: with fewer half of each block's warps take them
constexpr int kLengthBlocks = 1;  // block 0 writes the lengths, the others the tables

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
  Table real_page_table[kBackends];  // [bs, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // multiprocessors of the device
  std::int64_t real_page_table_width;  // columns
  std::int32_t* cache_seqlens[kBackends];  // [bs]
};
constexpr int kParamWords = 20;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// ---- lengths -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk: no limit on the batch.
__device__ void refresh_lengths(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    // Lengths are int32 in every consumer; a wider input is truncated as tensor.to(torch.int32) does it.
    const std::int32_t length = present ? static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]) : 0;
    if (present) {
#pragma unroll
      for (int b = 0; b < kBackends; ++b) p.cache_seqlens[b][request] = length;
    }
  }
}

// ---- one tile of a table row -------------------------------------------------------------------------------------
// The page of a token, rounded down for padding tokens below zero too.
__device__ __forceinline__ std::int32_t page_of(Token token) {
  return static_cast<std::int32_t>(token >> 6);
}

// One warp writes the pages [first, first + kTileColumns), as far as they lie in [0, end): the token that begins each
// page is read once, and its page written to every backend.
__device__ __forceinline__ void write_pages(
    const Params& p, std::int64_t row, const Token* source, int first, int end) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  constexpr int kWords = kTileColumns / kWarpSize;
  std::int32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int page = first + lane + i * kWarpSize;
    words[i] = page < end ? page_of(__ldg(source + static_cast<std::int64_t>(page) * kPageSize)) : kPageFill;
  }
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    std::int32_t* to = p.real_page_table[b].data + row * p.real_page_table[b].row_stride;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int page = first + lane + i * kWarpSize;
      if (page < p.real_page_table_width) to[page] = words[i];
    }
  }
}

// Everything that one tile of a request's row needs: `end` is the first column that isn't live.
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, int end) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  write_pages(p, row, source, first, end);
}

// ---- which warp takes which tile ---------------------------------------------------------------------------------
// What the host works out for a launch: dividing by a number that isn't a constant takes a thread dozens of
// instructions, one after the other.
struct Split {
  std::uint32_t tiles;  // of a row
  std::uint32_t warps;  // of a block that take tiles
  std::uint64_t reciprocal;  // (2^64 - 1) / tiles
};

// The columns of a request that its length makes live, in pages.
__device__ __forceinline__ int live_columns(const Params& p, std::uint32_t request) {
  const std::int32_t length = static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]);
  const int most = static_cast<int>(p.columns);
  const int columns = length < 0 ? 0 : length < most ? length : most;
  return columns / kPageSize + (columns % kPageSize != 0);
}

// Every row is written to its end: each warp takes one tile of equal rows. A loop would have the compiler
// fetch the constants of all destinations before the first read.
__device__ void gather_tables(const Params& p, const Split& split) {
  const int columns = static_cast<int>(p.real_page_table_width);
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  if (warp >= split.warps) return;
  // 32 bits hold the count of tiles of any table that fits a device.
  const std::uint32_t tile = (blockIdx.x - kLengthBlocks) * split.warps + warp;
  const std::int64_t row = __umul64hi(std::uint64_t{tile} + 1, split.reciprocal);  // tile / tiles of a row
  const std::uint32_t in_row = tile - static_cast<std::uint32_t>(row) * split.tiles;
  const int column = static_cast<int>(in_row) * kTileColumns;
  if (row >= p.batch_size || column >= columns) return;
  const std::int64_t pool_row = p.req_pool_indices[row * p.req_pool_indices_stride];
  const int end = live_columns(p, static_cast<int>(row));
  copy_tile(p, row, pool_row, column, end);
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n3_44bc678e2472d90c(
    const __grid_constant__ Split split, const __grid_constant__ Params p) {
  if (blockIdx.x < kLengthBlocks) {
    refresh_lengths(p);
  } else {
    gather_tables(p, split);
  }
}

}  // namespace

// ---- host side ---------------------------------------------------------------------------------------------------
static Split split_of(const Params& p) {
  const std::int64_t columns = p.real_page_table_width;
  const std::int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  // Where there are few tiles half of a block's warps take them, so that twice as many blocks take part.
  const bool few = p.batch_size * tiles < p.sm_count * kSpreadTiles;
  return {
      static_cast<std::uint32_t>(tiles),
      static_cast<std::uint32_t>(few ? (kWarps + 1) / 2 : kWarps),
      ~std::uint64_t{0} / static_cast<std::uint64_t>(tiles > 0 ? tiles : 1),
  };
}

// As many blocks as the tables need.
static unsigned grid_blocks(const Params& p, const Split& split) {
  const std::int64_t tiles = p.batch_size * std::int64_t{split.tiles};
  const std::int64_t blocks = (tiles + split.warps - 1) / split.warps;
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
int onelaunch_broadcast_decode_n3_44bc678e2472d90c_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    const unsigned blocks = grid_blocks(params, split);
    config.gridDim = dim3(blocks, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_44bc678e2472d90c, split, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_44bc678e2472d90c_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_44bc678e2472d90c);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_44bc678e2472d90c_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
