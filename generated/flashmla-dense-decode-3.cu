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
constexpr int kFirstTableBlock = kLengthSets + kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
constexpr int kNextN = 1;  // rows per request
constexpr int kMaxSmParts = 512;  // capacity of the shared arrays
constexpr int kFlashMlaOrder = 2026;  // order of a part's words: FlashMLA's of 2026 or of 2025
constexpr bool kHasNumSplits = true;
constexpr int kUnroll = 2;  // pages that a thread has in flight
constexpr int kTileColumns = kWarpSize * kUnroll;  // a tile: what one warp moves of a row
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
  std::int64_t filled_width;  // columns
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
  return p.filled_width;
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

// ---- FlashMLA's schedule -----------------------------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of requests, so the batch has no limit. The parts take the requests'
// blocks in order, each as many as share + kMlaOverhead pay for: kMlaOverhead for each request that it ends, and for
// the one that it cuts. In the cost of all blocks and requests before it, part p + 1 begins at
//
//   begin(p + 1) = y = begin(p) + share, or the end of a request in [y, y + kMlaOverhead] if there is one
//
// because an end that near is paid for, and what remains after it is too little to cut the next request. So from an end
// that a part begins at, the next such end is the first at a distance that leaves at most kMlaOverhead when divided by
// share, and the parts between begin at multiples of share. Every thread looks for the next end of one end: a hop. Hops
// over 2, 4, 8 ... ends are joined of shorter ones, and every part takes those that lead to it, the longest first: no
// part waits for the one before it.
constexpr int kMlaBlock = 64;  // tokens
constexpr int kMlaOverhead = 5;  // fixed cost of a request in a part, in blocks
constexpr int kMlaChunk = kThreads < 256 ? kThreads : 256;  // requests
constexpr int kMlaLevels = 9;  // hops over 1, 2, 4 ... 256 ends
constexpr int kMlaGroup = kThreads < 8 ? kThreads : 8;  // ends that a thread tests at once
constexpr std::uint32_t kMlaHop = 1u << 16;  // a hop is the end that it leads to * kMlaHop + the parts until there

// Where the parts begin, in shared memory.
struct Parts {
  std::int32_t request[kMaxSmParts];
  std::int32_t block[kMaxSmParts];  // within that request
  std::int32_t cuts[kMaxSmParts];  // parts up to and including this one that begin within a request
};

// The last part whose begin is known.
struct LastPart {
  std::uint64_t begin;  // in cost
  std::int32_t part;
  std::int32_t cuts;
};

// A chunk of requests, in shared memory. Hops begin at end 0, which is where the last part before the chunk begins, or
// at the end of one of its requests, from 1 on.
struct Chunk {
  std::uint64_t ends[kMlaChunk + 1];  // the cost of all requests up to and including each one
  std::uint32_t
      rests[kMlaChunk];  // what the distance of end i + 1 from end 0 leaves when divided by share; modulo 2^32
  std::uint32_t hops[kMlaLevels][kMlaChunk];  // from each end over 2^level ends; 0 if the chunk has no such end
  LastPart last;
};

__device__ __forceinline__ std::int32_t mla_length(const Params& p, int request, int b) {
  return wrap(bits(request_length(p, request)) + length_offset(b));
}

__device__ __forceinline__ std::int32_t mla_blocks(std::int32_t length) {
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// The cost of a request in blocks, unless a part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request, int b) {
  return static_cast<std::uint64_t>(mla_blocks(mla_length(p, request, b)) + kMlaOverhead);
}

// The last of ascending numbers 0 .. last that is at most `limit`, as number 0 is. `step` is a power of two above
// last / 2.
template <typename T>
__device__ __forceinline__ int last_at_most(const T* numbers, int last, int step, T limit) {
  int found = 0;
  for (; step > 0; step /= 2) {
    if (found + step <= last && numbers[found + step] <= limit) found += step;
  }
  return found;
}

