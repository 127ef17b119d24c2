// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show flashinfer-decode-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  kv_indptr, kv_indices
//   distinct                all
//   target                  cuda
//   checked                 False
//   seqlen_offsets          1, 2, 3
// key 567ba8e3cc7b9b8541fac0a0a18966dec6e82fa4b2ad24dfad80c1b6edfd89b4

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- settings ----------------------------------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kThreads = 256;  // per block
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLengthSets = kBackends;  // lengths per request: one for all backends, or one per backend
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 3;  // largest offset that a backend adds to seq_lens
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kBlocksPerSm = 2;  // limits the blocks for the tables
constexpr bool kPagesAlone = false;  // whether the tables hold pages only, not tokens
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr bool kChecked = false;  // whether violations are recorded
constexpr bool kVerified = false;  // whether only what differs is written

// ---- arguments ---------------------------------------------------------------------------------------------------
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
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int64_t packed_capacity;  // elements
  std::int32_t* kv_indptr[kBackends];  // [bs + 1]
  std::int32_t* kv_indices[kBackends];  // [capacity]
};
constexpr int kParamWords = 18;
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

// The number of blocks that write tables.
__device__ __forceinline__ unsigned table_grid([[maybe_unused]] const Params& p) {
  return gridDim.x - kFirstTableBlock;
}

using Index = std::int32_t;
constexpr int kIndexDestinations = 3;

// Where the tokens of all requests go, one after the other.
__device__ __forceinline__ const auto& indices(const Params& p) {
  return p.kv_indices;
}

// Unchecked: tokens beyond the capacity are dropped without a report.
__device__ __forceinline__ void check_capacity(const Params&, std::int64_t, std::int64_t) {}

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

// ---- strategy: the tokens of all requests, one after the other ---------------------------------------------------
// The place of a request's tokens depends on the lengths of all requests before it. Every block sums the lengths
// itself, window by window, together with the tiles, so no block waits for another. The sum has 64 bits. The warps of
// all blocks take the tiles in turn. Nothing is written beyond the destinations' capacity.
//
//   block   0 .. kFirstTableBlock   the other blocks
//          +-----------------------+-----------------------------------------+
//          | vectors, schedules    | tile, tile + warps, ...                 |
//          +-----------------------+-----------------------------------------+
//
//   destination  | tokens of request 0 | request 1 | tokens of request 2 ...
//                ^ 0                   ^ the sum up to request 1

constexpr int kTileWords = kTileColumns / kWarpSize;  // of a lane
constexpr int kTileParts = 4;  // that a tile is cut into where there are few

// The number of tokens of a request, without a backend's offset.
__device__ __forceinline__ std::uint32_t request_tokens(const Params& p, int request) {
  const std::int32_t length = request_length(p, request);
  return length > 0 ? static_cast<std::uint32_t>(length) : 0;
}

// The number of tokens of a request that are read for a backend with this offset.
__device__ __forceinline__ int read_columns(const Params& p, std::uint32_t tokens, std::int32_t offset) {
  const std::uint32_t length = tokens + static_cast<std::uint32_t>(offset);
  const std::uint32_t columns = static_cast<std::uint32_t>(p.columns);
  return static_cast<int>(length < columns ? length : columns);
}

// The number of tiles of a request.
__device__ __forceinline__ std::uint32_t request_tiles(const Params& p, std::uint32_t tokens, std::int64_t pool_row) {
  const auto columns = static_cast<std::uint32_t>(read_columns(p, tokens, kLongestOffset));
  return pool_row < 0 ? 0 : (columns + (kTileColumns - 1)) / kTileColumns;
}

