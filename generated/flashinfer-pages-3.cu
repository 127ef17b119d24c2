// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show flashinfer-pages-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  host_last_page_len, host_page_indptr, host_qo_indptr, last_page_len, page_indptr, pages,
//                           qo_indptr
//   distinct                all
//   target                  cuda
//   checked                 False
//   declare                 host_last_page_len = vector('where(kv_len > 0, (kv_len - 1) % page_size + 1, 0)',
//                           per='request'); host_page_indptr = running_sum('ceil_div(kv_len, page_size)');
//                           host_qo_indptr = running_sum('query_len'); kv_len = vector('max(base_len, 0) + offset',
//                           per='request'); last_page_len = vector('where(kv_len > 0, (kv_len - 1) % page_size + 1,
//                           0)', per='request'); page_indptr = running_sum('ceil_div(kv_len, page_size)'); pages =
//                           packed('token(column * page_size) // page_size', at='page_indptr'); qo_indptr =
//                           running_sum('query_len')
//   constants               query_len: 1
//   seqlen_offsets          1, 2, 3
//   page_size               16
// key d03a7f90bb3923b626dd872ea975903fec9c00a46f23ab86abcb24f432da8759

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
constexpr int kComputedColumns = 512;  // of a declared table or packed field, that a warp computes at once
constexpr int kComputedBlocksPerSm = 2;  // limits the blocks for these
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr bool kPagesAlone = false;  // whether the tables hold pages only, not tokens
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kPageSize = 16;  // tokens
constexpr bool kChecked = false;  // whether violations are recorded
constexpr std::int32_t user_query_len = 1;  // declared