// The hop from an end over one. Ends lie further apart than kMlaOverhead, so that at most one pays for a part.
__device__ __forceinline__ std::uint32_t first_hop(const Chunk& chunk, int count, int end, std::uint64_t share) {
  const std::uint32_t own_rest = end > 0 ? chunk.rests[end - 1] : 0;
  for (int group = end / kMlaGroup * kMlaGroup; group < count; group += kMlaGroup) {
    unsigned near = 0;  // a bit for each end of the group
#pragma unroll
    for (int i = 0; i < kMlaGroup; ++i) {
      const std::uint32_t rest = chunk.rests[group + i] - own_rest;  // or, if that is negative, share more
      near |= min(rest, rest + static_cast<std::uint32_t>(share)) <= kMlaOverhead ? 1u << i : 0;
    }
    if (group < end) near &= ~0u << (end - group);
    for (; near != 0; near &= near - 1) {
      const int next = group + __popc((near & (0u - near)) - 1u) + 1;
      if (next > count) return 0;
      const std::uint64_t distance = chunk.ends[next] - chunk.ends[end];
      // The first part that the end isn't too far from.
      const std::uint64_t parts = (distance - kMlaOverhead - 1) / share + 1;
      if (parts * share > distance) continue;  // near modulo 2^32 only
      return next * kMlaHop + static_cast<std::uint32_t>(parts);
    }
  }
  return 0;
}

// The hop from an end over twice as many ends as on this level.
__device__ __forceinline__ std::uint32_t double_hop(const Chunk& chunk, int count, int level, int end) {
  const std::uint32_t hop = chunk.hops[level][end];
  if (hop == 0 || hop / kMlaHop == static_cast<std::uint32_t>(count)) return 0;
  const std::uint32_t next = chunk.hops[level][hop / kMlaHop];
  return next > 0 ? next + hop % kMlaHop : 0;
}

// Fills `parts` and returns the share; ends with a barrier.
__device__ __forceinline__ std::uint64_t find_parts(const Params& p, int b, Parts& parts) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int stop = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  __shared__ Chunk chunk;
  LastPart last{0, 0, 0};
  if (slot == 0) chunk.last = last;
  for (int i = slot; i < stop; i += kThreads) {
    // Overwritten for the parts that have blocks.
    parts.request[i] = i == 0 ? 0 : batch_size;
    parts.block[i] = 0;
    parts.cuts[i] = 0;
  }
  // A warp has lanes for so few requests: it alone finds their hops, and the block waits for these once.
  const bool few = batch_size > 0 && batch_size <= kWarpSize;
  const auto sync = [few] { few ? __syncwarp() : __syncthreads(); };
  std::uint64_t cost_end, total;  // up to and including this thread's request, if it has one at most
  if (few) {
    const int lane = slot % kWarpSize;
    cost_end = warp_running_sum(lane < batch_size ? mla_cost(p, lane, b) : 0);
    total = __shfl_sync(kFullMask, cost_end, kWarpSize - 1);
  } else {
    std::uint64_t cost = 0;
    for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request, b);
    cost_end = block_running_sum(cost, total);
  }
  const std::uint64_t share = (total + static_cast<std::uint64_t>(stop) - 1) / static_cast<std::uint64_t>(stop);
  RunningSum<std::uint64_t> cost_sum;
  for (int first = 0; first < batch_size; first += kMlaChunk) {
    const int count = batch_size - first < kMlaChunk ? batch_size - first : kMlaChunk;
    const bool present = slot < count;
    const std::uint64_t before = cost_sum.carry;
    std::uint64_t end = cost_end;
    // Its barriers also tell that the last chunk isn't read any more.
    if (batch_size > kMlaChunk) end = cost_sum.add(present ? mla_cost(p, first + slot, b) : 0);
    if (present) {
      chunk.ends[slot + 1] = end;
      chunk.rests[slot] = static_cast<std::uint32_t>((end - last.begin) % share);
    }
    if (slot == 0) chunk.ends[0] = last.begin;
    sync();
    if (present) chunk.hops[0][slot] = first_hop(chunk, count, slot, share);
    int levels = 1;
    for (; (1 << levels) <= count; ++levels) {
      sync();
      if (present) chunk.hops[levels][slot] = double_hop(chunk, count, levels - 1, slot);
    }
    __syncthreads();
    for (int i = last.part + 1 + slot; i < stop; i += kThreads) {
      int hopped = 0;  // the end that the hops lead to
      int part = last.part;  // which begins there
      int at_ends = 0;  // parts after the last one, up to that one, that begin at an end
      for (int level = levels - 1; level >= 0; --level) {
        const std::uint32_t hop = hopped < count ? chunk.hops[level][hopped] : 0;
        const int there = part + static_cast<int>(hop % kMlaHop);
        if (hop == 0 || there > i) continue;
        hopped = static_cast<int>(hop / kMlaHop);
        part = there;
        at_ends += 1 << level;
      }
      const std::uint64_t begin = chunk.ends[hopped] + static_cast<std::uint64_t>(i - part) * share;
      if (begin > chunk.ends[count]) break;
      const int found = last_at_most(chunk.ends, count, 1 << (levels - 1), begin);
      parts.request[i] = first + found;
      parts.block[i] = static_cast<std::int32_t>(begin - (found > 0 ? chunk.ends[found] : before));
      parts.cuts[i] = last.cuts + i - last.part - at_ends;
      if (begin + share > chunk.ends[count]) chunk.last = {begin, i, parts.cuts[i]};
    }
    __syncthreads();
    last = chunk.last;
  }
  return share;
}

