// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show nsa-draft-extend-3-variable
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
//   extend                  variable
// key c329328fb13c480f75f62fdd8dd981fe51bb65b8b5a55eea18d0b6f481d33a60

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- settings ----------------------------------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kThreads = 256;  // per block
constexpr int kResidentBlocks = 4;  // minimum resident blocks per SM; caps the registers per thread
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLengthSets = 1;  // lengths per request: one for all backends, or one per backend
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
using ExtendLen = std::int64_t;
constexpr std::int32_t kIndexTopk = 2048;  // tokens
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kBlocksPerSm = 4;  // limits the blocks for the tables
constexpr bool kPagesAlone = false;  // whether the tables hold pages only, not tokens
constexpr bool kEqualRows = false;  // whether all rows are written up to the same column
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kPageSize = 64;  // tokens
constexpr int kPageShift = 6;  // log2(kPageSize), if kPageSize is a power of two

// ---- arguments ---------------------------------------------------------------------------------------------------
struct Table {
  std::int32_t* data;
  std::int64_t row_stride;  // elements
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It is passed by value, which
// needs no pointer table in device memory and no copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  const ExtendLen* extend_seq_lens;  // [batch_size]
  std::int64_t extend_seq_lens_stride;  // elements
  const PoolIndex* req_pool_indices;  // [batch_size], rows of req_to_token
  std::int64_t req_pool_indices_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t columns;  // columns from here on are not written
  // set when a plan is bound
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  std::int64_t req_to_token_width;  // elements of a row that may be read
  Table page_indices[kBackends];  // [R, W]
  Table real_page_table[kBackends];  // [R, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* nsa_cache_seqlens[kBackends];  // [R]
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [R + 1]
  std::int32_t* seqlens_expanded[kBackends];  // [R]
};
constexpr int kParamWords = 40;
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

// A request's row of req_to_token. If it is negative, the request has none and nothing may be read.
__device__ __forceinline__ std::int64_t request_row(const Params& p, std::int64_t request) {
  const std::int64_t row = p.req_pool_indices[request * p.req_pool_indices_stride];
  return row;
}

// The number of columns of each table row, at any request length: in tokens.
__host__ __device__ __forceinline__ std::int64_t row_columns(const Params& p) {
  return p.columns;
}

// A range of rows of the tables, and of the vectors that have one element per row.
struct Rows {
  std::int64_t first, stop;
};

// The number of rows of a request.
__device__ __forceinline__ int request_rows(const Params& p, std::int64_t request) {
  const ExtendLen rows = p.extend_seq_lens[request * p.extend_seq_lens_stride];
  return rows > 0 ? static_cast<int>(rows) : 0;
}

// Unchecked: all rows are assumed to fit the destinations.
__device__ __forceinline__ Rows rows_within(const Params&, std::int64_t, Rows rows) {
  return rows;
}

// The number of blocks that write tables.
__device__ __forceinline__ unsigned table_grid([[maybe_unused]] const Params& p) {
  return gridDim.x - kFirstTableBlock;
}

// The table whose columns are tokens.
__host__ __device__ __forceinline__ const auto& token_table(const Params& p) {
  return p.page_indices;
}

// Calls write(table, pages per column) for each table whose columns are pages, or pools of pages.
template <typename Write>
__device__ __forceinline__ void for_each_page_table(const Params& p, const Write& write) {
  write(p.real_page_table, 1);
}

// ---- running sums ------------------------------------------------------------------------------------------------
// T is unsigned: sums wrap at 2^32 as they do in PyTorch's int32, and signed overflow is undefined in C++. A sum that
// may not wrap has 64 bits.
constexpr unsigned kFullMask = 0xffffffffu;  // all lanes of a warp

// The inclusive running sum of `value` over the lanes of a warp.
template <typename T>
__device__ __forceinline__ T warp_running_sum(T value) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T other = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  return value;
}

// The inclusive running sum over the threads of the block; `total` gets the block's sum. All threads must call it.
template <typename T>
__device__ __forceinline__ T block_running_sum(T value, T& total) {
  __shared__ T warp_totals[kWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const T in_warp = warp_running_sum(value);
  if (static_cast<int>(threadIdx.x % kWarpSize) == kWarpSize - 1) warp_totals[warp] = in_warp;
  __syncthreads();
  T sum = 0;
  T before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = sum;
    sum += warp_totals[w];
  }
  __syncthreads();  // the next sum writes warp_totals again
  total = sum;
  return before + in_warp;
}

