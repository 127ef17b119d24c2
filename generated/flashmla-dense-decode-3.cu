// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show flashmla-dense-decode-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, real_page_table, flashmla_metadata, num_splits
//   distinct                all
//   target                  cuda
//   checked                 False
//   page_fill               -1
// key d7c39656c367a96ba4fc885d91ad7dec16260be2786f7b0977db88ecf62b195d

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
constexpr int kFirstTableBlock = 2 * kLengthSets;  // the blocks before it compute vectors and schedules
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
constexpr int kNextN = 1;  // rows per request
constexpr int kMaxSmParts = 512;  // capacity of the shared arrays
constexpr int kFlashMlaOrder = 2026;  // order of a part's words: FlashMLA's of 2026 or of 2025
constexpr bool kHasNumSplits = true;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kWideTiles = 1;  // tiles that a warp takes at once where every warp has work
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kPageSize = 64;  // tokens
constexpr int kPageShift = 6;  // log2(kPageSize), if kPageSize is a power of two
constexpr bool kFillsPages = true;  // whether columns after the live ones are filled
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
  std::int64_t real_page_table_width;  // columns
  std::int64_t num_sm_parts;  // parts of FlashMLA's schedule
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* flashmla_metadata[kBackends];  // [num_sm_parts, 8]
  std::int32_t* num_splits[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 28;
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

// The number of columns of each table row, at any request length: in pages.
__host__ __device__ __forceinline__ std::int64_t row_columns(const Params& p) {
  return p.real_page_table_width;
}

// A range of rows of the tables, and of the vectors that have one element per row.
struct Rows {
  std::int64_t first, stop;
};

// The rows of a request.
__device__ __forceinline__ Rows rows_of(std::int64_t request) {
  return {request * kNextN, (request + 1) * kNextN};
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

// ---- storing an element ------------------------------------------------------------------------------------------
// Stores one element of a vector or a schedule to every backend; where the backends' lengths differ, to backend b.
// The destinations decide the type: to a bool goes whether the value isn't 0.
template <typename T, int N>
__device__ __forceinline__ void store(T* const (&to)[N], int b, std::int64_t index, std::common_type_t<T> value) {
  if constexpr (kLengthSets > 1) {
    to[b][index] = value;
  } else {
#pragma unroll(unrolled(N))
    for (int i = 0; i < N; ++i) to[i][index] = value;
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

// ---- FlashMLA's schedule -----------------------------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of kThreads requests, so the batch has no limit. The parts take the
// requests' blocks in order, so one thread walks along them. If the current part has room for what remains of the
// chunk, the walk skips it; otherwise a search with doubling steps finds the last request that fits. So there is one
// turn per part and per chunk. The walk records where each part begins; all threads derive the entries from that.
constexpr int kMlaBlock = 64;  // tokens
constexpr int kMlaOverhead = 5;  // fixed cost of a request in a part, in blocks

// Where the parts begin, in shared memory.
struct Parts {
  std::int32_t request[kMaxSmParts];
  std::int32_t block[kMaxSmParts];  // within that request
  std::int32_t split[kMaxSmParts];  // splits of that request in earlier parts
  std::int32_t cuts[kMaxSmParts];  // parts up to and including this one that begin within a request; -1 after the last
};

__device__ __forceinline__ std::int32_t mla_blocks(const Params& p, int request, int b) {
  const std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// The cost of a request in blocks, unless a part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request, int b) {
  return static_cast<std::uint64_t>(mla_blocks(p, request, b) + kMlaOverhead);
}

// Fills `begin`; ends with a barrier.
__device__ __forceinline__ void walk_parts(const Params& p, int b, Parts& begin) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  std::uint64_t cost = 0;
  for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request, b);
  std::uint64_t total;
  block_running_sum(cost, total);
  const std::uint64_t share = (total + static_cast<std::uint64_t>(parts) - 1) / static_cast<std::uint64_t>(parts);
  const std::int64_t payload = static_cast<std::int64_t>(share) + kMlaOverhead;

  __shared__ std::int64_t ends[kThreads];  // cost of all requests up to and including one of the chunk
  // The state of the walk; only thread 0 uses it.
  std::int64_t place = 0;  // cost taken so far, without that of splitting
  std::int64_t remain = payload;
  int part = 0;
  std::int32_t block = 0, split = 0, cut = 0;
  for (int i = slot; i < parts; i += kThreads) {
    // The values of parts that the walk doesn't reach; it overwrites the others.
    begin.request[i] = i == 0 ? 0 : batch_size;
    begin.block[i] = begin.split[i] = 0;
    begin.cuts[i] = i == 0 ? 0 : -1;
  }
  RunningSum<std::uint64_t> cost_sum;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    // The sum's barriers come after the walk's last read of the previous chunk's ends.
    ends[slot] = static_cast<std::int64_t>(cost_sum.add(request < batch_size ? mla_cost(p, request, b) : 0));
    __syncthreads();
    const int count = batch_size - first < kThreads ? batch_size - first : kThreads;
    int at = 0;  // the chunk's first request that isn't done
    while (slot == 0 && at < count) {
      const std::int64_t limit = place + remain;
      const int from = at;
      if (ends[count - 1] <= limit) {
        at = count;
      } else {
        int step = 1;
        for (; at + step <= count && ends[at + step - 1] <= limit; step *= 2) at += step;
        for (step /= 2; step > 0; step /= 2) {
          if (at + step <= count && ends[at + step - 1] <= limit) at += step;
        }
      }
      if (at > from) {
        place = ends[at - 1];
        remain = limit - place;
        block = split = 0;
      }
      if (at == count) break;
      // The part ends here, with as many blocks of this request as still fit.
      if (remain > kMlaOverhead) {
        place += remain - kMlaOverhead;
        block += static_cast<std::int32_t>(remain - kMlaOverhead);
        ++split;
        ++cut;
      }
      remain = payload;
      ++part;
      begin.request[part] = first + at;
      begin.block[part] = block;
      begin.split[part] = split;
      begin.cuts[part] = cut;
    }
  }
  __syncthreads();
}

// A request has one split, and one more for each part that begins within it. A template, because Params has num_splits
// only if it is a field.
template <typename P>
__device__ __forceinline__ void write_num_splits(const P& p, int b, const Parts& begin) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int request = static_cast<int>(threadIdx.x) - 1; request < batch_size; request += kThreads) {
    int found = 0;  // the last part that begins in this request or before it
    if (request >= 0) {
      for (int step = kMaxSmParts / 2; step > 0; step /= 2) {
        const int part = found + step;
        if (part < parts && begin.cuts[part] >= 0 && begin.request[part] <= request) found = part;
      }
    }
    store(p.num_splits, b, request + 1, request + 1 + (request >= 0 ? begin.cuts[found] : 0));
  }
}