// ---- arguments ---------------------------------------------------------------------------------------------------
// A vector's destination with strides of its own, in elements.
template <typename T>
struct Strided {
  T* data;
  std::int64_t request_stride, row_stride;
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
  std::int64_t batch_size;  // requests
  // set when a plan is bound
  std::int64_t computed_blocks;  // for declared tables and packed fields; set by the launch
  std::int64_t computed_reciprocal;  // (2^32 - 1) / batch_size; set by the launch
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  std::int64_t req_to_token_width;  // elements of a row that may be read
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int64_t pool_rows;  // rows of req_to_token
  std::int64_t user_pages_capacity;  // elements
  std::int32_t* user_host_last_page_len[kBackends];  // [bs]
  std::int32_t* user_host_page_indptr[kBackends];  // [bs + 1]
  std::int32_t* user_host_qo_indptr[kBackends];  // [bs + 1]
  std::int32_t* user_last_page_len[kBackends];  // [bs]
  std::int32_t* user_page_indptr[kBackends];  // [bs + 1]
  std::int32_t* user_pages[kBackends];  // [capacity]
  std::int32_t* user_qo_indptr[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 35;
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

__device__ __forceinline__ Source<Token> token_source(const Params& p) {
  return {p.req_to_token, p.pool_rows, p.req_to_token_stride, p.req_to_token_width};
}

// Unchecked: a look-up outside of its source isn't reported.
__device__ __forceinline__ void check_look_up(const Params&, std::int64_t, std::int64_t, std::int64_t) {}

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

// ---- storing an element that all backends have alike -------------------------------------------------------------
// Where lengths differ each backend has a block, and the first one stores what doesn't depend on the backend.
template <typename T, int N>
__device__ __forceinline__ void store_once(T* const (&to)[N], int b, std::int64_t index, std::common_type_t<T> value) {
  if (b > 0) return;
#pragma unroll(unrolled(N))
  for (int i = 0; i < N; ++i) put(to[i] + index, value);
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

// ---- division, rounded up ----------------------------------------------------------------------------------------
// The quotient rounded up; the divisor is positive.
template <typename T>
__device__ __forceinline__ T ceil_div(T value, std::common_type_t<T> divisor) {
  return value / divisor + (value % divisor > 0 ? 1 : 0);
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

// ---- addresses that the compiler keeps as they are ---------------------------------------------------------------
// Keeps one base address in a register. Otherwise the compiler computes an address for each load.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* address) {
  if constexpr (kWarpSize > 1) asm("" : "+l"(address));
  return address;
}

// ---- look-ups of formulas ----------------------------------------------------------------------------------------
// Whether an index lies within a size. Unsigned comparison: a negative index fails the bound check, too. Indices of 32
// bits need no arithmetic of 64.
template <typename At>
__device__ __forceinline__ bool within(At index, std::int64_t size) {
  using Unsigned = std::make_unsigned_t<At>;
  constexpr std::int64_t kAll = std::int64_t{1} << 31;
  if constexpr (sizeof(At) < sizeof(size)) size = size < kAll ? size : kAll;
  return static_cast<Unsigned>(index) < static_cast<Unsigned>(size);
}

// What isn't there isn't read, and yields `missing`, whose type is the formula's.
template <typename Value, typename T, typename Row, typename Column>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Source<T>& source, Row row, Column column, Value missing) {
  check_look_up(p, request, row, source.rows);
  check_look_up(p, request, column, source.columns);
  const bool row_there = within(row, source.rows);
  // The row's address is computed once for all columns, not in each one's branch.
  const T* data = opaque(source.data + (row_there ? row : 0) * source.row_stride);
  return row_there && within(column, source.columns) ? static_cast<Value>(__ldg(data + column)) : missing;
}

template <typename Value, typename T, typename At>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Map<T>& map, At index, Value missing) {
  check_look_up(p, request, index, map.size);
  return within(index, map.size) ? static_cast<Value>(__ldg(map.data + index)) : missing;
}

// ---- sums over the lanes of a warp -------------------------------------------------------------------------------
// The sum of numbers of up to 58 bits over the lanes of a warp, which adds up 32 bits at once: 26 of them can't wrap.
__device__ __forceinline__ std::int64_t warp_sum(std::int64_t value) {
  constexpr int kLowBits = 26;
  const std::uint32_t low = static_cast<std::uint32_t>(value) & ((1u << kLowBits) - 1);
  const std::uint32_t high = __reduce_add_sync(kFullMask, static_cast<std::uint32_t>(value >> kLowBits));
  return std::int64_t{static_cast<std::int32_t>(high)} * (1 << kLowBits) + __reduce_add_sync(kFullMask, low);
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

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  RunningSum<std::uint32_t> user_host_page_indptr_sum;
  if (threadIdx.x == 0) store(p.user_host_page_indptr, b, 0, 0);
  RunningSum<std::uint32_t> user_host_qo_indptr_sum;
  if (threadIdx.x == 0) store_once(p.user_host_qo_indptr, b, 0, 0);
  RunningSum<std::uint32_t> user_page_indptr_sum;
  if (threadIdx.x == 0) store(p.user_page_indptr, b, 0, 0);
  RunningSum<std::uint32_t> user_qo_indptr_sum;
  if (threadIdx.x == 0) store_once(p.user_qo_indptr, b, 0, 0);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int64_t pool_row = present ? request_row(p, request) : -1;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int32_t user_kv_len = wrap(bits(max(base_len, 0)) + offset);
    const std::int32_t user_host_last_page_len =
        (user_kv_len > 0 ? wrap(bits(floor_mod(wrap(bits(user_kv_len) - 1), kPageSize)) + 1) : 0);
    const std::int32_t user_host_page_indptr = ceil_div(user_kv_len, kPageSize);
    const std::int32_t user_last_page_len =
        (user_kv_len > 0 ? wrap(bits(floor_mod(wrap(bits(user_kv_len) - 1), kPageSize)) + 1) : 0);
    const std::int32_t user_page_indptr = ceil_div(user_kv_len, kPageSize);
    const std::uint32_t user_host_page_indptr_end = user_host_page_indptr_sum.add(bits(user_host_page_indptr));
    const std::uint32_t user_host_qo_indptr_end = user_host_qo_indptr_sum.add(bits(user_query_len));
    const std::uint32_t user_page_indptr_end = user_page_indptr_sum.add(bits(user_page_indptr));
    const std::uint32_t user_qo_indptr_end = user_qo_indptr_sum.add(bits(user_query_len));
    if (!present) continue;
    store(p.user_host_last_page_len, b, request, user_host_last_page_len);
    store(p.user_host_page_indptr, b, request + 1, wrap(user_host_page_indptr_end));
    store_once(p.user_host_qo_indptr, b, request + 1, wrap(user_host_qo_indptr_end));
    store(p.user_last_page_len, b, request, user_last_page_len);
    store(p.user_page_indptr, b, request + 1, wrap(user_page_indptr_end));
    store_once(p.user_qo_indptr, b, request + 1, wrap(user_qo_indptr_end));
  }
}