// A running sum over more values than a block has threads: one chunk of kThreads after another.
template <typename T>
struct RunningSum {
  T carry = 0;  // the sum of all chunks so far

  // The inclusive sum up to this thread's value of the next chunk. All threads must call it.
  __device__ __forceinline__ T add(T value) {
    T chunk;
    const T sum = carry + block_running_sum(value, chunk);
    carry += chunk;
    return sum;
  }
};

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

// ---- division ----------------------------------------------------------------------------------------------------
// The quotient rounded down, as Python's //; the divisor is positive.
template <typename T>
__device__ __forceinline__ T floor_div(T value, int divisor) {
  return value / divisor - (value % divisor < 0 ? 1 : 0);
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

// ---- where rows end: at the same column in all destinations ------------------------------------------------------
// The end is the first column that is not written.
struct SameEnd {
  int end;
};
__device__ __forceinline__ int longest_end(SameEnd ends) {
  return ends.end;
}

template <int N>
__device__ __forceinline__ bool ends_differ(const Table (&)[N], SameEnd) {
  return false;
}

template <int N>
__device__ __forceinline__ int shortest_end(const Table (&)[N], SameEnd ends) {
  return ends.end;
}

template <int N>
__device__ __forceinline__ int end_of(const Table (&)[N], SameEnd ends, int) {
  return ends.end;
}

// ---- addresses that the compiler keeps as they are ---------------------------------------------------------------
// Keeps one base address in a register. Otherwise the compiler computes an address for each load.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* address) {
  if constexpr (kWarpSize > 1) asm("" : "+l"(address));
  return address;
}

// ---- one tile of a table row -------------------------------------------------------------------------------------
// A tile is kTileColumns columns of a row. One warp reads it once and writes it to every destination.

// Moves kTiles tiles with 4-byte accesses, column by column: any alignment, any end. Columns before 0 (a tile may begin
// at a boundary before the row) and from the row's end on are skipped.
template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_words(
    const Table (&to)[N], std::int64_t row, const T* source, int first, RowEnds ends) {
  constexpr int kWords = kTiles * kTileColumns / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int end = longest_end(ends);
  std::int32_t words[kWords];
  // Unsigned comparison: a negative column fails the bound check too.
  const unsigned column = static_cast<unsigned>(first + lane);
  const T* from = opaque(source + (first + lane));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = column + i * kWarpSize < static_cast<unsigned>(end);
    words[i] = inside ? static_cast<std::int32_t>(__ldg(from + i * kWarpSize)) : 0;
  }
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const unsigned stop = static_cast<unsigned>(end_of(to, ends, b));
    std::int32_t* data = to[b].data + row * to[b].row_stride + (first + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (column + i * kWarpSize < stop) put(data + i * kWarpSize, words[i]);
    }
  }
}

// ---- 16-byte reads of int32 rows of any alignment ----------------------------------------------------------------
// The four words that begin `shift` words into low and high, for shift from 0 to 3. Selects instead of an indexed
// array, which would be in local memory.
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

// The 16-byte boundary at or before an address.
__device__ __forceinline__ const int4* boundary_before(const std::int32_t* address) {
  return reinterpret_cast<const int4*>(reinterpret_cast<std::uintptr_t>(address) / sizeof(int4) * sizeof(int4));
}

// How many words an address lies after that boundary, 0 to 3.
__device__ __forceinline__ int words_past_boundary(const std::int32_t* address) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) / sizeof(std::int32_t) % kVectorWords);
}

// ---- 16-byte accesses --------------------------------------------------------------------------------------------
// Tiles begin at multiples of this in the destination: a 128-byte line, or a whole tile if that is shorter.
constexpr int kTileAlignment = kTileColumns < 32 ? kTileColumns : 32;  // words

