// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show nsa-precompute
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            1
//   fields                  cache_seqlens, cu_seqlens_k, page_indices, nsa_cache_seqlens, nsa_cu_seqlens_k,
//                           real_page_table
//   distinct                all
//   target                  cuda
//   checked                 False
//   extent                  full
// key 70e64caf87158162e93ca5826031e65e5fd6523cd2ae37974d667052c9df4338

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- settings ----------------------------------------------------------------------------------------------------
constexpr int kBackends = 1;
constexpr int kThreads = 256;  // per block
constexpr int kResidentBlocks = 4;  // minimum resident blocks per SM; caps the registers per thread
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLengthSets = 1;  // lengths per request: one for all backends, or one per backend
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
constexpr int kNextN = 1;  // rows per request
constexpr std::int32_t kIndexTopk = 2048;  // tokens
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kWideTiles = 2;  // tiles that a warp takes at once where every warp has work
constexpr bool kEqualRows = true;  // whether all rows are written up to the same column
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
  const PoolIndex* req_pool_indices;  // [batch_size], rows of req_to_token
  std::int64_t req_pool_indices_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t columns;  // columns from here on are not written
  // set when a plan is bound
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  std::int64_t req_to_token_width;  // elements of a row that may be read
  Table page_indices[kBackends];  // [bs, W]
  Table real_page_table[kBackends];  // [bs, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* nsa_cache_seqlens[kBackends];  // [bs]
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 19;
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

// The number of rows of all requests, and the request of a row.
__host__ __device__ __forceinline__ std::int64_t all_rows(const Params& p) {
  return p.batch_size * kNextN;
}

template <typename Row>
__device__ __forceinline__ Row request_of(Row row) {
  return row / kNextN;
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

// ---- how far rows are written: to max_len, at any request length -------------------------------------------------
using Ends = SameEnd;

__device__ __forceinline__ int row_reach(const Params& p, std::int64_t) {
  return static_cast<int>(p.columns);
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

// ---- tables of tokens and of pages: the tokens that begin pages are in registers already -------------------------
// A page is a multiple of four tokens, so these tokens are at the same place in every lane's four words.

// One of four words. Selects instead of an indexed array, which would be in local memory.
__device__ __forceinline__ std::int32_t word_of(int4 words, int index) {
  const std::int32_t even = index & 2 ? words.z : words.x;
  const std::int32_t odd = index & 2 ? words.w : words.y;
  return index & 1 ? odd : even;
}

// Writes the pages that begin in a tile inside the row. `words` holds the tile's tokens.
template <int kAccesses>
__device__ __forceinline__ void write_held_pages(
    const Params& p, std::int64_t row, const int4 (&words)[kAccesses], int first, Ends ends) {
  constexpr int kGroup = kWarpSize * kVectorWords;  // columns that a warp holds in words[u]
  static_assert(kPageSize % kVectorWords == 0 && kAccesses * kGroup <= kWarpSize * kPageSize);
  const int before = -first & (kPageSize - 1);  // columns of the tile that belong to the previous page
  // Where in the tile this lane's page begins, and which lane holds its token.
  const int column = before + static_cast<int>(threadIdx.x % kWarpSize) * kPageSize;
  const int holder = column / kVectorWords % kWarpSize;
  std::int32_t token = 0;
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    const std::int32_t found = __shfl_sync(0xffffffffu, word_of(words[u], before % kVectorWords), holder);
    if (column / kGroup == u) token = found;
  }
  if (column < kAccesses * kGroup) write_page(p, row, (first + column) / kPageSize, token, ends);
}

template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int width = static_cast<int>(p.req_to_token_width);
  if (copy_vectors<kTiles>(token_table(p), row, source, width, first, ends, [&](const auto& words) {
        write_held_pages(p, row, words, first, ends);
      }))
    return;
  copy_words<kTiles>(token_table(p), row, source, first, ends);
  read_pages<kTiles>(p, row, source, first, ends);
}

// ---- strategy: rows of equal length ------------------------------------------------------------------------------
// Every row has the same number of tiles, whatever the requests' lengths. Warp row * tiles + i takes tile i of a row,
// and no other: a loop would make the compiler fetch the constants of all destinations before the first load.
//
//   block   0 .. kFirstTableBlock   0             1             2
//          +-----------------------+-------------+-------------+-------------+
//          | vectors, schedules    | tiles 0-7   | tiles 8-15  | tiles 16-23 |   with kWarps = 8
//          +-----------------------+-------------+-------------+-------------+
constexpr int kWideFrom = 16;  // from this many tiles per SM, a warp takes kWideTiles tiles at once
constexpr int kSpreadTiles = 16;  // below this many tiles per SM, only half of each block's warps take tiles

