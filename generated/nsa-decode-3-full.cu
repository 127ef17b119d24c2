// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show nsa-decode-3-full
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, page_indices, nsa_cache_seqlens, nsa_cu_seqlens_k,
//                           real_page_table
//   distinct                all
//   target                  cuda
//   checked                 False
//   extent                  full
// key 23226b7e64a25b9b969461478171172ad63dc1f180bd1504ac268c0d6afe5f78

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr std::int32_t kIndexTopk = 2048;
constexpr int kPageSize = 64;  // tokens
using SeqLen = std::int64_t;
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kThreads = 256;  // a block
constexpr int kResidentBlocks = 4;  // of a multiprocessor at least: 64 registers a thread
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // one warp's share of a row
constexpr int kWideTiles = 2;  // that a warp takes at once in large tables
constexpr int kWideFrom = 12;  // tiles a multiprocessor
constexpr int kSpreadTiles = 16;  // a multiprocessor: with fewer half of each block's warps take them
constexpr int kTileAlignment = 32;  // words, a 128-byte line
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
  std::int64_t req_to_token_width;  // elements of a row that may be read
  Table page_indices[kBackends];  // [bs, W]
  Table real_page_table[kBackends];  // [bs, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // multiprocessors of the device
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* nsa_cache_seqlens[kBackends];  // [bs]
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 35;
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

// ---- one tile of a table row -------------------------------------------------------------------------------------
// The four words that begin `shift` words into low and high, for shift from 0 to 3. Selects instead of an indexed
// array, which would live in local memory.
__device__ __forceinline__ int4 realign(int4 low, int4 high, int shift) {
  if (shift & 2) {
    low.x = low.z;
    low.y = low.w;
    low.z = high.x;
    low.w = high.y;
    high.x = high.z;
  }
  if (shift & 1) {
    low.x = low.y;
    low.y = low.z;
    low.z = low.w;
    low.w = high.x;
  }
  return low;
}

// One of four words, without an indexed array either.
__device__ __forceinline__ std::int32_t word_of(int4 words, int number) {
  const std::int32_t even = number & 2 ? words.z : words.x;
  const std::int32_t odd = number & 2 ? words.w : words.y;
  return number & 1 ? odd : even;
}

// An address that words are read from by their distance. Left to itself the compiler works out one for each word.
__device__ __forceinline__ const std::int32_t* kept(const std::int32_t* address) {
  asm("" : "+l"(address));
  return address;
}

// The 16-byte boundary at or before an address.
__device__ __forceinline__ const int4* boundary_before(const std::int32_t* address) {
  return reinterpret_cast<const int4*>(reinterpret_cast<std::uintptr_t>(address) / sizeof(int4) * sizeof(int4));
}

// How many words an address lies past it, 0 to 3.
__device__ __forceinline__ int words_past_boundary(const std::int32_t* address) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) / sizeof(std::int32_t) % kVectorWords);
}

// The page of a token, rounded down for padding tokens below zero too.
__device__ __forceinline__ std::int32_t page_of(Token token) {
  return static_cast<std::int32_t>(token >> 6);
}

__device__ __forceinline__ void write_page(const Params& p, std::int64_t row, int page, Token token) {
  const std::int32_t number = page_of(token);
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    p.real_page_table[b].data[row * p.real_page_table[b].row_stride + page] = number;
  }
}

// Writes the pages that begin in a tile which lies inside the row, from the registers that hold its tokens.
template <int kAccesses>
__device__ __forceinline__ void write_held_pages(
    const Params& p, std::int64_t row, const int4 (&words)[kAccesses], int first) {
  constexpr int kGroup = kWarpSize * kVectorWords;  // columns that the warp holds in each of its words
  static_assert(kPageSize % kVectorWords == 0 && kAccesses * kGroup <= kWarpSize * kPageSize);
  const int before = -first & (kPageSize - 1);  // columns of the tile that belong to the page before
  // Where in the tile the page begins that this lane writes, and which lane holds its token.
  const int column = before + static_cast<int>(threadIdx.x % kWarpSize) * kPageSize;
  const int holder = column / kVectorWords % kWarpSize;
  std::int32_t token = 0;
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    const std::int32_t found = __shfl_sync(kFullMask, word_of(words[u], before % kVectorWords), holder);
    if (column / kGroup == u) token = found;
  }
  if (column < kAccesses * kGroup) {
    write_page(p, row, (first + column) / kPageSize, token);
  }
}

// One warp reads kTiles tiles of a row once, from column `first` on as far as they lie in [0, end), and writes them to
// every backend. `first` counts from a 16-byte boundary of the destination row, so it can be negative.
// `width` is how far the source row may be read.
// Returns whether it wrote the pages that begin there, too.
template <int kTiles>
__device__ __forceinline__ bool copy_columns(
    const Params& p, std::int64_t row, const Token* source, int first, int end, int width) {
  constexpr int kAccesses = kTiles * kUnroll;
  constexpr int kColumns = kTiles * kTileColumns;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int column = first + lane * kVectorWords;
  const int shift = words_past_boundary(source + column);  // the same in all lanes
  // Inside the row, with room for the words that realigning reads on either side, if it has to: 16-byte accesses
  // throughout.
  const int behind = shift > 0 ? kVectorWords - shift : 0;
  if (first >= shift && first + kColumns <= end && first + kColumns + behind <= width) {
    const int next = shift > 0 ? 1 : 0;
    const int4* aligned = boundary_before(source + column);
    int4 words[kAccesses];
    int4 high[kAccesses];
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + next);
    }
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) words[u] = realign(words[u], high[u], shift);
#pragma unroll
    for (int b = 0; b < kBackends; ++b) {
      int4* to = reinterpret_cast<int4*>(p.page_indices[b].data + row * p.page_indices[b].row_stride + column);
#pragma unroll
      for (int u = 0; u < kAccesses; ++u) to[u * kWarpSize] = words[u];
    }
    write_held_pages(p, row, words, first);
    return true;
  }
  // An edge of the row: single words, still one coalesced access a warp.
  constexpr int kWords = kColumns / kWarpSize;
  std::int32_t words[kWords];
  // Compared without a sign, what lies before the row lies behind it too.
  const unsigned edge = static_cast<unsigned>(first + lane);
  const Token* from = kept(source + (first + lane));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = edge + i * kWarpSize < static_cast<unsigned>(end);
    words[i] = inside ? static_cast<std::int32_t>(__ldg(from + i * kWarpSize)) : 0;
  }
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    std::int32_t* to = p.page_indices[b].data + row * p.page_indices[b].row_stride + (first + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (edge + i * kWarpSize < static_cast<unsigned>(end)) to[i * kWarpSize] = words[i];
    }
  }
  return false;
}