// Moves kMoved words a lane, a tile of a request or a part of one, to every backend. tokens_before() is the number of
// tokens of the requests before it, without the backends' offsets. It is asked while the words are on their way.
template <int kMoved, typename Before>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t request, std::int64_t pool_row, std::uint32_t tokens, int first,
    const Before& tokens_before) {
  const int column = first + static_cast<int>(threadIdx.x % kWarpSize);
  const Token* from = opaque(p.req_to_token + pool_row * p.req_to_token_stride + column);
  const int end = read_columns(p, tokens, kLongestOffset);
  Index words[kMoved];
#pragma unroll
  for (int i = 0; i < kMoved; ++i) {
    words[i] = column + i * kWarpSize < end ? static_cast<Index>(__ldg(from + i * kWarpSize)) : 0;
  }
  const std::int64_t before = tokens_before();
  // Writes the words before column `stop` to backend b.
  const auto write = [&](int b, int stop) {
    Index* to = indices(p)[b] + (before + request * length_offset(b) + column);
    // All of the old words are read before the first is written, or each read would wait for a write.
    [[maybe_unused]] Index old[kMoved];
    if constexpr (kVerified) {
#pragma unroll
      for (int i = 0; i < kMoved; ++i) old[i] = column + i * kWarpSize < stop ? to[i * kWarpSize] : words[i];
    }
#pragma unroll
    for (int i = 0; i < kMoved; ++i) {
      if (column + i * kWarpSize >= stop) continue;
      if (!kVerified || old[i] != words[i]) put(to + i * kWarpSize, words[i]);
    }
  };
  const std::int64_t room = p.packed_capacity - before;
  // Where the longest length fits, all do, and none of several backends looks at the room that it has left.
  if (!kVerified && kIndexDestinations > 1 && request * kLongestOffset + end <= room) {
#pragma unroll(unrolled(kIndexDestinations))
    for (int b = 0; b < kIndexDestinations; ++b) write(b, read_columns(p, tokens, length_offset(b)));
    return;
  }
#pragma unroll 1
  for (int b = 0; b < kIndexDestinations; ++b) {
    const std::int64_t left = room - request * length_offset(b);
    int stop = read_columns(p, tokens, length_offset(b));
    if (left < stop) stop = left > 0 ? static_cast<int>(left) : 0;
    write(b, stop);
  }
}

// No more requests than a warp has lanes: each warp adds up for itself, without shared memory and barriers. Short
// batches have little else to do, and a warp without a tile ends before it looks for one.
__device__ __forceinline__ void write_few(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  std::uint32_t tokens = 0;
  std::uint32_t tiles = 0;
  std::int64_t pool_row = 0;
  if (lane < batch_size) {
    tokens = request_tokens(p, lane);
    pool_row = request_row(p, lane);
    tiles = request_tiles(p, tokens, pool_row);
  }
  if constexpr (kChecked) {
    const std::int64_t end = static_cast<std::int64_t>(warp_running_sum(std::uint64_t{tokens}));
    if (lane < batch_size) check_capacity(p, lane, end + (std::int64_t{lane} + 1) * kLongestOffset);
  }
  const std::uint32_t all_tiles = __reduce_add_sync(kFullMask, tiles);
  const std::uint32_t blocks = table_grid(p);
  const std::uint32_t block = blockIdx.x - kFirstTableBlock;
  const std::uint32_t warps = blocks * kWarps;
  // With a warp for each part of a tile, all parts are moved at once.
  const std::uint32_t parts = all_tiles <= warps / kTileParts ? kTileParts : 1;
  // With a block for each of them, as many SMs store what goes to many backends.
  const bool spread = kIndexDestinations > 3 && all_tiles * parts <= blocks;
  const std::uint32_t in_block = threadIdx.x / kWarpSize;
  const std::uint32_t warp = spread ? in_block * blocks + block : block * kWarps + in_block;
  if (warp >= all_tiles * parts) return;
  std::uint32_t tiles_end = tiles;
  for (int distance = 1; distance < batch_size; distance *= 2) {
    const std::uint32_t other_tiles = __shfl_up_sync(kFullMask, tiles_end, static_cast<unsigned>(distance));
    if (lane >= distance) tiles_end += other_tiles;
  }
  const std::uint32_t tiles_before = tiles_end - tiles;
  if (lane >= batch_size) tiles_end = all_tiles;
  for (std::uint32_t part = warp; part < all_tiles * parts; part += warps) {
    const std::uint32_t tile = part / parts;
    const int found = __popc(__ballot_sync(kFullMask, tiles_end <= tile));  // requests whose tiles end before it
    const int column = static_cast<int>(tile - __shfl_sync(kFullMask, tiles_before, found)) * kTileColumns;
    const std::int64_t row = __shfl_sync(kFullMask, pool_row, found);
    const std::uint32_t count = __shfl_sync(kFullMask, tokens, found);
    const auto before = [&] { return warp_sum(lane < found ? tokens : 0); };
    if (parts > 1) {
      const int first = column + static_cast<int>(part % parts) * (kTileColumns / kTileParts);
      copy_tile<kTileWords / kTileParts>(p, found, row, count, first, before);
    } else {
      copy_tile<kTileWords>(p, found, row, count, column, before);
    }
  }
}

