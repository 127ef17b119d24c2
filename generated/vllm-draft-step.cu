// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show vllm-draft-step
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            1
//   fields                  cache_seqlens, page_indices, paged_mqa_schedule_metadata, decode_lens,
//                           per_req_decode_lens, request_of_token_0, slots_0, slots_1
//   distinct                all
//   target                  cuda
//   checked                 False
//   declare                 block_0 = vector('table_0(idx, entry_0)', per='request', dtype='int64', missing=-1);
//                           block_1 = vector('table_1(idx, entry_1)', per='request', dtype='int64', missing=-1);
//                           decode_lens = vector('1', per='request'); entry_0 = vector('position // size_0',
//                           per='request', dtype='int64'); entry_1 = vector('position // size_1', per='request',
//                           dtype='int64'); offset_0 = vector('position % size_0', per='request', dtype='int64');
//                           offset_1 = vector('position % size_1', per='request', dtype='int64'); per_req_decode_lens
//                           = vector('1', per='request'); request_of_token_0 = vector('where(query_end_0(request) >
//                           request, request, last)', per='request'); slots_0 = vector('max(block_0 * size_0 +
//                           offset_0, -1)', per='request', dtype='int64', pad=-1); slots_1 = vector('max(block_1 *
//                           size_1 + offset_1, -1)', per='request', dtype='int64', pad=-1)
//   inputs                  idx: int64, last: int32, position: int64
//   constants               size_0: 64, size_1: 16
//   sources                 table_0: int32, table_1: int32
//   maps                    query_end_0: ['int32', 0]
//   seq_lens_dtype          int32
//   extent                  full
//   req_pool_indices_dtype  int32
// key 777f9ba70c10e5281c210c7ce722a042e952343247d24dcf97eb525cdd2a08ec

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
constexpr int kFirstTableBlock = kLengthSets + kLengthSets;  // other blocks come first
using SeqLen = std::int32_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
constexpr int kNextN = 1;  // rows per request
constexpr int kIndexKpool = 1;  // tokens, or pages, per pool
constexpr bool kItemIsRow = false;  // whether an item of DeepGEMM's schedule is a row; otherwise it is a request
constexpr std::uint32_t kAtoms = 1;  // query atoms per item; with a kSplitCost query tokens
constexpr std::uint32_t kSplitCost = 0;  // units of work per split of an item; 0 for one per atom
constexpr bool kRemainderLast = true;  // whether the last SMs get one unit more; otherwise the first do
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kWideTiles = 2;  // tiles that a warp takes at once where every warp has work
constexpr bool kEqualRows = true;  // whether all rows are written up to the same column
using PoolIndex = std::int32_t;
using Token = std::int32_t;
constexpr std::int32_t user_size_0 = 64;  // declared
constexpr std::int32_t user_size_1 = 16;  // declared

// ---- arguments ---------------------------------------------------------------------------------------------------
struct Table {
  std::int32_t* data;
  std::int64_t row_stride;  // elements
};

// What formulas look up: a table with a row for a request, or a map.
template <typename T>
struct Source {
  const T* data;
  std::int64_t rows, row_stride, columns;
};

template <typename T>
struct Map {
  const T* data;
  std::int64_t size;
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It is passed by value, which
// needs no pointer table in device memory and no copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  const PoolIndex* req_pool_indices;  // [batch_size], rows of req_to_token
  std::int64_t req_pool_indices_stride;  // elements
  const std::int64_t* user_idx;  // [batch_size], declared
  std::int64_t user_idx_stride;  // elements
  const std::int32_t* user_last;  // [batch_size], declared
  std::int64_t user_last_stride;  // elements
  const std::int64_t* user_position;  // [batch_size], declared
  std::int64_t user_position_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t captured_size;  // requests, padding included
  std::int64_t columns;  // columns from here on are not written
  // set when a plan is bound
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  std::int64_t req_to_token_width;  // elements of a row that may be read
  Table page_indices[kBackends];  // [bs, W]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int64_t pool_rows;  // rows of req_to_token
  Source<std::int32_t> user_table_0;  // [rows, columns], declared
  Source<std::int32_t> user_table_1;  // [rows, columns], declared
  Map<std::int32_t> user_query_end_0;  // [elements], declared
  std::int64_t num_sms;  // SMs that DeepGEMM's schedule is for
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* paged_mqa_schedule_metadata[kBackends];  // [num_sms + 1, 2]
  std::int32_t* user_decode_lens[kBackends];  // [bs]
  std::int32_t* user_per_req_decode_lens[kBackends];  // [bs]
  std::int32_t* user_request_of_token_0[kBackends];  // [bs]
  std::int64_t* user_slots_0[kBackends];  // [bs]
  std::int64_t* user_slots_1[kBackends];  // [bs]
};
constexpr int kParamWords = 39;
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