// Everything that one tile of a request's row needs: `end` is the first column that isn't written.
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, int end) {
  constexpr int kColumns = kTiles * kTileColumns;
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  if (copy_columns<kTiles>(p, row, source, first, end, static_cast<int>(p.req_to_token_width))) return;
  // The pages that begin in the tile. Their numbers come from req_to_token, never from a table that other threads are
  // writing.
  const unsigned begin = static_cast<unsigned>(first > 0 ? first : 0);
  const unsigned stop = static_cast<unsigned>(first + kColumns < end ? first + kColumns : end);
  const unsigned stop_page = (stop - 1) / kPageSize + 1;
  const unsigned page = (begin + kPageSize - 1) / kPageSize + threadIdx.x % kWarpSize;
  if (page < stop_page) {
    write_page(p, row, static_cast<int>(page), __ldg(source + static_cast<std::int64_t>(page) * kPageSize));
  }
}

// ---- which warp takes which tile ---------------------------------------------------------------------------------
// What the host works out for a launch: dividing by a number that isn't a constant takes a thread dozens of
// instructions, one after the other.
struct Split {
  std::uint32_t tiles;  // of a row
  std::int32_t tile_columns;  // kTileColumns, or kWideTiles times as many
  std::uint32_t warps;  // of a block that take tiles
  std::uint64_t reciprocal;  // (2^64 - 1) / tiles
};

// Tiles begin at boundaries of kTileAlignment words in the first backend's row, which lie this many columns before
// column 0. Modulo 16 bytes all backends agree on it: a plan whose destinations don't is bound to a
// kernel with 4-byte stores.
__device__ __forceinline__ int row_lead(const Params& p, std::int64_t row) {
  const std::int32_t* begin = p.page_indices[0].data + row * p.page_indices[0].row_stride;
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(std::int32_t) % kTileAlignment);
}

// Every row has max_len columns: each warp takes one tile of equal rows. A loop would have the compiler
// fetch the constants of all destinations before the first read.
__device__ void gather_tables(const Params& p, const Split& split) {
  const int columns = static_cast<int>(p.columns);
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  if (warp >= split.warps) return;
  // 32 bits hold the count of tiles of any table that fits a device.
  const std::uint32_t tile = (blockIdx.x - kLengthBlocks) * split.warps + warp;
  const std::int64_t row = __umul64hi(std::uint64_t{tile} + 1, split.reciprocal);  // tile / tiles of a row
  const std::uint32_t in_row = tile - static_cast<std::uint32_t>(row) * split.tiles;
  const int column = static_cast<int>(in_row) * split.tile_columns - row_lead(p, row);
  if (row >= p.batch_size || column >= columns || columns <= 0) return;
  const std::int64_t pool_row = p.req_pool_indices[row * p.req_pool_indices_stride];
  if (split.tile_columns > kTileColumns) {
    copy_tile<kWideTiles>(p, row, pool_row, column, columns);
  } else {
    copy_tile<1>(p, row, pool_row, column, columns);
  }
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n3_23226b7e64a25b9b(
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
  const std::int64_t columns = p.columns;
  // A warp takes more at once where there is enough for all warps.
  const bool wide = p.batch_size * columns >= p.sm_count * kWideFrom * kTileColumns;
  const std::int64_t tile_columns = wide ? kWideTiles * kTileColumns : kTileColumns;
  // Rows that all begin at a boundary have no lead.
  const Table& table = p.page_indices[0];
  const std::uint64_t begin = reinterpret_cast<std::uintptr_t>(table.data) / sizeof(std::int32_t);
  const std::uint64_t stride = static_cast<std::uint64_t>(table.row_stride);
  const bool aligned = begin % kTileAlignment == 0 && stride % kTileAlignment == 0;
  const std::int64_t tiles = (columns + (aligned ? 0 : kTileAlignment - 1) - 1) / tile_columns + 1;
  // Where there are few tiles half of a block's warps take them, so that twice as many blocks take part.
  const bool few = p.batch_size * tiles < p.sm_count * kSpreadTiles;
  return {
      static_cast<std::uint32_t>(tiles),
      static_cast<std::int32_t>(tile_columns),
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
int onelaunch_broadcast_decode_n3_23226b7e64a25b9b_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    const unsigned blocks = grid_blocks(params, split);
    config.gridDim = dim3(blocks, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_23226b7e64a25b9b, split, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_23226b7e64a25b9b_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_23226b7e64a25b9b);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_23226b7e64a25b9b_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
