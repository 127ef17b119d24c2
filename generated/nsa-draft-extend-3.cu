// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show nsa-draft-extend-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    draft_extend
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, page_indices, nsa_cache_seqlens, nsa_cu_seqlens_k,
//                           real_page_table, seqlens_expanded
//   distinct                all
//   target                  cuda
//   checked                 False
//   next_n                  4
// key 9efabc8fab0c2c82157bda0f9e50e713a4b97ede301d3c7cbd11ed7e7b894098

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kNextN = 4;  // rows of a request
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
constexpr int kBlocksPerSm = 4;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // one warp's share of a row
constexpr int kSpreadRounds = 3;  // requests that all blocks reach the end of in so many are spread over more of them
constexpr int kManyBlocks = 8;  // for each request: then what is left is spread over all blocks, too
constexpr std::uint32_t kNearWarps = kWarps < 2 ? kWarps : 2;  // take neighbouring tiles where there is little to do
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
  Table page_indices[kBackends];  // [R, W]
  Table real_page_table[kBackends];  // [R, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // multiprocessors of the device
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* nsa_cache_seqlens[kBackends];  // [R]
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [R + 1]
  std::int32_t* seqlens_expanded[kBackends];  // [R]
};
constexpr int kParamWords = 38;
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

// ---- requests ----------------------------------------------------------------------------------------------------
// The rows of a request, in the tables and in the fields with an element a row.
struct Rows {
  std::int64_t first, stop;
};

// The length that row `place` of a request sees: its last row sees all of it, each row before one token less. Never
// below zero: a padding request has fewer tokens than rows, and consumers take the lengths for unsigned.
__device__ __forceinline__ std::int32_t expanded_length(std::int32_t length, int rows, int place) {
  const std::uint32_t unseen = static_cast<std::uint32_t>(rows - 1 - place);
  const std::int32_t expanded = static_cast<std::int32_t>(static_cast<std::uint32_t>(length) - unseen);
  return expanded > 0 ? expanded : 0;
}

// What sparse attention sees of a length.
__device__ __forceinline__ std::int32_t nsa_length_of(std::int32_t length) {
  return length < kIndexTopk ? length : kIndexTopk;
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
    const int rows = present ? kNextN : 0;
    std::uint32_t nsa_lengths = 0;  // of all of the request's rows
    for (int j = 0; j < rows; ++j) {
      nsa_lengths += static_cast<std::uint32_t>(nsa_length_of(expanded_length(length, rows, j)));
    }
    std::uint32_t cu_seqlens_k_chunk;
    const std::uint32_t cu_seqlens_k =
        cu_seqlens_k_carry + block_running_sum(static_cast<std::uint32_t>(length), cu_seqlens_k_chunk);
    cu_seqlens_k_carry += cu_seqlens_k_chunk;
    std::uint32_t nsa_cu_seqlens_k_chunk;
    const std::uint32_t nsa_cu_seqlens_k =
        nsa_cu_seqlens_k_carry + block_running_sum(nsa_lengths, nsa_cu_seqlens_k_chunk);
    nsa_cu_seqlens_k_carry += nsa_cu_seqlens_k_chunk;
    if (present) {
#pragma unroll
      for (int b = 0; b < kBackends; ++b) p.cache_seqlens[b][request] = length;
#pragma unroll
      for (int b = 0; b < kBackends; ++b) {
        p.cu_seqlens_k[b][request + 1] = static_cast<std::int32_t>(cu_seqlens_k);
      }
      std::uint32_t nsa_sum = nsa_cu_seqlens_k - nsa_lengths;
      const std::int64_t first_row = std::int64_t{request} * kNextN;
      for (int j = 0; j < rows; ++j) {
        const std::int64_t row = first_row + j;
        const std::int32_t expanded = expanded_length(length, rows, j);
        const std::int32_t nsa_length = nsa_length_of(expanded);
#pragma unroll
        for (int b = 0; b < kBackends; ++b) p.nsa_cache_seqlens[b][row] = nsa_length;
#pragma unroll
        for (int b = 0; b < kBackends; ++b) p.seqlens_expanded[b][row] = expanded;
        nsa_sum += static_cast<std::uint32_t>(nsa_length);
#pragma unroll
        for (int b = 0; b < kBackends; ++b) p.nsa_cu_seqlens_k[b][row + 1] = static_cast<std::int32_t>(nsa_sum);
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

__device__ __forceinline__ void write_page(const Params& p, Rows rows, int page, Token token) {
  const std::int32_t number = page_of(token);
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    for (std::int64_t row = rows.first; row < rows.stop; ++row) {
      p.real_page_table[b].data[row * p.real_page_table[b].row_stride + page] = number;
    }
  }
}

// One warp reads the columns [first, first + kTileColumns) of a row once, as far as they lie in [0, end), and writes
// them to every backend. `first` counts from a 16-byte boundary of the destination row, so it can be negative.
// `width` is how far the source row may be read.
__device__ __forceinline__ void copy_columns(
    const Params& p, Rows rows, const Token* source, int first, int end, int width) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  // Inside the row, with room for the words that realigning reads on either side: 16-byte accesses throughout.
  if (first >= kVectorWords && first + kTileColumns <= end && first + kTileColumns + kVectorWords <= width) {
    const int column = first + lane * kVectorWords;
    const int shift = words_past_boundary(source + column);  // the same in all lanes
    const int4* aligned = boundary_before(source + column);
    int4 words[kUnroll];
    int4 high[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + 1);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) words[u] = realign(words[u], high[u], shift);
#pragma unroll
    for (int b = 0; b < kBackends; ++b) {
      for (std::int64_t row = rows.first; row < rows.stop; ++row) {
        int4* to = reinterpret_cast<int4*>(p.page_indices[b].data + row * p.page_indices[b].row_stride + column);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) to[u * kWarpSize] = words[u];
      }
    }
    return;
  }
  // An edge of the row: single words, still one coalesced access a warp.
  constexpr int kWords = kTileColumns / kWarpSize;
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
    for (std::int64_t row = rows.first; row < rows.stop; ++row) {
      std::int32_t* to = p.page_indices[b].data + row * p.page_indices[b].row_stride + (first + lane);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (edge + i * kWarpSize < static_cast<unsigned>(end)) to[i * kWarpSize] = words[i];
      }
    }
  }
}