// ---- what formulas name of a request -----------------------------------------------------------------------------
struct Request {
  std::int32_t base_len;
  std::int64_t pool_row;
};

__device__ __forceinline__ Request read_request(const Params& p, std::int64_t request) {
  return {request_length(p, request), request_row(p, request)};
}

// That of a lane, for all lanes of its warp.
__device__ __forceinline__ Request shuffled(const Request& of, int lane) {
  return {__shfl_sync(kFullMask, of.base_len, lane), __shfl_sync(kFullMask, of.pool_row, lane)};
}

// ---- declared tables and packed fields ---------------------------------------------------------------------------
// An item is a row of a table, or a request of a packed field. Its elements are cut into parts of kComputedColumns, and
// parts into pieces. The warps of the grid's last blocks take the pieces of all items in turn, then those of the next
// field. Dead columns cost nothing. What all backends have alike is computed once, for the one with the most elements.
//
// A Field, emitted from its declaration, has
//   kPacked, kFilled       whether it is packed; whether dead columns of a table get kFill
//   kRowsEach              items of a request
//   kDestinations, kSets   destinations; 1 if all backends have equally many elements, otherwise kLengthSets
//   kApart                 whether an element's value, too, depends on the backend
//   element_count()        how many elements an item has in backend b, a Count
//   element_value()        one of them
//   destinations()         where they go
//   capacity()             columns of a row, or elements of a packed field, that there is room for
constexpr int kComputedEach = kComputedColumns / kWarpSize;  // elements of a lane
constexpr int kLog2Pieces = 3;  // most pieces that a part is cut into, where there are few

// Columns of an item, without a sign.
struct Columns {
  std::uint32_t first, stop;
};

// Columns are int32. A count of 32 bits needs no arithmetic of 64.
template <typename Count>
__device__ __forceinline__ std::uint32_t column_of(Count column) {
  constexpr Count kLast = 0x7fffffff;
  return static_cast<std::uint32_t>(column < 0 ? 0 : column < kLast ? column : kLast);
}

// Where an element of an item goes in destination d, and how far from one column to the next.
template <typename T, int N>
__device__ __forceinline__ T* address(T* const (&to)[N], int d, int, std::int64_t at) {
  return to[d] + at;
}

template <typename T, int N>
__device__ __forceinline__ T* address(const Strided<T> (&to)[N], int d, int item, std::int64_t at) {
  return to[d].data + item * to[d].request_stride + at * to[d].row_stride;
}

template <typename T, int N>
__device__ __forceinline__ std::int64_t column_stride(T* const (&)[N], int) {
  return 1;
}

template <typename T, int N>
__device__ __forceinline__ std::int64_t column_stride(const Strided<T> (&to)[N], int d) {
  return to[d].row_stride;
}

// How many backends are computed together: all, if only the numbers of elements differ.
template <typename Field>
constexpr int kTogether = Field::kApart ? 1 : Field::kSets;

// The most elements that an item has in a backend from b on.
template <typename Field>
__device__ __forceinline__ std::uint32_t most_elements(const Params& p, const Request& of, int item, int b) {
  std::uint32_t most = 0;
#pragma unroll(unrolled(kTogether<Field>))
  for (int i = 0; i < kTogether<Field>; ++i) {
    most = max(most, column_of(Field::element_count(p, of, item, b + i)));
  }
  return most;
}

