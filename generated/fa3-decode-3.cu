// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show fa3-decode-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, real_page_table
//   distinct                all
//   target                  cuda
//   checked                 False
//   seqlen_offsets          1, 2, 3
// key 94effb8c2a40aec56d02743ffd796d5179028e7a59c0006ff463840de604e71b

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
constexpr int kLengthSets = kBackends;  // lengths per request: one for all backends, or one per backend
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kShortestOffset = 1;  // smallest offset that a backend adds to seq_lens
constexpr std::int32_t kLongestOffset = 3;  // largest offset that a backend adds to seq_lens
constexpr int kNextN = 1;  // rows per request
constexpr int kUnroll = 2;  // pages that a thread has in flight
constexpr int kTileColumns = kWarpSize * kUnroll;  // a tile: what one warp moves of a row
constexpr int kBlocksPerSm = 2;  // limits the blocks for the tables
constexpr int kWideTiles = 2;  // tiles that a warp takes at once where every warp has work
constexpr bool kPagesAlone = true;  // whether the tables hold pages only, not tokens
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kPageSize = 64;  // tokens
constexpr int kPageShift = 6;  // log2(kPageSize), if kPageSize is a power of two
constexpr bool kFillsPages = false;  // whether columns after the live ones are filled
constexpr std::int32_t kPageFill = -1;

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
  Table real_page_table[kBackends];  // [bs, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 23;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// Every consumer reads int32 lengths; a wider input is truncated, as by tensor.to(torch.int32).
__device__ __forceinline__ std::int32_t request_length(const Params& p, std::int64_t request) {
  const SeqLen length = p.seq_lens[request * p.seq_lens_stride];
  return static_cast<std::int32_t>(length);
}

// The offset that backend b adds to seq_lens. The array is static, because a local one would be in local memory.
__device__ __forceinline__ std::int32_t length_offset(int b) {
  static constexpr std::int32_t offsets[kBackends] = {1, 2, 3};
  return offsets[b];
}

// A request's row of req_to_token. If it is negative, the request has none and nothing may be read.
__device__ __forceinline__ std::int64_t request_row(const Params& p, std::int64_t request) {
  const std::int64_t row = p.req_pool_indices[request * p.req_pool_indices_stride];
  return row;
}

// The number of columns of each table row, at any request length: in pages.
__host__ __device__ __forceinline__ std::int64_t row_columns(const Params& p) {
  return (p.columns + kPageSize - 1) / kPageSize;
}

// The number of rows of all requests, and the request of a row.
__host__ __device__ __forceinline__ std::int64_t all_rows(const Params& p) {
  return p.batch_size * kNextN;
}

