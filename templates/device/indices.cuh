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
