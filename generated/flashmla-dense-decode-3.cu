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
// One block computes it from seq_lens, in chunks of kThreads requests, so the batch has no limit. The parts take the
// requests' blocks in order, each as many as share + kMlaOverhead pay for: kMlaOverhead for each request that it ends,
// and for the one that it cuts. In the cost of all blocks and requests before it, part p + 1 begins at
//
//   begin(p + 1) = y = begin(p) + share, or the end of a request in [y, y + kMlaOverhead] if there is one
//
// because an end that near is paid for, and what remains after it is too little to cut the next request. So between
// two parts that begin with a request, all begins are known at once: the lanes of a warp test one part each. Where
// ends follow one another in few parts, that is looked up: all threads search the next such end for one request each.
constexpr int kMlaBlock = 64;  // tokens
constexpr int kMlaOverhead = 5;  // fixed cost of a request in a part, in blocks

constexpr int kMlaAhead = 32;  // ends that the search for the next one covers
constexpr int kMlaMaxHop = 256;  // parts up to the next end, if that search finds it

// Where the parts begin, in shared memory.
struct Parts {
  std::int64_t begin[kMaxSmParts];  // in cost
  std::int32_t request[kMaxSmParts];
  std::int32_t block[kMaxSmParts];  // within that request
  std::int32_t cuts[kMaxSmParts];  // parts up to and including this one that begin within a request
};

// A chunk of requests, in shared memory.
struct Chunk {
  std::int64_t ends[kThreads + 1];  // the cost of all requests before the chunk, and up to and including each one
  std::uint32_t next[kThreads];  // from an end: the next end that a part begins at, and how many parts later; or 0
};

__device__ __forceinline__ std::int32_t mla_blocks(const Params& p, int request, int b) {
  const std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// The cost of a request in blocks, unless a part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request, int b) {
  return static_cast<std::uint64_t>(mla_blocks(p, request, b) + kMlaOverhead);
}

// The first lane of a vote; kWarpSize if there is none.
__device__ __forceinline__ int first_lane(unsigned votes) {
  return votes == 0 ? kWarpSize : __popc((votes & (0u - votes)) - 1u);
}

// The last of `count` + 1 ends that is at or before a cost.
__device__ __forceinline__ int end_before(const Chunk& chunk, int count, std::int64_t cost) {
  int found = 0;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (found + step <= count && chunk.ends[found + step] <= cost) found += step;
  }
  return found;
}

// What Chunk::next says of an end. Ends lie further apart than kMlaOverhead, so that at most one pays for a part.
__device__ __forceinline__ std::uint32_t next_end(
    const Chunk& chunk, int count, int end, std::int64_t share, std::uint64_t reciprocal) {
  const std::int64_t from = chunk.ends[end];
  const int stop = count < end + kMlaAhead ? count : end + kMlaAhead;
  for (int next = end + 1; next < stop; ++next) {
    const std::int64_t distance = chunk.ends[next] - from;
    // The first part that the end isn't too far from: (distance - kMlaOverhead) / share, rounded up.
    const std::int64_t before = distance - kMlaOverhead - 1;
    std::int64_t parts = static_cast<std::int64_t>(__umul64hi(static_cast<std::uint64_t>(before), reciprocal)) + 1;
    if (before - (parts - 1) * share >= share) ++parts;
    if (parts > kMlaMaxHop) return 0;
    if (parts * share <= distance) return static_cast<std::uint32_t>(next * (2 * kMlaMaxHop) + parts);
  }
  return 0;
}

// One warp finds the begins of the parts after `part` that lie before the chunk's last end; returns the last such part.
__device__ __forceinline__ int walk_chunk(
    const Chunk& chunk, int count, std::int64_t share, int stop, int part, Parts& parts) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  std::int64_t begin = parts.begin[part];
  int end = begin == chunk.ends[0] ? 0 : -1;  // the end that the part begins at; -1 within a request
  while (part + 1 < stop) {
    const std::uint32_t next = end >= 0 ? chunk.next[end] : 0;
    if (next > 0) {
      const int steps = static_cast<int>(next % (2 * kMlaMaxHop));
      end = static_cast<int>(next / (2 * kMlaMaxHop));
      const std::int64_t last = chunk.ends[end];
      for (int i = lane + 1; i <= steps && part + i < stop; i += kWarpSize) {
        parts.begin[part + i] = i < steps ? begin + i * share : last;
      }
      begin = last;
      part += steps;
      continue;
    }
    // A lane's part, as if no part before it began at an end.
    std::int64_t mine = begin + (lane + 1) * share;
    const bool inside = mine + kMlaOverhead < chunk.ends[count];
    const int found = inside ? end_before(chunk, count, mine + kMlaOverhead) : 0;
    const bool at_end = inside && chunk.ends[found] >= mine;
    if (at_end) mine = chunk.ends[found];
    const int outside = first_lane(__ballot_sync(kFullMask, !inside));
    const int first_end = first_lane(__ballot_sync(kFullMask, at_end));
    const int steps = first_end < outside ? first_end + 1 : outside;
    if (lane < steps && part + 1 + lane < stop) parts.begin[part + 1 + lane] = mine;
    if (steps == 0) break;
    begin = __shfl_sync(kFullMask, mine, steps - 1);
    end = first_end < outside ? __shfl_sync(kFullMask, found, steps - 1) : -1;
    part += steps;
    if (first_end >= outside && outside < kWarpSize) break;
  }
  return part < stop ? part : stop - 1;
}