// The first tile of a row begins this many columns before column 0. A row's address modulo 16 bytes is the same in all
// destinations; where it isn't, bind chooses a kernel with 4-byte stores.
template <int N>
__device__ __forceinline__ int alignment_offset(const Table (&to)[N], std::int64_t row) {
  const std::int32_t* begin = to[0].data + row * to[0].row_stride;
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(std::int32_t) % kTileAlignment);
}

// Moves kTiles tiles with 16-byte accesses if they lie inside the rows of all destinations; returns whether they do.
// If so, it calls `then` with the words that this lane moved. `width` is the number of readable elements of the source
// row.
template <int kTiles, typename T, int N, typename RowEnds, typename Then>
__device__ __forceinline__ bool copy_vectors(
    const Table (&to)[N], std::int64_t row, const T* source, int width, int first, RowEnds ends, const Then& then) {
  int4 words[kTiles * kUnroll];
  constexpr int kAccesses = kTiles * kUnroll;
  constexpr int kColumns = kTiles * kTileColumns;
  constexpr bool kRealigns = sizeof(T) == sizeof(std::int32_t);
  const int stop = shortest_end(to, ends);
  const int column = first + static_cast<int>(threadIdx.x % kWarpSize) * kVectorWords;
  if constexpr (kRealigns) {
    // Source rows have any alignment: each group of four words is selected from the two aligned groups that contain it.
    int next = 1;
    if constexpr (kEqualRows) {
      // A row that needs no shift has no second group to read, so 16-byte accesses reach its very end.
      const int shift = words_past_boundary(source + column);
      next = shift > 0 ? 1 : 0;
      const int behind = shift > 0 ? kVectorWords - shift : 0;
      if (first < shift || first + kColumns > stop || first + kColumns + behind > width) return false;
    } else {
      if (first < kVectorWords || first + kColumns > stop || first + kColumns + kVectorWords > width) return false;
    }
    const int shift = words_past_boundary(source + column);
    const int4* aligned = boundary_before(source + column);
    int4 high[kAccesses];
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + next);
    }
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) words[u] = realign(words[u], high[u], shift);
  } else {
    if (first < 0 || first + kColumns > stop) return false;
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const T* at = source + column + u * kWarpSize * kVectorWords;
      words[u].x = static_cast<std::int32_t>(__ldg(at));
      words[u].y = static_cast<std::int32_t>(__ldg(at + 1));
      words[u].z = static_cast<std::int32_t>(__ldg(at + 2));
      words[u].w = static_cast<std::int32_t>(__ldg(at + 3));
    }
  }
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    int4* data = reinterpret_cast<int4*>(to[b].data + row * to[b].row_stride + column);
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) data[u * kWarpSize] = words[u];
  }
  then(words);
  return true;
}

// Moves kTiles tiles: with 16-byte accesses inside the rows, with 4-byte accesses at their ends.
template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_columns(
    const Table (&to)[N], std::int64_t row, const T* source, int width, int first, RowEnds ends) {
  if (!copy_vectors<kTiles>(to, row, source, width, first, ends, [](const auto&) {})) {
    copy_words<kTiles>(to, row, source, first, ends);
  }
}

// ---- how far rows are written: to the request's length -----------------------------------------------------------
// Live columns: the first seq_len columns of a row, within the table.
using Ends = SameEnd;

__device__ __forceinline__ int row_reach(const Params& p, std::int64_t request) {
  if constexpr (kLongestOffset == 0) {
    const std::int32_t length = request_length(p, request);
    const int columns = static_cast<int>(p.columns);
    return length < 0 ? 0 : length < columns ? length : columns;
  }
  const std::int64_t length = std::int64_t{request_length(p, request)} + kLongestOffset;
  return static_cast<int>(length < 0 ? 0 : length < p.columns ? length : p.columns);
}

__device__ __forceinline__ Ends ends_at(const Params&, int reach) {
  return {reach};
}

// ---- pages -------------------------------------------------------------------------------------------------------
// The number of pages that hold `tokens` tokens.
__device__ __forceinline__ int pages_of(int tokens) {
  return tokens / kPageSize + (tokens % kPageSize != 0);
}

// The page of a token, rounded down: padding tokens are negative.
__device__ __forceinline__ std::int32_t page_of(Token token) {
  if constexpr ((kPageSize & (kPageSize - 1)) == 0) return static_cast<std::int32_t>(token >> kPageShift);
  return static_cast<std::int32_t>(floor_div(token, kPageSize));
}