// Everything that one tile of a request's row needs: `end` is the first column that isn't written.
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t request, std::int64_t pool_row, int first, int end) {
  const Rows rows = {request * kNextN, (request + 1) * kNextN};
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  copy_columns(p, rows, source, first, end, static_cast<int>(p.req_to_token_width));
  // The pages that begin in the tile. Their numbers come from req_to_token, never from a table that other threads are
  // writing.
  const unsigned begin = static_cast<unsigned>(first > 0 ? first : 0);
  const unsigned stop = static_cast<unsigned>(first + kTileColumns < end ? first + kTileColumns : end);
  const unsigned stop_page = (stop - 1) / kPageSize + 1;
  const unsigned page = (begin + kPageSize - 1) / kPageSize + threadIdx.x % kWarpSize;
  if (page < stop_page) {
    write_page(p, rows, static_cast<int>(page), __ldg(source + static_cast<std::int64_t>(page) * kPageSize));
  }
}

// ---- which warp takes which tile ---------------------------------------------------------------------------------
// How a launch shares the requests out. The host works it out: dividing by a number that isn't a constant takes a
// thread dozens of instructions, one after the other.
// It is the kernel's first parameter, so that what a thread needs before its first load lies in one line of the
// constant cache.
struct Split {
  std::uint32_t own_blocks;  // whose warps belong to one request each; the others share out what those leave
  std::uint32_t reciprocal;  // (2^32 - 1) / requests
  std::uint32_t requests;
  std::uint32_t own_tiles;  // of a request: one for each of its own warps
  std::uint8_t all_own;  // whether those warps reach the end of the table
  std::uint8_t spread;  // whether a block's warps take tiles of their request far from each other
  std::uint8_t rest_spread;  // whether those that share out what is left do
  std::uint8_t together;  // binary logarithm of the warps of a block that belong to the same request
};

// Tiles begin at boundaries of kTileAlignment words in the first backend's row, which lie this many columns before
// column 0. Modulo 16 bytes all backends and all rows agree on it: a plan whose destinations don't is bound to a
// kernel with 4-byte stores.
__device__ __forceinline__ int row_lead(const Params& p, std::int64_t row) {
  const std::int32_t* begin = p.page_indices[0].data + row * p.page_indices[0].row_stride;
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(std::int32_t) % kTileAlignment);
}

// The columns of a request that its length makes live.
__device__ __forceinline__ int live_columns(const Params& p, std::uint32_t request) {
  const std::int32_t length = static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]);
  const int most = static_cast<int>(p.columns);
  const int columns = length < 0 ? 0 : length < most ? length : most;
  return columns;
}