// A table's parts begin at boundaries of kWarpSize elements in the memory of its first destination, so that a warp's
// stores share few lines: this many columns before the row.
template <typename Field>
__device__ __forceinline__ std::uint32_t columns_before(const Params& p, int item, int b) {
  const auto* row = address(Field::destinations(p), b, item, 0);
  return Field::kPacked ? 0 : reinterpret_cast<std::uintptr_t>(row) / sizeof(*row) % kWarpSize;
}

// How many columns an item's warps go through, up to a limit, those before its row included.
template <typename Field>
__device__ __forceinline__ std::uint32_t item_reach(
    const Params& p, const Request& of, int item, int b, std::uint32_t limit) {
  const std::uint32_t columns = Field::kFilled ? limit : min(limit, most_elements<Field>(p, of, item, b));
  return columns > 0 ? columns + columns_before<Field>(p, item, b) : 0;
}

// The number of parts of so many columns, without those that an item's own warps compute.
__device__ __forceinline__ std::uint32_t parts_of(std::uint32_t reach, std::uint32_t own_columns) {
  return reach > own_columns ? (reach - own_columns - 1) / kComputedColumns + 1 : 0;
}

// If each element is stored to several destinations, half a part keeps enough memory accesses in flight.
template <typename Field>
constexpr bool kHalves = Field::kDestinations > 1 && !Field::kApart;

// As which a power of two of pieces the warps take each of so many parts: small ones where there are few, so that all
// warps have work; whole ones where each warp has several, so that more look-ups are on their way.
template <typename Field>
__device__ __forceinline__ int log2_pieces(std::uint32_t parts, std::uint32_t warps) {
  return parts <= warps >> kLog2Pieces ? kLog2Pieces : kHalves<Field> || parts <= warps / 2 ? 1 : 0;
}

// Negative counts move the elements of later requests back, and so more columns of these fit: by how much, in all
// backends.
template <typename Field>
__device__ __forceinline__ std::uint64_t moved_back(const Params& p, const Request& of, int item, int b) {
  std::uint64_t back = 0;
#pragma unroll(unrolled(kTogether<Field>))
  for (int i = 0; i < kTogether<Field>; ++i) {
    const std::int64_t count = Field::element_count(p, of, item, b + i);
    if (count < 0) back -= static_cast<std::uint64_t>(count);
  }
  return back;
}

// The sum of counts over the lanes of a warp, modulo 2^64.
template <typename Field>
__device__ __forceinline__ std::int64_t sum_of_counts(std::int64_t count) {
  if constexpr (sizeof(typename Field::Count) == sizeof(std::int32_t)) return warp_sum(count);
  const std::uint64_t sum = warp_running_sum(static_cast<std::uint64_t>(count));
  return static_cast<std::int64_t>(__shfl_sync(kFullMask, sum, kWarpSize - 1));
}