// Fills `parts`; ends with a barrier.
__device__ __forceinline__ void find_parts(const Params& p, int b, Parts& parts) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int stop = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  std::uint64_t cost = 0;
  for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request, b);
  std::uint64_t total;
  const std::uint64_t cost_end = block_running_sum(cost, total);
  const std::int64_t share = static_cast<std::int64_t>((total + static_cast<std::uint64_t>(stop) - 1) / stop);
  const std::uint64_t reciprocal = ~std::uint64_t{0} / static_cast<std::uint64_t>(share > 0 ? share : 1);
  for (int i = slot; i < stop; i += kThreads) {
    // Overwritten for the first part, and for the parts that have blocks.
    parts.begin[i] = i == 0 ? 0 : static_cast<std::int64_t>(total);
    parts.request[i] = i == 0 ? 0 : batch_size;
    parts.block[i] = 0;
  }
  __shared__ Chunk chunk;
  __shared__ int last_part;
  int part = 0;  // the first whose request isn't known
  RunningSum<std::uint64_t> cost_sum;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    const int count = batch_size - first < kThreads ? batch_size - first : kThreads;
    const std::uint64_t carry = cost_sum.carry;
    std::uint64_t end = cost_end;  // a thread has one request: its sum is known
    if (batch_size > kThreads) end = cost_sum.add(request < batch_size ? mla_cost(p, request, b) : 0);
    __syncthreads();  // the last chunk's ends aren't read any more
    chunk.ends[slot + 1] = static_cast<std::int64_t>(end);
    if (slot == 0) chunk.ends[0] = static_cast<std::int64_t>(carry);
    __syncthreads();
    chunk.next[slot] = slot < count ? next_end(chunk, count, slot, share, reciprocal) : 0;
    __syncthreads();
    const int known = part;
    if (slot < kWarpSize) {
      const int last = walk_chunk(chunk, count, share, stop, part > 0 ? part - 1 : 0, parts);
      if (slot == 0) last_part = last;
    }
    __syncthreads();
    part = last_part + 1;
    for (int i = known + slot; i < part; i += kThreads) {
      const int found = end_before(chunk, count, parts.begin[i]);
      parts.request[i] = first + found;
      parts.block[i] = static_cast<std::int32_t>(parts.begin[i] - chunk.ends[found]);
    }
  }
  __syncthreads();
  RunningSum<std::uint32_t> cuts;
  for (int first = 0; first < stop; first += kThreads) {
    const int i = first + slot;
    const std::uint32_t sum = cuts.add(i < stop && parts.block[i] > 0 ? 1 : 0);
    if (i < stop) parts.cuts[i] = static_cast<std::int32_t>(sum);
  }
  __syncthreads();
}

// The splits that the request which a part begins within has in the parts before.
__device__ __forceinline__ std::int32_t splits_before(const Parts& parts, int part) {
  if (parts.block[part] == 0) return 0;
  const std::int64_t begin = parts.begin[part] - parts.block[part];
  int found = 0;  // the last part that begins at the request or before it
  for (int step = kMaxSmParts / 2; step > 0; step /= 2) {
    if (found + step <= part && parts.begin[found + step] <= begin) found += step;
  }
  return part - found;
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
        if (part < parts && begin.request[part] <= request) found = part;
      }
    }
    store(p.num_splits, b, request + 1, request + 1 + (request >= 0 ? begin.cuts[found] : 0));
  }
}

__device__ void schedule_flashmla(const Params& p, int b) {
  __shared__ Parts begin;
  find_parts(p, b, begin);
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin.block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin.request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    const std::int32_t blocks_of_last = last >= 0 ? mla_blocks(p, last, b) : 0;
    const std::int32_t stop = ends_within ? begin.block[i + 1] : blocks_of_last;
    const std::int32_t request = begin.request[i];
    const std::int32_t block = begin.block[i];
    const std::int32_t split = splits_before(begin, i);
    if constexpr (kFlashMlaOrder == 2026) {
      const bool first_is_split = block != 0;
      const bool last_is_split = stop != blocks_of_last;
      const std::int32_t begins_split = first_is_split || (request == last && last_is_split);
      const std::int32_t ends_split = last_is_split || (request == last && first_is_split);
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

// Reads the numbers of this lane's pages of a tile; those behind the longest backend's are kPageFill.
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
  static_assert(kTiles == 1);
  std::int32_t numbers[kTileColumns / kWarpSize];
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