template <typename Row>
__device__ __forceinline__ Row request_of(Row row) {
  return row / kNextN;
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

// ---- how far rows are written: to the request's length in each backend -------------------------------------------
// Live columns: the first seq_len columns of a row, within the table. Each backend adds its own offset to seq_len.
// `reach` represents all backends: it is the length in the backend with the largest offset, capped where even the
// backend with the smallest one reaches the end of the table.
struct Ends {
  const Params& p;
  int reach;
};

__device__ __forceinline__ int row_reach(const Params& p, std::int64_t request) {
  const std::int64_t length = std::int64_t{request_length(p, request)} + kLongestOffset;
  const std::int64_t limit = p.columns + (kLongestOffset - kShortestOffset);
  return static_cast<int>(length < 0 ? 0 : length < limit ? length : limit);
}

__device__ __forceinline__ Ends ends_at(const Params& p, int reach) {
  return {p, reach};
}

// The end in a backend that adds `offset`.
__device__ __forceinline__ int end_with(Ends ends, std::int32_t offset) {
  const int length = ends.reach - (kLongestOffset - offset);
  return length < 0 ? 0 : length < ends.p.columns ? length : static_cast<int>(ends.p.columns);
}

__device__ __forceinline__ int longest_end(Ends ends) {
  return end_with(ends, kLongestOffset);
}

// A table that all backends share is written up to the longest backend's end.
template <int N>
__device__ __forceinline__ bool ends_differ(const Table (&)[N], Ends) {
  return N == kBackends;
}

template <int N>
__device__ __forceinline__ int shortest_end(const Table (&)[N], Ends ends) {
  return end_with(ends, N == kBackends ? kShortestOffset : kLongestOffset);
}

template <int N>
__device__ __forceinline__ int end_of(const Table (&)[N], Ends ends, int b) {
  return end_with(ends, N == kBackends ? length_offset(b) : kLongestOffset);
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

// ---- tables of pages, without a table of tokens ------------------------------------------------------------------
// The columns of a tile are pages.
[[maybe_unused]] __device__ __forceinline__ int written_columns(const Params& p, Ends ends) {
  return kFillsPages ? static_cast<int>(row_columns(p)) : pages_of(longest_end(ends));
}

__device__ __forceinline__ int alignment_offset(const Params&, std::int64_t) {
  return 0;
}

__host__ __device__ __forceinline__ std::int64_t largest_offset(const Params&) {
  return 0;
}

// Stores this lane's pages of a tile to one table.
template <int kPages, int N>
__device__ __forceinline__ void store_pages(
    const Params& p, const Table (&to)[N], int pages_per_column, std::int64_t row,
    const std::int32_t (&numbers)[kPages], int first, Ends ends) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const int live = pages_of(end_of(to, ends, b));
    const std::int64_t stop = kFillsPages ? row_columns(p) : live;
    std::int32_t* data = to[b].data + row * to[b].row_stride;
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int page = first + lane + i * kWarpSize;
      const bool dead = kFillsPages && ends_differ(to, ends) && page >= live;
      if (page < stop && page % pages_per_column == 0) {
        put(data + page / pages_per_column, dead ? kPageFill : floor_div(numbers[i], pages_per_column));
      }
    }
  }
}

// Reads the numbers of this lane's pages of a tile; those beyond the longest backend's end are kPageFill.
template <int kPages>
__device__ __forceinline__ void read_page_numbers(
    const Params& p, std::int64_t pool_row, std::int32_t (&numbers)[kPages], int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int end = pages_of(longest_end(ends));
#pragma unroll
  for (int i = 0; i < kPages; ++i) {
    const int page = first + lane + i * kWarpSize;
    numbers[i] = page < end ? page_of(__ldg(source + static_cast<std::int64_t>(page) * kPageSize)) : kPageFill;
  }
}

template <int kPages>
__device__ __forceinline__ void write_page_numbers(
    const Params& p, std::int64_t row, const std::int32_t (&numbers)[kPages], int first, Ends ends) {
  for_each_page_table(p, [&](const auto& table, int pages_per_column) {
    store_pages(p, table, pages_per_column, row, numbers, first, ends);
  });
}

// ---- tables of pages alone, all of which is written --------------------------------------------------------------
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  std::int32_t numbers[kTiles * kTileColumns / kWarpSize];
  read_page_numbers(p, pool_row, numbers, first, ends);
  write_page_numbers(p, row, numbers, first, ends);
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

// ---- strategy: live columns --------------------------------------------------------------------------------------
// Live columns: the first seq_len columns of a row. The cost follows them, not the tables' width. Each row has warps of
// its own, which take its first tiles, one each: the own tiles. All further tiles of a long row are remainder tiles,
// which the warps of other blocks take in turn. The rows of a request share nothing: each begins at an alignment of its
// own, and what one reads, the others find in the L2 cache.
//
//   blocks  0 .. kFirstTableBlock - 1   then split.own_blocks          then the other blocks
//          +---------------------------+-----------------------------+---------------------------+
//          | vectors and schedules     | own tiles, one per warp     | remainder tiles, in turn  |
//          +---------------------------+-----------------------------+---------------------------+
//
//   row 0  [  own tile  ][  own tile  ][ remainder  ][ remainder  ][ rem        a long row
//   row 1  [  own tile  ][  ow                                                  a short row
//   row 2  [  own tile  ][  own tile  ][ remai
//          ^ column 0, less the alignment offset    ^ end of the live columns
//
// A warp with an own tile reads no other request's length: short rows need nothing else, and every instruction before
// the first load costs time. Remainder tiles start at the same time, so a long row among short ones doesn't wait for
// its own warps. Every block that takes remainder tiles counts all of them, so that no warp gets more than its share,
// however uneven the rows are. For pages alone, a block counts those of its group's rows.
constexpr int kSpreadRounds = 3;  // spread a row over more SMs if its own blocks finish within this many rounds
constexpr int kManyBlocks = 8;  // from this many blocks per row, stripe remainder tiles over all blocks
constexpr std::uint32_t kNearWarps = kWarps < 2 ? kWarps : 2;  // warps that still take neighbouring tiles if spread