// Computes kMoved elements a lane, a part of an item or a piece of one, and stores them in each backend from b on.
// begin_in(b) is where the item begins in a packed field. It is asked while the look-ups are on their way. All look-ups
// are made before the first store, because the compiler moves none before a store.
template <typename Field, int kMoved, typename Begin>
__device__ __forceinline__ void compute_piece(
    const Params& p, const Request& of, int item, int b, std::uint32_t first, const Begin& begin_in) {
  if constexpr (!Field::kPacked) first -= columns_before<Field>(p, item, b);
  const std::uint32_t column = first + threadIdx.x % kWarpSize;  // one before the row is a large one, too
  // The columns that the item has in a backend, and for which there is room.
  const auto columns_in = [&](int backend, std::int64_t begin) {
    Columns columns{0, column_of(Field::element_count(p, of, item, backend))};
    if (begin < 0) columns.first = column_of(-begin);
    const std::int64_t room = Field::capacity(p) - begin;
    if (room < columns.stop) columns.stop = column_of(room);
    return columns;
  };
  Columns live{0, most_elements<Field>(p, of, item, b)};
  if constexpr (!Field::kPacked) live.stop = min(live.stop, column_of(Field::capacity(p)));
  if constexpr (kChecked && Field::kPacked) {
    // Nothing is looked up for what has no room, because it would be reported.
    live = {~0u, 0};
    for (int i = 0; i < kTogether<Field>; ++i) {
      const Columns own = columns_in(b + i, begin_in(b + i));
      if (own.first < own.stop) live = {min(live.first, own.first), max(live.stop, own.stop)};
    }
    if (first + kMoved * kWarpSize <= live.first) return;
  }
  // A piece may begin before its row.
  const bool behind = static_cast<std::int32_t>(first) >= static_cast<std::int32_t>(live.stop);
  const bool dead = behind || (Field::kFilled && live.stop == 0);
  if (!Field::kFilled && dead) return;
  decltype(Field::element_value(p, of, item, b, 0)) values[kMoved]{};
  if (!Field::kFilled || !dead) {
    // A lane outside of the live columns computes the nearest one, and needs no branch.
#pragma unroll
    for (int i = 0; i < kMoved; ++i) {
      const std::uint32_t at = max(live.first, min(column + i * kWarpSize, live.stop - 1));
      values[i] = Field::element_value(p, of, item, b, static_cast<std::int32_t>(at));
    }
  }
  // Destinations that have the same elements: of all backends, unless their numbers of elements differ.
  constexpr int kAlike = Field::kSets > 1 ? 1 : Field::kDestinations;
#pragma unroll(unrolled(kTogether<Field>))
  for (int i = 0; i < kTogether<Field>; ++i) {
    const std::int64_t begin = Field::kPacked ? begin_in(b + i) : 0;
    const Columns own = columns_in(b + i, begin);
    const std::uint32_t stop = Field::kFilled ? column_of(Field::capacity(p)) : own.stop;
#pragma unroll(unrolled(kAlike))
    for (int d = 0; d < kAlike; ++d) {
      auto* to = address(Field::destinations(p), b + i + d, item, begin + static_cast<std::int32_t>(column));
      const std::int64_t step = kWarpSize * column_stride(Field::destinations(p), b + i + d);
#pragma unroll
      for (int m = 0; m < kMoved; ++m, to += step) {
        const std::uint32_t at = column + m * kWarpSize;
        if (at >= own.first && at < stop) put(to, at < own.stop ? values[m] : Field::kFill);
      }
    }
  }
}

// No more items than a warp has lanes: each warp counts for itself, without shared memory and barriers. `piece` is what
// the warp takes next.
template <typename Field>
__device__ __forceinline__ void compute_few(
    const Params& p, int items, int b, std::uint32_t own_columns, std::uint32_t warps, std::uint32_t& piece) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  Request of{};
  if (lane < items) of = read_request(p, lane / Field::kRowsEach);
  std::uint32_t limit = column_of(Field::capacity(p));
  if constexpr (Field::kPacked) {
    const auto back = static_cast<std::int64_t>(lane < items ? moved_back<Field>(p, of, lane, b) : 0);
    if (__ballot_sync(kFullMask, back != 0) != 0) limit = column_of(Field::capacity(p) + sum_of_counts<Field>(back));
  }
  const std::uint32_t parts = lane < items ? parts_of(item_reach<Field>(p, of, lane, b, limit), own_columns) : 0;
  const std::uint32_t all_parts = __reduce_add_sync(kFullMask, parts);
  const int log2 = log2_pieces<Field>(all_parts, warps);
  const std::uint32_t pieces = all_parts << log2;
  if (piece < pieces) {
    std::uint32_t parts_end = parts;
    for (int distance = 1; distance < items; distance *= 2) {
      const std::uint32_t other = __shfl_up_sync(kFullMask, parts_end, static_cast<unsigned>(distance));
      if (lane >= distance) parts_end += other;
    }
    const std::uint32_t parts_before = parts_end - parts;
    if (lane >= items) parts_end = all_parts;
    for (; piece < pieces; piece += warps) {
      const std::uint32_t part = piece >> log2;
      const int item = __popc(__ballot_sync(kFullMask, parts_end <= part));  // those whose parts end before it
      const Request found = shuffled(of, item);
      const std::uint32_t in_item = part - __shfl_sync(kFullMask, parts_before, item);
      const std::uint32_t first = own_columns + in_item * kComputedColumns;
      const std::uint32_t in_part = (piece & ((1u << log2) - 1)) * (kComputedColumns >> log2);
      const auto begin_in = [&](int backend) {
        return sum_of_counts<Field>(lane < item ? Field::element_count(p, of, lane, backend) : 0);
      };
      // Few pieces come last: short batches fetch the fewest instructions.
      if (log2 == 0) {
        compute_piece<Field, kComputedEach>(p, found, item, b, first, begin_in);
      } else if (log2 == 1) {
        compute_piece<Field, kComputedEach / 2>(p, found, item, b, first + in_part, begin_in);
      } else {
        compute_piece<Field, (kComputedEach >> kLog2Pieces)>(p, found, item, b, first + in_part, begin_in);
      }
    }
  }
  piece -= pieces;
}

