// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show nsa-decode-3-schedule
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, page_indices, nsa_cache_seqlens, nsa_cu_seqlens_k,
//                           real_page_table, paged_mqa_schedule_metadata
//   distinct                all
//   target                  cuda
//   checked                 False
// key aa7ba35643393c6356af29e9266c4730506d6ba002feba9b388ee5b8fa503221

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
constexpr int kFirstTableBlock = kLengthSets + kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
constexpr int kNextN = 1;  // rows per request
constexpr std::int32_t kIndexTopk = 2048;  // tokens
constexpr int kIndexKpool = 1;  // tokens, or pages, per pool
constexpr bool kItemIsRow = false;  // whether an item of DeepGEMM's schedule is a row; otherwise it is a request
constexpr std::uint32_t kAtoms = 1;  // query atoms per item; with a kSplitCost query tokens
constexpr std::uint32_t kSplitCost = 0;  // units of work per split of an item; 0 for one per atom
constexpr bool kRemainderLast = true;  // whether the last SMs get one unit more; otherwise the first do
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kBlocksPerSm = 4;  // limits the blocks for the tables
constexpr int kWideTiles = 2;  // tiles that a warp takes at once where every warp has work
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
  std::int64_t num_sms;  // SMs that DeepGEMM's schedule is for
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* nsa_cache_seqlens[kBackends];  // [bs]
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* paged_mqa_schedule_metadata[kBackends];  // [num_sms + 1, 2]
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
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n3_aa7ba35643393c63(
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
int onelaunch_broadcast_decode_n3_aa7ba35643393c63_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    config.gridDim = dim3(grid_blocks(params, split), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_aa7ba35643393c63, split, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_aa7ba35643393c63_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_aa7ba35643393c63);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_aa7ba35643393c63_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
