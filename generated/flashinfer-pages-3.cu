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
constexpr int kComputedColumns = 256;  // of a declared table or packed field, that a warp computes at once
constexpr int kComputedBlocksPerSm = 2;  // limits the blocks for these
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr bool kPagesAlone = false;  // whether the tables hold pages only, not tokens
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kPageSize = 16;  // tokens
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
constexpr int kParamWords = 33;
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

// How many blocks compute declared tables and packed fields, the last of the grid: enough for all parts at the greatest
// lengths, up to a limit that follows from the device.
__host__ __device__ __forceinline__ unsigned computed_blocks(const Params& p) {
  const auto smaller = [](std::int64_t a, std::int64_t b) { return a < b ? a : b; };
  [[maybe_unused]] const auto parts_of = [](std::int64_t columns) { return columns / kComputedColumns + 1; };
  std::int64_t parts = 0;
  [[maybe_unused]] const std::int64_t read = p.batch_size * parts_of(p.req_to_token_width);
  parts += kLengthSets * smaller(read, parts_of(p.user_pages_capacity) + p.batch_size);
  const std::int64_t limit = p.sm_count * kComputedBlocksPerSm;
  const std::int64_t blocks = smaller((parts + kWarps - 1) / kWarps, limit);
  return static_cast<unsigned>(blocks > 1 ? blocks : 1);
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

// ---- storing an element that all backends have alike -------------------------------------------------------------
// Where lengths differ each backend has a block, and the first one stores what doesn't depend on the backend.
template <typename T, int N>
__device__ __forceinline__ void store_once(T* const (&to)[N], int b, std::int64_t index, std::common_type_t<T> value) {
  if (b > 0) return;
#pragma unroll(unrolled(N))
  for (int i = 0; i < N; ++i) put(to[i] + index, value);
}

// ---- storing an element of a strided vector ----------------------------------------------------------------------
// Like store(), where a destination has its own strides; `once` if all backends have the same, though lengths differ.
template <bool once, typename T, int N>
__device__ __forceinline__ void store_strided(
    const Strided<T> (&to)[N], int b, std::int64_t request, std::int64_t row, std::common_type_t<T> value) {
  if constexpr (kLengthSets > 1 && !once) {
    put(to[b].data + request * to[b].request_stride + row * to[b].row_stride, value);
  } else {
    if (kLengthSets > 1 && b > 0) return;
#pragma unroll(unrolled(N))
    for (int i = 0; i < N; ++i) put(to[i].data + request * to[i].request_stride + row * to[i].row_stride, value);
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

// ---- declared tables and packed fields ---------------------------------------------------------------------------
// The grid's last blocks compute them, as many as computed_blocks() says. Their warps take parts of kComputedColumns
// columns in turn, those of all fields and backends one after the other. Every block counts the parts of a window of
// rows or requests, so that dead columns cost nothing. A lane computes its elements of a part before it stores the
// first, because the compiler moves no look-up before a store.
constexpr int kComputedEach = kComputedColumns / kWarpSize;  // a lane's

// A window of a table's rows, or of a packed field's requests.
struct ComputedWindow {
  Window parts;
  std::int64_t begins[kThreads];  // where a request's elements begin
  std::int64_t stops[kThreads];  // and where those end that the destination has room for; of a row, the live columns
};

// The number of parts of so many columns.
__device__ __forceinline__ std::uint32_t column_parts(std::int64_t columns) {
  return columns > 0 ? static_cast<std::uint32_t>((columns - 1) / kComputedColumns) + 1 : 0;
}

// For a dead column the last live one: lanes compute without branches, and look up nothing for dead columns.
__device__ __forceinline__ std::int32_t live_column(std::int64_t column, std::int64_t live) {
  return static_cast<std::int32_t>(column < live ? column : live - 1);
}

// `part` is what the warp takes next, counted from the window's first part.
__device__ void compute_user_pages(const Params& p, ComputedWindow& window, std::uint32_t warps, std::uint32_t& part) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  std::uint32_t warp_end = 0;
  const int batch_size = static_cast<int>(p.batch_size);
  for (int b = 0; b < kLengthSets; ++b) {
    RunningSum<std::uint64_t> sum;
    for (int first = 0; first < batch_size; first += kThreads) {
      std::uint32_t request_parts = 0;
      {
        const int request = first + static_cast<int>(threadIdx.x);
        const bool present = request < batch_size;
        const std::int32_t base_len = present ? request_length(p, request) : 0;
        [[maybe_unused]] const std::int64_t pool_row = present ? request_row(p, request) : -1;
        [[maybe_unused]] const std::int32_t offset = length_offset(b);
        [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
        const std::int64_t count = present ? ceil_div(wrap(bits(max(base_len, 0)) + offset), kPageSize) : 0;
        // The sum's barriers come after all look-ups in the last window.
        const std::uint64_t end = sum.add(static_cast<std::uint64_t>(count));
        const std::int64_t begin = static_cast<std::int64_t>(end - static_cast<std::uint64_t>(count));
        std::int64_t stop = count > 0 ? static_cast<std::int64_t>(end) : 0;
        if (stop > p.user_pages_capacity) stop = p.user_pages_capacity;
        window.begins[threadIdx.x] = begin;
        window.stops[threadIdx.x] = stop;
        request_parts = column_parts(stop - (begin > 0 ? begin : 0));  // negative counts lead before the destination
      }
      const std::uint32_t window_parts = count_tiles(window.parts, request_parts, warp_end);
      for (; part < window_parts; part += warps) {
        const Place place = find_tile(window.parts, warp_end, part);
        const int request = first + place.slot;
        const std::int32_t base_len = request_length(p, request);
        [[maybe_unused]] const std::int64_t pool_row = request_row(p, request);
        [[maybe_unused]] const std::int32_t offset = length_offset(b);
        [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
        std::int32_t values[kComputedEach];
        const std::int64_t begin = window.begins[place.slot], stop = window.stops[place.slot];
        const std::int64_t at = (begin > 0 ? begin : 0) + std::int64_t{place.tile} * kComputedColumns + lane;
#pragma unroll
        for (int i = 0; i < kComputedEach; ++i) {
          [[maybe_unused]] const std::int32_t column = live_column(at + i * kWarpSize - begin, stop - begin);
          const std::int32_t value_1 =
              look_up(p, request, token_source(p), pool_row, wrap(bits(column) * kPageSize), std::int32_t{0});
          const std::int32_t value = floor_div(value_1, kPageSize);
          values[i] = value;
        }
#pragma unroll
        for (int i = 0; i < kComputedEach; ++i) {
          if (at + i * kWarpSize >= stop) continue;
          store(p.user_pages, b, at + i * kWarpSize, values[i]);
        }
      }
      part -= window_parts;
    }
  }
}

// `block` counts from the grid's end.
__device__ void write_computed(const Params& p, unsigned block) {
  __shared__ ComputedWindow window;
  const std::uint32_t warps = computed_blocks(p) * kWarps;
  std::uint32_t part = block * kWarps + threadIdx.x / kWarpSize;
  compute_user_pages(p, window, warps, part);
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    onelaunch_broadcast_decode_n3_d03a7f90bb3923b6(const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return refresh_vectors(p, block);
  const unsigned last = gridDim.x - 1 - blockIdx.x;  // counted from the grid's end
  if (last < computed_blocks(p)) return write_computed(p, last);
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
    config.gridDim = dim3(kFirstTableBlock + computed_blocks(params), 1, 1);
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