// A window of items, in shared memory.
struct ComputedWindow {
  Window parts;
  Request requests[kThreads];
  std::int64_t sums[kLengthSets][kWarps];  // elements of the items of a warp, in a packed field
  std::int64_t before[kLengthSets];  // and of the windows before
};

template <typename Field>
__device__ __forceinline__ void compute_many(
    const Params& p, ComputedWindow& window, int items, int b, std::uint32_t own_columns, std::uint32_t warps,
    std::uint32_t& piece) {
  const int slot = static_cast<int>(threadIdx.x);
  const int lane = slot % kWarpSize;
  std::uint32_t warp_end = 0;
  std::uint32_t limit = column_of(Field::capacity(p));
  std::uint64_t back = 0;  // of the windows so far
  for (int base = 0; base < items; base += kThreads) {
    const int own = base + slot;
    Request of{};
    if (own < items) of = read_request(p, own / Field::kRowsEach);
    // No warp looks anything up in the last window after the first of these barriers.
    if constexpr (Field::kPacked) {
      const std::uint64_t own_back = own < items ? moved_back<Field>(p, of, own, b) : 0;
      if (__syncthreads_or(own_back > 0)) {
        std::uint64_t of_window;
        block_running_sum(own_back, of_window);
        back += of_window;
        limit = column_of(Field::capacity(p) + static_cast<std::int64_t>(back));
      }
      for (int i = slot; i < kTogether<Field>; i += kThreads) {
        std::int64_t before = 0;
        for (int w = 0; w < kWarps && base > 0; ++w) before += window.sums[i][w];
        window.before[i] = base > 0 ? window.before[i] + before : 0;
      }
      if (base > 0) __syncthreads();
#pragma unroll(unrolled(kTogether<Field>))
      for (int i = 0; i < kTogether<Field>; ++i) {
        const std::int64_t sum = sum_of_counts<Field>(own < items ? Field::element_count(p, of, own, b + i) : 0);
        if (lane == 0) window.sums[i][slot / kWarpSize] = sum;
      }
    } else {
      __syncthreads();
    }
    window.requests[slot] = of;
    const std::uint32_t parts = own < items ? parts_of(item_reach<Field>(p, of, own, b, limit), own_columns) : 0;
    const std::uint32_t window_parts = count_tiles(window.parts, parts, warp_end);
    const int log2 = min(log2_pieces<Field>(window_parts, warps), 1);
    for (; piece < window_parts << log2; piece += warps) {
      const Place place = find_tile(window.parts, warp_end, piece >> log2);
      const Request found = window.requests[place.slot];
      const auto begin_in = [&](int backend) {
        const int full = place.slot / kWarpSize;  // warps of items before the item's
        const int other = full * kWarpSize + lane;
        std::int64_t sum = lane < full ? window.sums[backend - b][lane] : 0;
        if (other < place.slot) sum += Field::element_count(p, window.requests[other], base + other, backend);
        return window.before[backend - b] + sum_of_counts<Field>(sum);
      };
      const int item = base + place.slot;
      const std::uint32_t first = own_columns + place.tile * kComputedColumns;
      if (log2 == 1) {
        const std::uint32_t in_part = piece % 2 * (kComputedColumns / 2);
        compute_piece<Field, kComputedEach / 2>(p, found, item, b, first + in_part, begin_in);
      } else {
        compute_piece<Field, kComputedEach>(p, found, item, b, first, begin_in);
      }
    }
    piece -= window_parts << log2;
  }
}