// What the requests' own warps leave of long requests, shared out among the warps of the blocks behind them: none gets
// more than its share, however uneven the requests are. They begin at once: a long request among short ones doesn't
// wait until its own warps are done.
__device__ __forceinline__ void gather_rest(const Params& p, const Split& split) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int slot = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  const std::uint32_t blocks = gridDim.x - kLengthBlocks - split.own_blocks;
  const std::uint32_t block = blockIdx.x - kLengthBlocks - split.own_blocks;
  const std::uint32_t warps = blocks * kWarps;
  std::uint32_t tile = split.rest_spread ? warp * blocks + block : block * kWarps + warp;
  // Every block sums the tiles of a window of kThreads requests, and the warps of all blocks take them in turn.
  __shared__ std::uint32_t tile_end[kThreads];  // tiles up to and with a request, counted within its warp
  __shared__ std::uint32_t warp_tiles[kWarps];  // tiles of all requests of a warp
  __shared__ std::int32_t live[kThreads];  // columns of a request
  __shared__ std::int32_t begins[kThreads];  // the column that a request's first tile begins at
  __shared__ std::int64_t pool_rows[kThreads];
  static_assert(kWarps <= kWarpSize, "one lane looks after each warp");
  int first = -kThreads;  // the window's first request: there is none yet
  std::uint32_t window_tiles = 0;  // that the warps take in turn
  std::uint32_t warp_end = 0;  // lane w: tiles up to and with warp w's requests
  const int own_columns = static_cast<int>(split.own_tiles) * kTileColumns;
  while (true) {
    while (tile >= window_tiles) {
      tile -= window_tiles;  // the tiles of the next window follow on, so that no warp gets ahead
      first += kThreads;
      if (first >= batch_size) return;
      const int asked = first + slot;
      int asked_columns = 0;
      int begin = 0;
      std::uint32_t tiles = 0;
      std::int64_t pool_row = -1;
      if (asked < batch_size) {
        pool_row = p.req_pool_indices[asked * p.req_pool_indices_stride];
        asked_columns = live_columns(p, asked);
        begin = own_columns - row_lead(p, asked);
        if (asked_columns > 0 && asked_columns > begin && pool_row >= 0) {
          tiles = static_cast<std::uint32_t>(asked_columns - begin - 1) / kTileColumns + 1;
        }
      }
      if (first > 0) __syncthreads();  // nobody looks tiles up in the last window any more
      pool_rows[slot] = pool_row;
      live[slot] = asked_columns;
      begins[slot] = begin;
      const std::uint32_t in_warp = warp_running_sum(tiles);
      tile_end[slot] = in_warp;
      if (lane == kWarpSize - 1) warp_tiles[slot / kWarpSize] = in_warp;
      __syncthreads();
      window_tiles = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        window_tiles += warp_tiles[w];
        if (w <= lane) warp_end = window_tiles;  // the lanes after the last warp hold the window's sum
      }
    }
    // Whose tile it is: how many warps, then how many of the next warp's requests, end at or before it.
    const int group = __popc(__ballot_sync(kFullMask, warp_end <= tile));
    const std::uint32_t before = __shfl_sync(kFullMask, warp_end, group > 0 ? group - 1 : 0);
    const std::uint32_t in_group = tile - (group > 0 ? before : 0);
    const int passed = __popc(__ballot_sync(kFullMask, tile_end[group * kWarpSize + lane] <= in_group));
    const int found = group * kWarpSize + passed;
    const std::uint32_t in_row = in_group - (passed > 0 ? tile_end[found - 1] : 0);
    const int column = begins[found] + static_cast<int>(in_row) * kTileColumns;
    copy_tile(p, first + found, pool_rows[found], column, live[found]);
    tile += warps;
  }
}