__device__ void schedule_flashmla(const Params& p, int b) {
  __shared__ Parts begin;
  walk_parts(p, b, begin);
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin.block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin.request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    const std::int32_t blocks_of_last = last >= 0 ? mla_blocks(p, last, b) : 0;
    const std::int32_t stop = ends_within ? begin.block[i + 1] : blocks_of_last;
    const std::int32_t request = begin.request[i];
    const std::int32_t block = begin.block[i];
    if constexpr (kFlashMlaOrder == 2026) {
      const bool first_is_split = block != 0;
      const bool last_is_split = stop != blocks_of_last;
      const std::int32_t begins_split = first_is_split || (request == last && last_is_split);
      const std::int32_t ends_split = last_is_split || (request == last && first_is_split);
      const std::int32_t row[8] = {request, last, block, stop, begin.split[i], begins_split, ends_split, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    } else {
      const std::int32_t row[8] = {request, block, last, stop, begin.split[i], 0, 0, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    }
  }
  if constexpr (kHasNumSplits) write_num_splits(p, b, begin);
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

// ---- tables of pages, without a table of tokens ------------------------------------------------------------------
// The columns of a tile are pages.
[[maybe_unused]] __device__ __forceinline__ int written_columns(const Params& p, Ends ends) {
  return kFillsPages ? static_cast<int>(row_columns(p)) : pages_of(longest_end(ends));
}

__device__ __forceinline__ int alignment_offset(const Params&, std::int64_t) {
  return 0;
}

inline std::int64_t largest_offset(const Params&) {
  return 0;
}

// Stores this lane's pages of a tile to one table.
template <int kWords, int N>
__device__ __forceinline__ void store_pages(
    const Params& p, const Table (&to)[N], int pages_per_column, Rows rows, const std::int32_t (&numbers)[kWords],
    int first, Ends ends) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const int live = pages_of(end_of(to, ends, b));
    const std::int64_t stop = kFillsPages ? row_columns(p) : live;
    for (std::int64_t row = rows.first; row < rows.stop; ++row) {
      std::int32_t* data = to[b].data + row * to[b].row_stride;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int page = first + lane + i * kWarpSize;
        const bool dead = kFillsPages && ends_differ(to, ends) && page >= live;
        if (page < stop && page % pages_per_column == 0) {
          data[page / pages_per_column] = dead ? kPageFill : floor_div(numbers[i], pages_per_column);
        }
      }
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void copy_tile(const Params& p, Rows rows, std::int64_t pool_row, int first, Ends ends) {
  static_assert(kTiles == 1);
  constexpr int kWords = kTileColumns / kWarpSize;
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int end = pages_of(longest_end(ends));
  std::int32_t numbers[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int page = first + lane + i * kWarpSize;
    numbers[i] = page < end ? page_of(__ldg(source + static_cast<std::int64_t>(page) * kPageSize)) : kPageFill;
  }
  for_each_page_table(p, [&](const auto& table, int pages_per_column) {
    store_pages(p, table, pages_per_column, rows, numbers, first, ends);
  });
}

// ---- strategy: rows of equal length ------------------------------------------------------------------------------
// Every row has the same number of tiles, whatever the requests' lengths. Warp row * tiles + i takes tile i of a row,
// and no other: a loop would make the compiler fetch the constants of all destinations before the first load.
//
//   block   0 .. kFirstTableBlock   0             1             2
//          +-----------------------+-------------+-------------+-------------+
//          | vectors, schedules    | tiles 0-7   | tiles 8-15  | tiles 16-23 |   with kWarps = 8
//          +-----------------------+-------------+-------------+-------------+
constexpr int kWideFrom = 12;  // from this many tiles per SM, a warp takes kWideTiles tiles at once
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
  if (row >= p.batch_size || column >= columns) return;
  const std::int64_t pool_row = request_row(p, row);
  if (pool_row < 0) return;
  const Ends ends = ends_at(p, row_reach(p, row));
  if (tile_columns > kTileColumns) {
    copy_tile<kWideTiles>(p, rows_of(row), pool_row, column, ends);
  } else {
    copy_tile<1>(p, rows_of(row), pool_row, column, ends);
  }
}

// ---- host side of the strategy
Split split_of(const Params& p) {
  const std::int64_t columns = row_columns(p);
  // A warp takes several tiles at once if that leaves enough for all warps.
  const bool wide = p.batch_size * columns >= p.sm_count * kWideFrom * kTileColumns;
  const std::int64_t tile_columns = wide ? kWideTiles * kTileColumns : kTileColumns;
  const std::int64_t tiles = (columns + largest_offset(p) - 1) / tile_columns + 1;
  // With few tiles, only half of a block's warps take them, so that twice as many blocks take part.
  std::uint32_t warps = p.batch_size * tiles < p.sm_count * kSpreadTiles ? (kWarps + 1) / 2 : kWarps;
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
  const std::int64_t tiles = p.batch_size * std::int64_t{split.tiles};
  const std::int64_t blocks = split.warps > 0 ? (tiles + split.warps - 1) / split.warps : 0;
  return static_cast<unsigned>(kFirstTableBlock + (blocks > 1 ? blocks : 1));
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  const std::int32_t offset = length_offset(b);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    if (!present) continue;
    store(p.cache_seqlens, b, request, seq_len);
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n3_d7c39656c367a96b(
    const __grid_constant__ Split split, const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return schedule_flashmla(p, block);
  block -= kLengthSets;
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
int onelaunch_broadcast_decode_n3_d7c39656c367a96b_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    config.gridDim = dim3(grid_blocks(params, split), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_d7c39656c367a96b, split, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_d7c39656c367a96b_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_d7c39656c367a96b);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_d7c39656c367a96b_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