// A row's own warp, number `turn` of `each`, reads no other row's length. It takes one piece, as small as all of them
// together reach the row's end in; otherwise what is left is computed by other blocks.
template <typename Field>
__device__ __forceinline__ void compute_own(const Params& p, int row, int b, std::uint32_t turn, std::uint32_t each) {
  constexpr std::uint32_t kSmall = kComputedColumns >> kLog2Pieces;
  const Request of = read_request(p, row / Field::kRowsEach);
  const std::uint32_t reach = item_reach<Field>(p, of, row, b, column_of(Field::capacity(p)));
  const auto begin_in = [](int) { return std::int64_t{0}; };
  if (!kHalves<Field> && reach > each * (kComputedColumns / 2)) {
    compute_piece<Field, kComputedEach>(p, of, row, b, turn * kComputedColumns, begin_in);
  } else if (reach > each * kSmall) {
    compute_piece<Field, kComputedEach / 2>(p, of, row, b, turn * (kComputedColumns / 2), begin_in);
  } else if (reach > 0) {
    compute_piece<Field, (kComputedEach >> kLog2Pieces)>(p, of, row, b, turn * kSmall, begin_in);
  }
}

// A table needs no sums. As in device/live.cuh, blocks belong to its rows: all of them if they reach the end of the
// widest rows in one piece a warp; half of them, beside others that compute what is left, if they reach a third of it.
// With more or longer rows to share the warps among, all blocks count, as they do for a packed field. `piece` is what
// the warp takes next of packed fields.
template <typename Field>
__device__ __forceinline__ void compute(
    const Params& p, ComputedWindow& window, std::uint32_t block, std::uint32_t& piece) {
  constexpr std::uint32_t kOwnColumns = kHalves<Field> ? kComputedColumns / 2 : kComputedColumns;
  const int items = static_cast<int>(p.batch_size) * Field::kRowsEach;
  const auto blocks = static_cast<std::uint32_t>(p.computed_blocks);
  const std::uint32_t in_block = threadIdx.x / kWarpSize;
  const auto by_items = [&](std::uint32_t number) {
    return __umulhi(number / Field::kRowsEach + 1, static_cast<std::uint32_t>(p.computed_reciprocal));
  };
  std::uint32_t own_blocks = 0;
  std::uint32_t each = 0;  // own warps of a row
  if constexpr (!Field::kPacked) {
    const std::uint32_t widest = column_of(Field::capacity(p)) + kWarpSize;
    own_blocks = blocks;
    each = by_items(blocks * kWarps);
    if (each * kOwnColumns < widest) {
      own_blocks = blocks / 2;
      each = by_items(own_blocks * kWarps);
      if (each * kOwnColumns < widest / 3) own_blocks = each = 0;
    }
  }
  for (int b = 0; b < Field::kSets; b += kTogether<Field>) {
    if (block < own_blocks) {
      // Neighbouring pieces go to different SMs.
      const std::uint32_t warp = in_block * own_blocks + block;
      const std::uint32_t turn = by_items(warp);
      const int row = static_cast<int>(warp - turn * static_cast<std::uint32_t>(items));
      if (turn < each) compute_own<Field>(p, row, b, turn, each);
    } else if (own_blocks < blocks) {
      std::uint32_t left = (block - own_blocks) * kWarps + in_block;
      std::uint32_t& next = Field::kPacked ? piece : left;
      const std::uint32_t warps = (blocks - own_blocks) * kWarps;
      if (items <= kWarpSize) {
        compute_few<Field>(p, items, b, each * kOwnColumns, warps, next);
      } else {
        compute_many<Field>(p, window, items, b, each * kOwnColumns, warps, next);
      }
    }
  }
}

