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
constexpr int kHalves = kTileWords % 2 == 0 ? 2 : 1;  // that a tile is cut into where there are few

// The number of tokens of a request, without a backend's offset.
__device__ __forceinline__ std::int32_t request_tokens(const Params& p, int request) {
  const std::int32_t length = request_length(p, request);
  return length > 0 ? length : 0;
}

// The number of tokens of a request that are read for a backend with this offset.
__device__ __forceinline__ int read_columns(const Params& p, std::int32_t tokens, std::int32_t offset) {
  const std::int64_t length = std::int64_t{tokens} + offset;
  return static_cast<int>(length < p.columns ? length : p.columns);
}

// Moves kMoved words a lane, a tile of a request or half of one, to every backend. `before` is the number of tokens of
// the requests before it, without the backends' offsets.
template <int kMoved>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t request, std::int64_t pool_row, std::int64_t before, std::int32_t tokens, int first) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int end = read_columns(p, tokens, kLongestOffset);
  Index words[kMoved];
#pragma unroll
  for (int i = 0; i < kMoved; ++i) {
    const int column = first + lane + i * kWarpSize;
    words[i] = column < end ? static_cast<Index>(__ldg(source + column)) : 0;
  }
#pragma unroll(unrolled(kIndexDestinations))
  for (int b = 0; b < kIndexDestinations; ++b) {
    const int stop = read_columns(p, tokens, length_offset(b));
    const std::int64_t begin = before + request * length_offset(b);
    // All of the old words are read before the first is written, or each read would wait for a write.
    [[maybe_unused]] Index old[kMoved];
    if constexpr (kVerified) {
#pragma unroll
      for (int i = 0; i < kMoved; ++i) {
        const int column = first + lane + i * kWarpSize;
        const std::int64_t at = begin + column;
        old[i] = column < stop && at < p.packed_capacity ? indices(p)[b][at] : words[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kMoved; ++i) {
      const int column = first + lane + i * kWarpSize;
      const std::int64_t at = begin + column;
      if (column >= stop || at >= p.packed_capacity) continue;
      if (!kVerified || old[i] != words[i]) put(indices(p)[b] + at, words[i]);
    }
  }
}

// The sum of the values of the lanes before one. A warp adds 32 bits at once: half of them for each lane can't wrap.
__device__ __forceinline__ std::int64_t sum_up_to(std::uint32_t value, int stop) {
  const std::uint32_t counted = static_cast<int>(threadIdx.x % kWarpSize) < stop ? value : 0;
  const std::int64_t high = __reduce_add_sync(kFullMask, counted >> 16);
  return (high << 16) + __reduce_add_sync(kFullMask, counted & 0xffff);
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
    tokens = static_cast<std::uint32_t>(request_tokens(p, lane));
    pool_row = request_row(p, lane);
    const int columns = read_columns(p, static_cast<std::int32_t>(tokens), kLongestOffset);
    if (columns > 0 && pool_row >= 0) tiles = static_cast<std::uint32_t>((columns - 1) / kTileColumns + 1);
  }
  if constexpr (kChecked) {
    const std::int64_t end = static_cast<std::int64_t>(warp_running_sum(std::uint64_t{tokens}));
    if (lane < batch_size) check_capacity(p, lane, end + (std::int64_t{lane} + 1) * kLongestOffset);
  }
  const std::uint32_t all_tiles = __reduce_add_sync(kFullMask, tiles);
  const std::uint32_t warps = (gridDim.x - kFirstTableBlock) * kWarps;
  const std::uint32_t warp = (blockIdx.x - kFirstTableBlock) * kWarps + threadIdx.x / kWarpSize;
  // With a warp for each half of a tile, all halves are moved at once.
  const std::uint32_t parts = kHalves > 1 && all_tiles <= warps / kHalves ? kHalves : 1;
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
    const std::int64_t before = sum_up_to(tokens, found);
    const std::int32_t count = static_cast<std::int32_t>(__shfl_sync(kFullMask, tokens, found));
    if (parts > 1) {
      const int half = column + static_cast<int>(part % parts) * (kTileColumns / kHalves);
      copy_tile<kTileWords / kHalves>(p, found, row, before, count, half);
    } else {
      copy_tile<kTileWords>(p, found, row, before, count, column);
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
  const std::uint32_t warps = (gridDim.x - kFirstTableBlock) * kWarps;
  std::uint32_t tile = (blockIdx.x - kFirstTableBlock) * kWarps + threadIdx.x / kWarpSize;
  __shared__ Window window;
  __shared__ std::int32_t window_tokens[kThreads];
  __shared__ std::uint64_t tokens_before[kThreads];  // of the requests before, within a warp
  __shared__ std::uint64_t warp_tokens[kWarps];
  __shared__ std::int64_t pool_rows[kThreads];
  std::uint64_t carry = 0;  // tokens of the windows before
  std::uint32_t warp_end = 0;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    std::int32_t tokens = 0;
    std::uint32_t tiles = 0;
    std::int64_t pool_row = 0;
    if (request < batch_size) {
      tokens = request_tokens(p, request);
      const int columns = read_columns(p, tokens, kLongestOffset);
      if (columns > 0) tiles = static_cast<std::uint32_t>((columns - 1) / kTileColumns + 1);
      pool_row = request_row(p, request);
      if (pool_row < 0) tiles = 0;
    }
    const std::uint64_t in_warp = warp_running_sum(static_cast<std::uint64_t>(tokens));
    if (first > 0) __syncthreads();  // no warp looks tiles up in the last window any more
    pool_rows[slot] = pool_row;
    window_tokens[slot] = tokens;
    tokens_before[slot] = in_warp - static_cast<std::uint64_t>(tokens);
    if (lane == kWarpSize - 1) warp_tokens[slot / kWarpSize] = in_warp;
    const std::uint32_t window_tiles = count_tiles(window, tiles, warp_end);
    // The tokens before the requests of warp w, in lane w.
    std::uint64_t before_warp = carry;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before_warp += w < lane ? warp_tokens[w] : 0;
      carry += warp_tokens[w];
    }
    const std::uint64_t before_own = __shfl_sync(kFullMask, before_warp, slot / kWarpSize);
    if (request < batch_size) {
      const std::int64_t end = static_cast<std::int64_t>(before_own + in_warp);
      check_capacity(p, request, end + (std::int64_t{request} + 1) * kLongestOffset);
    }
    for (; tile < window_tiles; tile += warps) {
      const Place place = find_tile(window, warp_end, tile);
      const std::uint64_t before =
          __shfl_sync(kFullMask, before_warp, place.slot / kWarpSize) + tokens_before[place.slot];
      const int column = static_cast<int>(place.tile) * kTileColumns;
      const std::int32_t count = window_tokens[place.slot];
      copy_tile<kTileWords>(
          p, first + place.slot, pool_rows[place.slot], static_cast<std::int64_t>(before), count, column);
    }
    tile -= window_tiles;  // the tiles of the next window follow on, so that no warp gets ahead
  }
}

// ---- host side of the strategy
// Enough blocks for all tiles of rows of maximum length, up to a limit that follows from the device.
unsigned grid_blocks(const Params& p) {
  const std::int64_t tiles = p.batch_size * ((p.columns - 1) / (kTileColumns / kHalves) + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const std::int64_t limit = p.sm_count * kBlocksPerSm;
  const std::int64_t blocks = wanted < limit ? wanted : limit;
  return static_cast<unsigned>(kFirstTableBlock + (blocks > 1 ? blocks : 1));
}