__device__ __forceinline__ std::int64_t user_idx_of(const Params& p, std::int64_t request) {
  return p.user_idx[request * p.user_idx_stride];
}

__device__ __forceinline__ std::int32_t user_last_of(const Params& p, std::int64_t request) {
  return p.user_last[request * p.user_last_stride];
}

__device__ __forceinline__ std::int64_t user_position_of(const Params& p, std::int64_t request) {
  return p.user_position[request * p.user_position_stride];
}

// Unchecked: a look-up outside of its source isn't reported.
__device__ __forceinline__ void check_look_up(const Params&, std::int64_t, std::int64_t, std::int64_t) {}

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

// ---- remainder ---------------------------------------------------------------------------------------------------
// The remainder of floor_div, as Python's %: 0 or more, and less than the divisor, which is positive.
template <typename T>
__device__ __forceinline__ T floor_mod(T value, int divisor) {
  const T remainder = value % divisor;
  return remainder < 0 ? remainder + divisor : remainder;
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

// ---- look-ups of formulas ----------------------------------------------------------------------------------------
// What isn't there isn't read, and yields `missing`, whose type is the formula's.
template <typename Value, typename T>
__device__ __forceinline__ Value look_up(
    const Params& p, std::int64_t request, const Source<T>& source, std::int64_t row, std::int64_t column,
    Value missing) {
  check_look_up(p, request, row, source.rows);
  check_look_up(p, request, column, source.columns);
  const bool there = row >= 0 && row < source.rows && column >= 0 && column < source.columns;
  return there ? static_cast<Value>(__ldg(source.data + row * source.row_stride + column)) : missing;
}

template <typename Value, typename T>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Map<T>& map, std::int64_t index, Value missing) {
  check_look_up(p, request, index, map.size);
  return index >= 0 && index < map.size ? static_cast<Value>(__ldg(map.data + index)) : missing;
}

// ---- lengths of rows ---------------------------------------------------------------------------------------------
// How many tokens row `row` of a request with `rows` rows attends to: the last row all seq_len, each row before it one
// fewer. Never negative, because consumers read it as unsigned; a padding request has fewer tokens than rows.
__device__ __forceinline__ std::int32_t expanded_length(std::int32_t seq_len, int rows, int row) {
  const std::int32_t length = wrap(bits(seq_len) - rows + row + 1);
  return length > 0 ? length : 0;
}

// ---- DeepGEMM's schedule of paged MQA logits ---------------------------------------------------------------------
// One block computes it from seq_lens, for any batch. An item is a request, or a row of one, with one split for every
// kSplit tokens (or pools). On sm_90 an item has a number of query atoms, each with the item's splits, one unit of
// work each. On sm_100 the item's tokens share its splits, kSplitCost units each. Every SM gets the same number of
// units, and the last or the first SMs get one unit more. An SM begins with the split that contains its first unit.
constexpr std::uint32_t kSplit = 256;  // tokens, or pools

constexpr std::uint32_t kWorkOfSplit = kSplitCost > 0 ? kSplitCost : kAtoms;

// The splits of an item, or of one of its atoms.
__device__ __forceinline__ std::uint32_t mqa_splits(const Params& p, int item, int b) {
  const int request = kItemIsRow ? item / kNextN : item;
  std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  if constexpr (kItemIsRow) length = expanded_length(length, kNextN, item % kNextN);
  if constexpr (kIndexKpool > 1) {
    const std::int32_t pools = floor_div(length, kIndexKpool);
    return ((pools > 1 ? static_cast<std::uint32_t>(pools) : 1u) - 1) / kSplit + 1;
  }
  return length > 0 ? (static_cast<std::uint32_t>(length) - 1) / kSplit + 1 : 0;
}

// How the units of work are shared out. T holds them all; there are fewer than 2^31 SMs.
template <typename T>
struct Shares {
  T units;
  T num_sms;
  T share;
  T more;  // SMs that get one unit more

  __device__ __forceinline__ Shares(const Params& p, T splits)
      : units(splits * kWorkOfSplit), num_sms(static_cast<T>(p.num_sms)) {
    share = units / num_sms;
    more = units - share * num_sms;
  }