// The cost follows the live length, not the table's width. Every request has warps of its own, so that none of them
// waits for other requests' lengths: for short requests that is all. So little is to be done then that every
// instruction before the first load shows.
__device__ void gather_tables(const Params& p, const Split& split) {
  const std::uint32_t block = blockIdx.x - kLengthBlocks;
  if (block < split.own_blocks) {
    const std::uint32_t warp = threadIdx.x / kWarpSize;
    const std::uint32_t place = (block * kWarps + warp) >> split.together;
    const std::uint32_t turn = __umulhi(place + 1, split.reciprocal);  // place / requests
    const std::uint32_t request = place - turn * split.requests;
    const std::int64_t pool_row = p.req_pool_indices[request * p.req_pool_indices_stride];
    int columns = live_columns(p, request);
    std::uint32_t tile = (turn << split.together) + (warp & ((1u << split.together) - 1));
    // Few requests would keep few multiprocessors busy if a block took neighbouring tiles alone.
    if (split.spread) {
      tile = warp / kNearWarps * (split.own_tiles / (kWarps / kNearWarps)) + turn * kNearWarps + warp % kNearWarps;
    }
    if (pool_row < 0) columns = 0;  // there is none, but asking makes the compiler read it beside the length, not after
    if (tile >= split.own_tiles) columns = 0;  // the last block's warps without a request
    const int lead = row_lead(p, request);
    const int column = static_cast<int>(tile) * kTileColumns - lead;
    if (column < columns && columns > 0) copy_tile(p, request, pool_row, column, columns);
    return;
  }
  if (!split.all_own) gather_rest(p, split);
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_draft_extend_n3_9efabc8fab0c2c82(
    const __grid_constant__ Split split, const __grid_constant__ Params p) {
  if (blockIdx.x < kLengthBlocks) {
    refresh_lengths(p);
  } else {
    gather_tables(p, split);
  }
}

}  // namespace

// ---- host side ---------------------------------------------------------------------------------------------------
// As many blocks as the tables could need, up to a number that suits the device.
static std::int64_t table_blocks(const Params& p) {
  std::int64_t tiles = 0;
  tiles += p.batch_size * ((p.columns + kTileAlignment - 2) / kTileColumns + 1);
  std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  // With little to do a block has tiles for kNearWarps alone, and more multiprocessors take part.
  const std::int64_t spread = (tiles + kNearWarps - 1) / kNearWarps;
  if (wanted < p.sm_count) wanted = spread < p.sm_count ? spread : p.sm_count;
  const std::int64_t most = p.sm_count * kBlocksPerSm;
  const std::int64_t blocks = wanted < most ? wanted : most;
  return blocks > 1 ? blocks : 1;
}

static Split split_of(const Params& p, std::int64_t blocks) {
  const std::int64_t requests = p.batch_size > 0 ? p.batch_size : 1;
  const std::int64_t columns = p.columns;
  std::int64_t share = blocks / requests;  // blocks for each request
  const bool all_own = columns <= share * kWarps * kTileColumns - (kTileAlignment - 1);
  const bool spread = columns <= kSpreadRounds * share * kWarps * kTileColumns;
  const bool many = blocks >= kManyBlocks * requests;
  // Otherwise half of the blocks, or warps of them, belong to requests. The other half is for what those leave.
  const std::int64_t half = blocks / 2;
  if (!all_own) share = half / requests;
  std::int64_t own_blocks = share * p.batch_size;
  std::int64_t own_tiles = share * kWarps;
  std::uint8_t together = 0;
  while (1 << together < kWarps) ++together;
  if (share == 0) {
    own_tiles = kWarps;
    for (own_blocks = requests; own_blocks > half && own_tiles > 1; own_blocks = (own_blocks + 1) / 2) {
      own_tiles /= 2;
      --together;
    }
    // With more requests the threads' division by the reciprocal isn't exact.
    if (own_blocks > half || requests > 0xffff) own_blocks = own_tiles = 0;
  }
  Split split{};
  split.own_blocks = static_cast<std::uint32_t>(own_blocks);
  split.reciprocal = static_cast<std::uint32_t>(std::int64_t{0xffffffff} / requests);
  split.requests = static_cast<std::uint32_t>(p.batch_size);
  split.own_tiles = static_cast<std::uint32_t>(own_tiles);
  split.all_own = all_own;
  split.spread = spread && share > 0;
  split.rest_spread = many;
  split.together = together;
  return split;
}

static unsigned grid_blocks(std::int64_t blocks, const Split& split) {
  // Where each request has few blocks they may leave much. Those that there is no room for at first begin when the
  // blocks of short requests are done: what is left isn't spread over them.
  const bool more = !split.all_own && !split.rest_spread;
  return static_cast<unsigned>(kLengthBlocks + blocks + (more ? blocks / 2 : 0));
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
int onelaunch_broadcast_draft_extend_n3_9efabc8fab0c2c82_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const std::int64_t for_tables = table_blocks(params);
    const Split split = split_of(params, for_tables);
    const unsigned blocks = grid_blocks(for_tables, split);
    config.gridDim = dim3(blocks, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_draft_extend_n3_9efabc8fab0c2c82, split, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_broadcast_draft_extend_n3_9efabc8fab0c2c82_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_draft_extend_n3_9efabc8fab0c2c82);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_draft_extend_n3_9efabc8fab0c2c82_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