// ---- the columns of a tile are tokens ----------------------------------------------------------------------------
[[maybe_unused]] __device__ __forceinline__ int written_columns(const Params&, Ends ends) {
  return longest_end(ends);
}

__device__ __forceinline__ int alignment_offset(const Params& p, std::int64_t row) {
  return alignment_offset(token_table(p), row);
}

// An upper bound of the rows' alignment offsets: 0 if all rows begin at a boundary.
__host__ __device__ __forceinline__ std::int64_t largest_offset(const Params& p) {
  const Table& table = token_table(p)[0];
  const std::uint64_t begin = reinterpret_cast<std::uintptr_t>(table.data) / sizeof(std::int32_t);
  const std::uint64_t stride = static_cast<std::uint64_t>(table.row_stride);
  return begin % kTileAlignment == 0 && stride % kTileAlignment == 0 ? 0 : kTileAlignment - 1;
}

// ---- the pages that begin in a tile of tokens --------------------------------------------------------------------
// Stores one page to a table that has one column per `pages_per_column` pages.
template <int N>
__device__ __forceinline__ void store_page(
    const Table (&to)[N], int pages_per_column, std::int64_t row, int page, std::int32_t number, Ends ends) {
  if (page % pages_per_column != 0) return;
  const std::int32_t value = floor_div(number, pages_per_column);
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    if (ends_differ(to, ends) && page >= pages_of(end_of(to, ends, b))) continue;
    put(to[b].data + row * to[b].row_stride + page / pages_per_column, value);
  }
}

__device__ __forceinline__ void write_page(const Params& p, std::int64_t row, int page, Token token, Ends ends) {
  const std::int32_t number = page_of(token);
  for_each_page_table(p, [&](const auto& table, int pages_per_column) {
    store_page(table, pages_per_column, row, page, number, ends);
  });
}

// Writes the pages that begin in kTiles tiles. Their numbers come from req_to_token, never from a destination that
// other threads are writing.
template <int kTiles>
__device__ __forceinline__ void read_pages(
    const Params& p, std::int64_t row, const Token* source, int first, Ends ends) {
  constexpr int kColumns = kTiles * kTileColumns;
  const int end = longest_end(ends);
  const unsigned begin = static_cast<unsigned>(first > 0 ? first : 0);
  const unsigned stop = static_cast<unsigned>(first + kColumns < end ? first + kColumns : end);
  const unsigned stop_page = (stop - 1) / kPageSize + 1;
  unsigned page = (begin + kPageSize - 1) / kPageSize + threadIdx.x % kWarpSize;
  for (; page < stop_page; page += kWarpSize) {
    write_page(p, row, static_cast<int>(page), __ldg(source + static_cast<std::int64_t>(page) * kPageSize), ends);
    if constexpr (kColumns <= kWarpSize * kPageSize) break;  // a lane has one page at most
  }
}

// ---- tables of tokens and of pages -------------------------------------------------------------------------------
// Copies a tile's tokens, and writes the pages that begin in it.
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  copy_columns<kTiles>(token_table(p), row, source, static_cast<int>(p.req_to_token_width), first, ends);
  read_pages<kTiles>(p, row, source, first, ends);
}

// ---- which request a tile belongs to -----------------------------------------------------------------------------
// A window: the tile counts of up to kThreads requests, in shared memory. Each thread adds one request's; then every
// warp can look up a tile's request.
struct Window {
  std::uint32_t tile_end[kThreads];  // tiles up to and including a request's, among its group of kWarpSize requests
  std::uint32_t warp_tiles[kWarps];  // tiles of all requests of a group
};

struct Place {
  int slot;  // of the request in the window
  std::uint32_t tile;  // among the request's tiles
};