// A request has one split, and one more for each part that begins within it. A template, because Params has num_splits
// only if it is a field.
template <typename P>
__device__ __forceinline__ void write_num_splits(const P& p, int b, const Parts& begin) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int last = static_cast<int>(p.num_sm_parts) - 1;
  // The last threads first: the first ones write parts.
  for (int request = kThreads - 2 - static_cast<int>(threadIdx.x); request < batch_size; request += kThreads) {
    // The last part that begins in this request or before it.
    const int part = request >= 0 ? last_at_most(begin.request, last, kMaxSmParts / 2, request) : 0;
    store(p.num_splits, b, request + 1, request + 1 + begin.cuts[part]);
  }
}

__device__ void schedule_flashmla(const Params& p, int b) {
  __shared__ Parts begin;
  // Blocks are counted in 31 bits: a larger share is as good as this one.
  const auto share = static_cast<std::uint32_t>(min(find_parts(p, b, begin), std::uint64_t{1} << 31));
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin.block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin.request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    // A request of length 0 is paid for as one block, but ends before it.
    const std::int32_t length_of_last = last >= 0 ? mla_length(p, last, b) : 0;
    const std::int32_t stop = ends_within ? begin.block[i + 1] : length_of_last == 0 ? 0 : mla_blocks(length_of_last);
    const std::int32_t request = begin.request[i];
    std::int32_t block = begin.block[i];
    // The parts that begin in a request before this one, and the one that it begins in: a share apart.
    const std::int32_t split =
        block > 0 ? static_cast<std::int32_t>((static_cast<std::uint32_t>(block) - 1) / share + 1) : 0;
    const bool first_is_split = block > 0;
    // Of a part without work FlashMLA reads this beyond an array, where the first request's last block is.
    if (request == batch_size && batch_size > 0) block = mla_blocks(mla_length(p, 0, b)) - 1;
    if constexpr (kFlashMlaOrder == 2026) {
      const std::int32_t begins_split = first_is_split || (request == last && ends_within);
      const std::int32_t ends_split = ends_within || (request == last && first_is_split);
      const std::int32_t row[8] = {request, last, block, stop, split, begins_split, ends_split, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    } else {
      const std::int32_t row[8] = {request, block, last, stop, split, 0, 0, 0};
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
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
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