  // The first unit of an SM.
  __device__ __forceinline__ T start(T entry) const {
    if constexpr (!kRemainderLast) return entry * share + (entry < more ? entry : more);
    const T even = num_sms - more;  // the first SM that gets one more
    return entry * share + (entry > even ? entry - even : 0);
  }
};

// Writes an SM's entry: it begins in `item`, before which there are `passed` splits.
template <typename T>
__device__ __forceinline__ void write_entry(
    const Params& p, int b, const Shares<T>& shares, T entry, int items, int item, T passed) {
  // The last entry is the end, and so are entries without work.
  T query = static_cast<T>(items) * kAtoms;
  T split = 0;
  const T start = shares.start(entry);
  if (start < shares.units) {
    query = static_cast<T>(item) * kAtoms;
    split = start - passed * kWorkOfSplit;
    if constexpr (kSplitCost > 0) {
      split /= kWorkOfSplit;
    } else if constexpr (kAtoms > 1) {
      const std::uint32_t per_atom = mqa_splits(p, item, b);
      query += split / per_atom;
      split %= per_atom;
    }
  }
  const std::int64_t index = 2 * static_cast<std::int64_t>(entry);
  store(p.paged_mqa_schedule_metadata, b, index, static_cast<std::int32_t>(query));
  store(p.paged_mqa_schedule_metadata, b, index + 1, static_cast<std::int32_t>(split));
}

// The units of so few items fit in 32 bits, which are divided in a third of the time, unless a split costs much.
constexpr int kLaneItems = 2;  // of a lane at most
constexpr std::uint64_t kMostSplits = (std::uint64_t{1} << 31) / kSplit;  // of an item
using FewUnits = std::conditional_t<
    kWarpSize * kLaneItems * kMostSplits * kWorkOfSplit <= 0xffffffffu, std::uint32_t, std::uint64_t>;

// One or two consecutive items a lane: each warp sums them for itself, without shared memory and a barrier. A look-up
// takes two steps, whose shuffles don't wait for one another.
template <int kItems>
__device__ __forceinline__ void schedule_few(const Params& p, int b, int items) {
  constexpr int kAtOnce = 8;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  if (threadIdx.x - static_cast<unsigned>(lane) > p.num_sms) return;  // no lane of the warp has an entry
  const auto splits_of = [&](int item) { return item < items ? mqa_splits(p, item, b) : 0; };
  const std::uint32_t first_splits = splits_of(lane * kItems);  // of the lane's first item
  const std::uint32_t splits = first_splits + (kItems > 1 ? splits_of(lane * kItems + 1) : 0);
  // The shares don't wait for the running sum: they are divided beside it.
  const Shares<FewUnits> shares(p, __reduce_add_sync(kFullMask, splits));
  const std::uint32_t end = warp_running_sum(splits);
  // All lanes take part in a warp's look-ups.
  for (FewUnits entry = threadIdx.x; entry - static_cast<unsigned>(lane) <= shares.num_sms; entry += kThreads) {
    const FewUnits wanted = shares.start(entry) / kWorkOfSplit;
    int found = 0;  // counts the lanes whose items end at or before it
#pragma unroll
    for (int step = kAtOnce; step > 0; step /= kAtOnce) {
      const int first = found;
#pragma unroll
      for (int i = step; i < step * kAtOnce && i < kWarpSize; i += step) {
        if (__shfl_sync(kFullMask, end, first + i - 1) <= wanted) found += step;
      }
    }
    int item = found * kItems;
    FewUnits passed = __shfl_sync(kFullMask, end - splits, found);
    if constexpr (kItems > 1) {
      const FewUnits next = passed + __shfl_sync(kFullMask, first_splits, found);
      if (next <= wanted) {
        passed = next;
        ++item;
      }
    }
    if (entry <= shares.num_sms) write_entry(p, b, shares, entry, items, item, passed);
  }
}