// How a launch divides the work. Computed by the host: a thread would need dozens of dependent instructions to divide
// by a number that isn't constant. It is the kernel's first parameter, so that what a thread needs before its first
// load lies in one line of the constant cache.
struct Split {
  std::uint32_t own_blocks;  // blocks whose warps have own tiles; the others take remainder tiles
  std::uint32_t reciprocal;  // (2^32 - 1) / rows
  std::uint32_t rows;  // of all requests
  std::int32_t wide_from;  // beyond this many columns, a row's own warps take kWideTiles tiles at once
  std::uint32_t own_tiles;  // per row: one for each of its own warps
  std::uint8_t all_own;  // whether own tiles reach the end of every row
  std::uint8_t spread;  // whether a block's warps take distant tiles of a row
  std::uint8_t spread_remainder;  // whether remainder tiles are striped over all blocks
  std::uint8_t log2_warps_per_row;  // within a block
};

__device__ __forceinline__ void copy_remainder(const Params& p, const Split& split) {
  const int row_count = static_cast<int>(all_rows(p));
  const int slot = static_cast<int>(threadIdx.x);
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  std::uint32_t blocks = gridDim.x - kFirstTableBlock - split.own_blocks;
  std::uint32_t block = blockIdx.x - kFirstTableBlock - split.own_blocks;
  int log2_groups = 0;
  int first = -kThreads;  // the window's first row; there is no window yet
  if constexpr (kPagesAlone) {
    // Rows of pages seldom have a remainder, so to count takes longest. The blocks form groups, each for every
    // groups-th row: as many as leave no thread two rows to count, while there are blocks for them.
    while (kThreads << log2_groups < row_count && 2u << log2_groups <= blocks) ++log2_groups;
    first = static_cast<int>(block & ((1u << log2_groups) - 1)) - (kThreads << log2_groups);
    block >>= log2_groups;
    blocks >>= log2_groups;
    if (block >= blocks) return;  // the last blocks make no whole group
  }
  const std::uint32_t warps = blocks * kWarps;
  std::uint32_t tile = split.spread_remainder ? warp * blocks + block : block * kWarps + warp;
  // Every block counts the remainder tiles of a window of rows; the warps of all blocks take them in turn.
  __shared__ Window window;
  __shared__ std::int32_t reaches[kThreads];  // how far a row is written
  __shared__ std::int32_t begins[kThreads];  // the first column of its remainder
  __shared__ std::int64_t pool_rows[kThreads];
  std::uint32_t window_tiles = 0;  // the window's tiles, or wide tiles, that the warps take in turn
  std::uint32_t warp_end = 0;
  bool wide = false;  // whether a warp takes kWideTiles tiles at once
  const int own_columns = static_cast<int>(split.own_tiles) * kTileColumns;
  while (true) {
    while (tile >= window_tiles) {
      tile -= window_tiles;  // the turn goes on with the next window's tiles, so that all warps get equally many
      first += kThreads << log2_groups;
      if (first >= row_count) return;
      const int row = first + (slot << log2_groups);
      int reach = 0;
      int begin = 0;
      std::uint32_t tiles = 0;
      std::int64_t pool_row = -1;
      if (row < row_count) {
        const int request = request_of(row);
        pool_row = request_row(p, request);
        reach = row_reach(p, request);
        const int columns = written_columns(p, ends_at(p, reach));
        const int offset = alignment_offset(p, row);
        begin = (columns + offset > split.wide_from ? kWideTiles * own_columns : own_columns) - offset;
        if (columns > 0 && columns > begin && pool_row >= 0) {
          tiles = static_cast<std::uint32_t>(columns - begin - 1) / (kWideTiles * kTileColumns) + 1;
        }
      }
      if (first > 0) __syncthreads();  // all warps are done with the previous window
      pool_rows[slot] = pool_row;
      reaches[slot] = reach;
      begins[slot] = begin;
      window_tiles = count_tiles(window, tiles, warp_end);
      if constexpr (kWideTiles > 1) {
        wide = window_tiles * kWideTiles > warps;
        if (!wide) window_tiles *= kWideTiles;
      }
    }
    const Place place = find_tile(window, warp_end, wide ? tile : tile / kWideTiles);
    const int row = first + (place.slot << log2_groups);
    const std::int64_t pool_row = pool_rows[place.slot];
    const Ends ends = ends_at(p, reaches[place.slot]);
    int column = begins[place.slot] + static_cast<int>(place.tile) * kWideTiles * kTileColumns;
    if (wide) {
      copy_tile<kWideTiles>(p, row, pool_row, column, ends);
    } else {
      column += static_cast<int>(tile % kWideTiles) * kTileColumns;
      if (kWideTiles == 1 || column < written_columns(p, ends)) copy_tile<1>(p, row, pool_row, column, ends);
    }
    tile += warps;
  }
}