__device__ void write_tables(const Params& p) {
  if (p.batch_size <= kWarpSize) {
    if (p.batch_size > 0) write_few(p);
    return;
  }
  const int batch_size = static_cast<int>(p.batch_size);
  const int slot = static_cast<int>(threadIdx.x);
  const int lane = slot % kWarpSize;
  const std::uint32_t warps = table_grid(p) * kWarps;
  std::uint32_t tile = (blockIdx.x - kFirstTableBlock) * kWarps + threadIdx.x / kWarpSize;
  __shared__ Window window;
  __shared__ std::uint32_t window_tokens[kThreads];
  __shared__ std::uint64_t warp_tokens[kWarps];
  __shared__ std::int64_t pool_rows[kThreads];
  std::int64_t carry = 0;  // tokens of the windows before
  std::uint32_t warp_end = 0;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    std::uint32_t tokens = 0;
    std::uint32_t tiles = 0;
    std::int64_t pool_row = 0;
    if (request < batch_size) {
      tokens = request_tokens(p, request);
      pool_row = request_row(p, request);
      tiles = request_tiles(p, tokens, pool_row);
    }
    const auto in_warp = static_cast<std::uint64_t>(warp_sum(tokens));
    if (first > 0) __syncthreads();  // no warp looks tiles up in the last window any more
    pool_rows[slot] = pool_row;
    window_tokens[slot] = tokens;
    if (lane == 0) warp_tokens[slot / kWarpSize] = in_warp;
    const std::uint32_t window_tiles = count_tiles(window, tiles, warp_end);
    if constexpr (kChecked) {
      const std::int64_t before_warp = warp_sum(lane < slot / kWarpSize ? warp_tokens[lane] : 0);
      const std::int64_t end = carry + before_warp + static_cast<std::int64_t>(warp_running_sum(std::uint64_t{tokens}));
      if (request < batch_size) check_capacity(p, request, end + (std::int64_t{request} + 1) * kLongestOffset);
    }
    for (; tile < window_tiles; tile += warps) {
      const Place place = find_tile(window, warp_end, tile);
      const int column = static_cast<int>(place.tile) * kTileColumns;
      const std::uint32_t count = window_tokens[place.slot];
      copy_tile<kTileWords>(p, first + place.slot, pool_rows[place.slot], count, column, [&] {
        const int full = place.slot / kWarpSize;  // warps of requests before the request's
        const std::uint64_t of_warp = lane < full ? warp_tokens[lane] : 0;
        const std::uint32_t of_request = lane < place.slot % kWarpSize ? window_tokens[full * kWarpSize + lane] : 0;
        return carry + warp_sum(of_warp + of_request);
      });
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) carry += static_cast<std::int64_t>(warp_tokens[w]);
    tile -= window_tiles;  // the tiles of the next window follow on, so that no warp gets ahead
  }
}

// ---- host side of the strategy
// Enough blocks for all tiles of rows of maximum length, up to a limit that follows from the device.
unsigned grid_blocks(const Params& p) {
  const std::int64_t tiles = p.batch_size * ((p.columns - 1) / (kTileColumns / kTileParts) + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  std::int64_t limit = p.sm_count * kBlocksPerSm;
  // With more requests than one warp sums, more blocks sum longer: one destination has three quarters of them then.
  if (kIndexDestinations == 1 && p.batch_size > kWarpSize) limit = limit * 3 / 4;
  const std::int64_t blocks = wanted < limit ? wanted : limit;
  return static_cast<unsigned>(kFirstTableBlock + (blocks > 1 ? blocks : 1));
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  RunningSum<std::uint32_t> kv_indptr_sum;
  if (threadIdx.x == 0) store(p.kv_indptr, b, 0, 0);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    const std::int32_t kv_indptr = wrap(bits(max(base_len, 0)) + offset);
    const std::uint32_t kv_indptr_end = kv_indptr_sum.add(bits(kv_indptr));
    if (!present) continue;
    store(p.kv_indptr, b, request + 1, wrap(kv_indptr_end));
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85(const __grid_constant__ Params p) {
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
int onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid_blocks(params), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_567ba8e3cc7b9b85_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