// Sums the tiles of the window's requests; `tiles` is the number of this thread's request. Returns the total; in lane
// w, `warp_end` becomes the sum up to and including group w. All threads must call it, after a barrier that follows the
// last look-up. It contains a barrier: what a thread wrote to shared memory before the call can be read after it.
__device__ __forceinline__ std::uint32_t count_tiles(Window& window, std::uint32_t tiles, std::uint32_t& warp_end) {
  static_assert(kWarps <= kWarpSize, "each warp needs a lane");
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  // Few rows of pages have a remainder. Where no lane's has one, there is nothing to sum.
  const bool any = !kPagesAlone || __ballot_sync(kFullMask, tiles > 0) != 0;
  const std::uint32_t in_warp = any ? warp_running_sum(tiles) : 0;
  window.tile_end[threadIdx.x] = in_warp;
  if (lane == kWarpSize - 1) window.warp_tiles[threadIdx.x / kWarpSize] = in_warp;
  __syncthreads();
  std::uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sum += window.warp_tiles[w];
    if (w <= lane) warp_end = sum;  // the lanes after the last warp hold the window's sum
  }
  return sum;
}

// Finds a tile's request: counts the groups that end at or before the tile, then the next group's requests that do.
__device__ __forceinline__ Place find_tile(const Window& window, std::uint32_t warp_end, std::uint32_t tile) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int warp = __popc(__ballot_sync(kFullMask, warp_end <= tile));
  const std::uint32_t before = __shfl_sync(kFullMask, warp_end, warp > 0 ? warp - 1 : 0);
  const std::uint32_t in_warp = tile - (warp > 0 ? before : 0);
  const int passed = __popc(__ballot_sync(kFullMask, window.tile_end[warp * kWarpSize + lane] <= in_warp));
  const int slot = warp * kWarpSize + passed;
  return {slot, in_warp - (passed > 0 ? window.tile_end[slot - 1] : 0)};
}

// ---- strategy: requests with different numbers of rows -----------------------------------------------------------
// The place of a request's rows depends on the numbers of rows of all requests before it. Every block sums these
// itself, window by window, together with the tiles; the warps of all blocks take the tiles in turn. The cost follows
// the live columns, not the table's width, and no warp gets more than its share, however uneven the requests are. The
// tiles of a request are those of its first row, then those of the next one.
//
//   block   0 .. kFirstTableBlock   the other blocks
//          +-----------------------+-----------------------------------------+
//          | vectors, schedules    | tile, tile + warps, ...                 |
//          +-----------------------+-----------------------------------------+
__device__ void write_tables(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int slot = static_cast<int>(threadIdx.x);
  const std::uint32_t warps = table_grid(p) * kWarps;
  std::uint32_t tile = (blockIdx.x - kFirstTableBlock) * kWarps + threadIdx.x / kWarpSize;
  __shared__ Window window;
  __shared__ std::int32_t reaches[kThreads];  // how far a request is written
  __shared__ std::uint32_t row_tiles[kThreads];  // tiles of each of its rows
  __shared__ std::int64_t pool_rows[kThreads];
  __shared__ std::int64_t first_rows[kThreads];
  int first = -kThreads;  // the window's first request; there is no window yet
  std::uint32_t window_tiles = 0;  // the window's tiles, which the warps take in turn
  std::uint32_t warp_end = 0;
  RunningSum<std::uint32_t> row_sum;
  while (true) {
    while (tile >= window_tiles) {
      tile -= window_tiles;  // the turn goes on with the next window's tiles, so that all warps get equally many
      first += kThreads;
      if (first >= batch_size) return;
      const int request = first + slot;
      const int count = request < batch_size ? request_rows(p, request) : 0;
      const std::int64_t stop_row = row_sum.add(static_cast<std::uint32_t>(count));
      const Rows rows = rows_within(p, request, {stop_row - count, stop_row});
      int reach = 0;
      std::uint32_t tiles = 0;
      std::int64_t pool_row = -1;
      if (rows.first < rows.stop) {
        reach = row_reach(p, request);
        const int columns = written_columns(p, ends_at(p, reach));
        const int reached = columns + static_cast<int>(largest_offset(p));
        if (columns > 0) tiles = static_cast<std::uint32_t>(reached - 1) / kTileColumns + 1;
      }
      // The barrier below comes after the last look-up in the previous window.
      window_tiles = 0;
      if (!__syncthreads_or(tiles > 0)) continue;
      if (tiles > 0) pool_row = request_row(p, request);
      if (pool_row < 0) tiles = 0;
      first_rows[slot] = rows.first;
      pool_rows[slot] = pool_row;
      reaches[slot] = reach;
      row_tiles[slot] = tiles;
      tiles *= static_cast<std::uint32_t>(rows.stop - rows.first);
      window_tiles = count_tiles(window, tiles, warp_end);
    }
    const Place place = find_tile(window, warp_end, tile);
    const std::uint32_t before = place.tile / row_tiles[place.slot];  // rows of the request
    const std::int64_t row = first_rows[place.slot] + before;
    const std::uint32_t in_row = place.tile - before * row_tiles[place.slot];
    const int column = static_cast<int>(in_row) * kTileColumns - alignment_offset(p, row);
    const Ends ends = ends_at(p, reaches[place.slot]);
    if (column < written_columns(p, ends)) copy_tile<1>(p, row, pool_rows[place.slot], column, ends);
    tile += warps;
  }
}