__device__ void write_tables(const Params& p, const Split& split) {
  const std::uint32_t block = blockIdx.x - kFirstTableBlock;
  if (block < split.own_blocks) {
    const std::uint32_t warp = threadIdx.x / kWarpSize;
    const std::uint32_t place = (block * kWarps + warp) >> split.log2_warps_per_row;
    const std::uint32_t round = __umulhi(place + 1, split.reciprocal);  // place / rows
    const std::uint32_t row = place - round * split.rows;
    const std::uint32_t request = request_of(row);
    const std::int64_t pool_row = request_row(p, request);
    const int reach = row_reach(p, request);
    const Ends ends = ends_at(p, reach);
    int columns = written_columns(p, ends);
    std::uint32_t tile = (round << split.log2_warps_per_row) + (warp & ((1u << split.log2_warps_per_row) - 1));
    // If a block took only neighbouring tiles, a few rows would keep only a few SMs busy.
    if (split.spread) {
      tile = warp / kNearWarps * (split.own_tiles / (kWarps / kNearWarps)) + round * kNearWarps + warp % kNearWarps;
    }
    if (pool_row < 0) columns = 0;  // tested here, so that the compiler loads the row beside the length, not after it
    if (tile >= split.own_tiles) columns = 0;  // warps of the last block that have no row
    const int offset = alignment_offset(p, row);
    if constexpr (kWideTiles > 1) {
      if (columns + offset > split.wide_from) {
        const int column = kWideTiles * static_cast<int>(tile) * kTileColumns - offset;
        if (column < columns) copy_tile<kWideTiles>(p, row, pool_row, column, ends);
        return;
      }
    }
    const int column = static_cast<int>(tile) * kTileColumns - offset;
    if (column < columns && columns > 0) copy_tile<1>(p, row, pool_row, column, ends);
    return;
  }
  if (!split.all_own) copy_remainder(p, split);
}

// ---- host side of the strategy
// Blocks for the tables: enough for all tiles of rows of maximum length, up to a limit that follows from the device.
std::int64_t table_blocks(const Params& p) {
  const std::int64_t tiles = all_rows(p) * ((row_columns(p) + largest_offset(p) - 1) / kTileColumns + 1);
  std::int64_t blocks = (tiles + kWarps - 1) / kWarps;
  // With few tiles, only kNearWarps warps of a block have work, and more SMs take part.
  const std::int64_t spread = (tiles + kNearWarps - 1) / kNearWarps;
  if (blocks < p.sm_count) blocks = spread < p.sm_count ? spread : p.sm_count;
  const std::int64_t limit = p.sm_count * kBlocksPerSm;
  if (blocks > limit) blocks = limit;
  return blocks > 1 ? blocks : 1;
}