// pages: token(column * page_size) // page_size, at page_indptr[request] + column
struct user_pages_field {
  using Count = std::int32_t;
  static constexpr bool kPacked = true, kFilled = false;
  static constexpr std::int32_t kFill = 0;
  static constexpr int kRowsEach = 1;
  static constexpr int kDestinations = 3, kSets = kLengthSets;
  static constexpr bool kApart = false;

  static __device__ __forceinline__ Count
  element_count([[maybe_unused]] const Params& p, const Request& of, int item, [[maybe_unused]] int b) {
    [[maybe_unused]] const auto& [base_len, pool_row] = of;
    [[maybe_unused]] const int request = item / kRowsEach, row = item % kRowsEach;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    return ceil_div(wrap(bits(max(base_len, 0)) + offset), kPageSize);
  }

  static __device__ __forceinline__ std::int32_t element_value(
      [[maybe_unused]] const Params& p, const Request& of, int item, [[maybe_unused]] int b,
      [[maybe_unused]] std::int32_t column) {
    [[maybe_unused]] const auto& [base_len, pool_row] = of;
    [[maybe_unused]] const int request = item / kRowsEach, row = item % kRowsEach;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int32_t value_1 =
        look_up(p, request, token_source(p), pool_row, wrap(bits(column) * kPageSize), std::int32_t{0});
    const std::int32_t value = floor_div(value_1, kPageSize);
    return value;
  }

  static __device__ __forceinline__ const auto& destinations(const Params& p) { return p.user_pages; }

  static __device__ __forceinline__ std::int64_t capacity(const Params& p) { return p.user_pages_capacity; }
};

// `block` counts from the first that computes.
__device__ void write_computed(const Params& p, unsigned block) {
  __shared__ ComputedWindow window;
  std::uint32_t piece = block * kWarps + threadIdx.x / kWarpSize;
  compute<user_pages_field>(p, window, block, piece);
}

// ---- host side
// How many blocks compute declared tables and packed fields: enough for all pieces of parts at the greatest lengths, up
// to a limit that follows from the device.
std::int64_t computed_blocks(const Params& p) {
  const auto smaller = [](std::int64_t a, std::int64_t b) { return a < b ? a : b; };
  const auto pieces_of = [](std::int64_t columns) { return columns / (kComputedColumns >> kLog2Pieces) + 1; };
  std::int64_t pieces = 0;
  const std::int64_t read = p.batch_size * pieces_of(p.req_to_token_width);
  pieces += smaller(read, pieces_of(p.user_pages_capacity) + p.batch_size);
  const std::int64_t limit = p.sm_count * kComputedBlocksPerSm;
  const std::int64_t blocks = smaller((pieces + kWarps - 1) / kWarps, limit);
  return blocks > 1 ? blocks : 1;
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    onelaunch_broadcast_decode_n3_d03a7f90bb3923b6(const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return refresh_vectors(p, block);
  const unsigned first = kFirstTableBlock;
  write_computed(p, blockIdx.x - first);
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
int onelaunch_broadcast_decode_n3_d03a7f90bb3923b6_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    params.computed_blocks = computed_blocks(params);
    params.computed_reciprocal = params.batch_size > 0 ? 0xffffffffu / params.batch_size : 0;
    config.gridDim = dim3(kFirstTableBlock + static_cast<unsigned>(params.computed_blocks), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_d03a7f90bb3923b6, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_d03a7f90bb3923b6_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_d03a7f90bb3923b6);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_d03a7f90bb3923b6_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