// ---- host side of the strategy
// Enough blocks for all tiles of rows of maximum length, up to a limit that follows from the device.
unsigned grid_blocks(const Params& p) {
  const std::int64_t tiles = p.batch_size * ((row_columns(p) + largest_offset(p) - 1) / kTileColumns + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const std::int64_t limit = p.sm_count * kBlocksPerSm;
  const std::int64_t blocks = wanted < limit ? wanted : limit;
  return static_cast<unsigned>(kFirstTableBlock + (blocks > 1 ? blocks : 1));
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  RunningSum<std::uint32_t> cu_seqlens_k_sum;
  if (threadIdx.x == 0) store(p.cu_seqlens_k, b, 0, 0);
  RunningSum<std::uint32_t> nsa_cu_seqlens_k_sum;
  if (threadIdx.x == 0) store(p.nsa_cu_seqlens_k, b, 0, 0);
  RunningSum<std::uint32_t> row_sum;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const int rows = present ? request_rows(p, request) : 0;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int64_t stop_row = row_sum.add(bits(rows));
    const Rows span = rows_within(p, request, {stop_row - rows, stop_row});
    std::uint32_t nsa_cu_seqlens_k_total = 0;  // sum over the request's rows
    for (int row = 0; row < rows; ++row) {
      const std::int32_t seqlens_expanded = max(wrap(bits(seq_len) - rows + row + 1), 0);
      const std::int32_t nsa_cache_seqlens = min(seqlens_expanded, kIndexTopk);
      nsa_cu_seqlens_k_total += bits(nsa_cache_seqlens);
    }
    const std::uint32_t nsa_cu_seqlens_k_end = nsa_cu_seqlens_k_sum.add(nsa_cu_seqlens_k_total);
    const std::uint32_t cu_seqlens_k_end = cu_seqlens_k_sum.add(bits(seq_len));
    if (!present) continue;
    store(p.cache_seqlens, b, request, seq_len);
    store(p.cu_seqlens_k, b, request + 1, wrap(cu_seqlens_k_end));
    std::uint32_t nsa_cu_seqlens_k_stop = nsa_cu_seqlens_k_end - nsa_cu_seqlens_k_total;  // the sum up to a row
    for (int row = 0; span.first + row < span.stop; ++row) {
      const std::int32_t seqlens_expanded = max(wrap(bits(seq_len) - rows + row + 1), 0);
      const std::int32_t nsa_cache_seqlens = min(seqlens_expanded, kIndexTopk);
      nsa_cu_seqlens_k_stop += bits(nsa_cache_seqlens);
      store(p.nsa_cu_seqlens_k, b, span.first + row + 1, wrap(nsa_cu_seqlens_k_stop));
      store(p.nsa_cache_seqlens, b, span.first + row, nsa_cache_seqlens);
      store(p.seqlens_expanded, b, span.first + row, seqlens_expanded);
    }
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    onelaunch_broadcast_draft_extend_n3_c329328fb13c480f(const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return refresh_vectors(p, block);
  write_tables(p);
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
int onelaunch_broadcast_draft_extend_n3_c329328fb13c480f_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid_blocks(params), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_draft_extend_n3_c329328fb13c480f, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_draft_extend_n3_c329328fb13c480f_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_draft_extend_n3_c329328fb13c480f);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_draft_extend_n3_c329328fb13c480f_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