__device__ void schedule_mqa(const Params& p, int b) {
  const int items = static_cast<int>(kItemIsRow ? p.batch_size * kNextN : p.batch_size);
  if (items <= kWarpSize) return schedule_few<1>(p, b, items);
  if (items <= kWarpSize * kLaneItems) return schedule_few<kLaneItems>(p, b, items);
  // Each thread sums consecutive items, and looks up in the sums of all threads.
  const int slot = static_cast<int>(threadIdx.x);
  const int thread_items = (items - 1) / kThreads + 1;
  const auto splits_of = [&](int item) { return item < items ? mqa_splits(p, item, b) : 0; };
  std::uint64_t splits = 0;
  for (int i = 0; i < thread_items; ++i) splits += splits_of(slot * thread_items + i);
  __shared__ std::uint64_t in_warp[kThreads];  // splits up to and including a thread's, within its warp
  __shared__ std::uint64_t of_warp[kWarps];
  const std::uint64_t end = warp_running_sum(splits);
  in_warp[slot] = end;
  if (slot % kWarpSize == kWarpSize - 1) of_warp[slot / kWarpSize] = end;
  __syncthreads();
  std::uint64_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += of_warp[w];
  const Shares<std::uint64_t> shares(p, total);
  for (std::uint64_t entry = threadIdx.x; entry <= shares.num_sms; entry += kThreads) {
    const std::uint64_t wanted = shares.start(entry) / kWorkOfSplit;
    // The warp, the thread and the item that contain it: how many end at or before it.
    std::uint64_t passed = 0;
    int begin = 0;
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w) {
      if (begin < w * kWarpSize || passed + of_warp[w] > wanted) continue;
      passed += of_warp[w];
      begin += kWarpSize;
    }
    int found = begin;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      if (passed + in_warp[found + step - 1] <= wanted) found += step;
    }
    if (found > begin) passed += in_warp[found - 1];
    int item = found * thread_items;
    for (int i = 1; i < thread_items; ++i) {
      const std::uint64_t next = passed + splits_of(item);
      if (next > wanted) break;
      passed = next;
      ++item;
    }
    write_entry(p, b, shares, entry, items, item, passed);
  }
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

// ---- tables of tokens --------------------------------------------------------------------------------------------
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  copy_columns<kTiles>(token_table(p), row, source, static_cast<int>(p.req_to_token_width), first, ends);
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
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int64_t user_idx_int64 = present ? user_idx_of(p, request) : 0;
    [[maybe_unused]] const std::int32_t user_idx = static_cast<std::int32_t>(user_idx_int64);
    [[maybe_unused]] const std::int32_t user_last = present ? user_last_of(p, request) : 0;
    [[maybe_unused]] const std::int64_t user_position_int64 = present ? user_position_of(p, request) : 0;
    [[maybe_unused]] const std::int32_t user_position = static_cast<std::int32_t>(user_position_int64);
    [[maybe_unused]] const std::int64_t pool_row = present ? request_row(p, request) : -1;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int32_t user_request_of_token_0 =
        (look_up(p, request, p.user_query_end_0, request, std::int32_t{0}) > request ? request : user_last);
    const std::int64_t user_entry_0 = floor_div(std::int64_t{user_position_int64}, user_size_0);
    const std::int64_t user_block_0 =
        look_up(p, request, p.user_table_0, std::int64_t{user_idx_int64}, std::int64_t{user_entry_0}, std::int64_t{-1});
    const std::int64_t user_offset_0 = floor_mod(std::int64_t{user_position_int64}, user_size_0);
    const std::int64_t user_slots_0 =
        max(wrap(bits(std::int64_t{user_block_0}) * user_size_0 + user_offset_0), std::int64_t{-1});
    const std::int64_t user_entry_1 = floor_div(std::int64_t{user_position_int64}, user_size_1);
    const std::int64_t user_block_1 =
        look_up(p, request, p.user_table_1, std::int64_t{user_idx_int64}, std::int64_t{user_entry_1}, std::int64_t{-1});
    const std::int64_t user_offset_1 = floor_mod(std::int64_t{user_position_int64}, user_size_1);
    const std::int64_t user_slots_1 =
        max(wrap(bits(std::int64_t{user_block_1}) * user_size_1 + user_offset_1), std::int64_t{-1});
    if (!present) continue;
    store(p.cache_seqlens, b, request, seq_len);
    store(p.user_decode_lens, b, request, 1);
    store(p.user_per_req_decode_lens, b, request, 1);
    store(p.user_request_of_token_0, b, request, user_request_of_token_0);
    store(p.user_slots_0, b, request, user_slots_0);
    store(p.user_slots_1, b, request, user_slots_1);
  }
  // Padding, up to the captured size.
  for (std::int64_t request = batch_size + threadIdx.x; request < p.captured_size; request += kThreads) {
    store(p.user_slots_0, b, request, -1);
    store(p.user_slots_1, b, request, -1);
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n1_777f9ba70c10e528(
    const __grid_constant__ Split split, const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return schedule_mqa(p, block);
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
int onelaunch_broadcast_decode_n1_777f9ba70c10e528_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    config.gridDim = dim3(grid_blocks(params, split), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n1_777f9ba70c10e528, split, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n1_777f9ba70c10e528_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n1_777f9ba70c10e528);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n1_777f9ba70c10e528_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