// Computed by the host: a thread would need dozens of dependent instructions to divide by a number that isn't constant.
struct Split {
  std::uint32_t tiles;  // per row
  std::int32_t tile_columns;  // kTileColumns, or kWideTiles times as many
  std::uint32_t warps;  // per block that take tiles; 0 if rows have no columns
  std::uint64_t reciprocal;  // (2^64 - 1) / tiles
};

__device__ void write_tables(const Params& p, const Split& split) {
  const int columns = static_cast<int>(row_columns(p));
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  if (warp >= split.warps) return;
  // 32 bits hold the number of tiles of any table that fits a device.
  const std::uint32_t tile = (blockIdx.x - kFirstTableBlock) * split.warps + warp;
  const std::int64_t row = __umul64hi(std::uint64_t{tile} + 1, split.reciprocal);  // tile / tiles of a row
  const std::uint32_t in_row = tile - static_cast<std::uint32_t>(row) * split.tiles;
  const std::int32_t tile_columns = kWideTiles > 1 ? split.tile_columns : kTileColumns;
  const int column = static_cast<int>(in_row) * tile_columns - alignment_offset(p, row);
  if (row >= all_rows(p) || column >= columns) return;
  const std::int64_t request = request_of(row);
  const std::int64_t pool_row = request_row(p, request);
  if (pool_row < 0) return;
  const Ends ends = ends_at(p, row_reach(p, request));
  if (tile_columns > kTileColumns) {
    copy_tile<kWideTiles>(p, row, pool_row, column, ends);
  } else {
    copy_tile<1>(p, row, pool_row, column, ends);
  }
}

// ---- host side of the strategy
Split split_of(const Params& p) {
  const std::int64_t columns = row_columns(p);
  // A warp takes several tiles at once if that leaves enough for all warps.
  const bool wide = all_rows(p) * columns >= p.sm_count * kWideFrom * kTileColumns;
  const std::int64_t tile_columns = wide ? kWideTiles * kTileColumns : kTileColumns;
  const std::int64_t tiles = (columns + largest_offset(p) - 1) / tile_columns + 1;
  // With few tiles, only half of a block's warps take them, so that twice as many blocks take part.
  std::uint32_t warps = all_rows(p) * tiles < p.sm_count * kSpreadTiles ? (kWarps + 1) / 2 : kWarps;
  if (columns == 0) warps = 0;
  return {
      static_cast<std::uint32_t>(tiles),
      static_cast<std::int32_t>(tile_columns),
      warps,
      ~std::uint64_t{0} / static_cast<std::uint64_t>(tiles),
  };
}

// Enough blocks for all tiles.
unsigned grid_blocks(const Params& p, const Split& split) {
  const std::int64_t tiles = all_rows(p) * std::int64_t{split.tiles};
  const std::int64_t blocks = split.warps > 0 ? (tiles + split.warps - 1) / split.warps : 0;
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
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int32_t nsa_cache_seqlens = min(seq_len, kIndexTopk);
    const std::uint32_t cu_seqlens_k_end = cu_seqlens_k_sum.add(bits(seq_len));
    const std::uint32_t nsa_cu_seqlens_k_end = nsa_cu_seqlens_k_sum.add(bits(nsa_cache_seqlens));
    if (!present) continue;
    store(p.cache_seqlens, b, request, seq_len);
    store(p.cu_seqlens_k, b, request + 1, wrap(cu_seqlens_k_end));
    store(p.nsa_cache_seqlens, b, request, nsa_cache_seqlens);
    store(p.nsa_cu_seqlens_k, b, request + 1, wrap(nsa_cu_seqlens_k_end));
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n1_70e64caf87158162(
    const __grid_constant__ Split split, const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return refresh_vectors(p, block);
  write_tables(p, split);
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
int onelaunch_broadcast_decode_n1_70e64caf87158162_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    config.gridDim = dim3(grid_blocks(params, split), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n1_70e64caf87158162, split, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n1_70e64caf87158162_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n1_70e64caf87158162);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n1_70e64caf87158162_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