Split split_of(const Params& p) {
  const std::int64_t blocks = table_blocks(p);
  const std::int64_t rows = all_rows(p) > 0 ? all_rows(p) : 1;
  const std::int64_t columns = row_columns(p);
  std::int64_t share = blocks / rows;  // blocks per row
  const bool all_own = columns <= share * kWarps * kWideTiles * kTileColumns - largest_offset(p);
  const bool spread = columns <= kSpreadRounds * share * kWarps * kTileColumns;
  const bool many = blocks >= kManyBlocks * rows;
  // Unless all tiles are own tiles, half of the blocks get own tiles and the other half get remainder tiles.
  const std::int64_t half = blocks / 2;
  if (!all_own) share = half / rows;
  std::int64_t own_blocks = share * all_rows(p);
  std::int64_t own_tiles = share * kWarps;
  std::uint8_t log2_warps = 0;
  while (1 << log2_warps < kWarps) ++log2_warps;
  if (share == 0) {
    // Fewer blocks than rows: several rows share a block, and each gets fewer of its warps.
    own_tiles = kWarps;
    for (own_blocks = rows; own_blocks > half && own_tiles > 1; own_blocks = (own_blocks + 1) / 2) {
      own_tiles /= 2;
      --log2_warps;
    }
    // The kernel's division by the reciprocal is exact only up to 65,535 rows.
    if (own_blocks > half || rows > 0xffff) own_blocks = own_tiles = 0;
  }
  Split split{};
  split.own_blocks = static_cast<std::uint32_t>(own_blocks);
  split.reciprocal = static_cast<std::uint32_t>(std::int64_t{0xffffffff} / rows);
  split.rows = static_cast<std::uint32_t>(all_rows(p));
  // With few warps per row, switch to wide tiles at a shorter length.
  const std::int64_t rounds = all_own || share == 0 ? 1 : many ? 3 : 2;
  split.wide_from = static_cast<std::int32_t>(rounds * own_tiles * kTileColumns);
  split.own_tiles = static_cast<std::uint32_t>(own_tiles);
  split.all_own = all_own;
  split.spread = spread && share > 0;
  split.spread_remainder = many;
  split.log2_warps_per_row = log2_warps;
  return split;
}

unsigned grid_blocks(const Params& p, const Split& split) {
  const std::int64_t blocks = table_blocks(p);
  // With few blocks per row the remainder may be long, unless it is of pages alone. More blocks than can be resident
  // start when the blocks of short rows end.
  const bool more = !kPagesAlone && !split.all_own && !split.spread_remainder;
  return static_cast<unsigned>(kFirstTableBlock + blocks + (more ? blocks / 2 : 0));
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  RunningSum<std::uint32_t> cu_seqlens_k_sum;
  if (threadIdx.x == 0) store(p.cu_seqlens_k, b, 0, 0);
  // Lengths are read a chunk ahead: a chunk's sums take as long as to read the next one.
  const auto length_of = [&](unsigned request) {
    return request < static_cast<unsigned>(batch_size) ? request_length(p, request) : 0;
  };
  std::int32_t next_len = length_of(threadIdx.x);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = next_len;
    next_len = length_of(request + kThreads);
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::uint32_t cu_seqlens_k_end = cu_seqlens_k_sum.add(bits(seq_len));
    if (!present) continue;
    store(p.cache_seqlens, b, request, seq_len);
    store(p.cu_seqlens_k, b, request + 1, wrap(cu_seqlens_k_end));
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n3_94effb8c2a40aec5(
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
int onelaunch_broadcast_decode_n3_94effb8c2a40aec5_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    config.gridDim = dim3(grid_blocks(params, split), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_94effb8c2a40aec5, split, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_94effb8c2a40aec5_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_94effb8c2a40aec5);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_94effb8c2a40aec5_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
