// ---- strategy: requests with different numbers of rows -----------------------------------------------------------
// The place of a request's rows depends on the numbers of rows of all requests before it. Every block sums these
// itself, window by window, together with the tiles; the warps of all blocks take the tiles in turn. The cost follows
// the live columns, not the table's width, and no warp gets more than its share, however uneven the requests are. The
// tiles of a request are those of its first row, then those of the next one.
//
//   block   0 .. kFirstTableBlock   the other blocks
//          +-----------------------+-----------------------------------------+
//          | vectors, schedules    | tile, tile + warps, ...                 |
//          +-----------------------+-----------------------------------------+
__device__ void write_tables(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int slot = static_cast<int>(threadIdx.x);
  const std::uint32_t warps = table_grid(p) * kWarps;
  std::uint32_t tile = (blockIdx.x - kFirstTableBlock) * kWarps + threadIdx.x / kWarpSize;
  __shared__ Window window;
  __shared__ std::int32_t reaches[kThreads];  // how far a request is written
  __shared__ std::uint32_t row_tiles[kThreads];  // tiles of each of its rows
  __shared__ std::int64_t pool_rows[kThreads];
  __shared__ std::int64_t first_rows[kThreads];
  int first = -kThreads;  // the window's first request; there is no window yet
  std::uint32_t window_tiles = 0;  // the window's tiles, which the warps take in turn
  std::uint32_t warp_end = 0;
  RunningSum<std::uint32_t> row_sum;
  while (true) {
    while (tile >= window_tiles) {
      tile -= window_tiles;  // the turn goes on with the next window's tiles, so that all warps get equally many
      first += kThreads;
      if (first >= batch_size) return;
      const int request = first + slot;
      const int count = request < batch_size ? request_rows(p, request) : 0;
      const std::int64_t stop_row = row_sum.add(static_cast<std::uint32_t>(count));
      const Rows rows = rows_within(p, request, {stop_row - count, stop_row});
      int reach = 0;
      std::uint32_t tiles = 0;
      std::int64_t pool_row = -1;
      if (rows.first < rows.stop) {
        reach = row_reach(p, request);
        const int columns = written_columns(p, ends_at(p, reach));
        const int reached = columns + static_cast<int>(largest_offset(p));
        if (columns > 0) tiles = static_cast<std::uint32_t>(reached - 1) / kTileColumns + 1;
      }
      // The barrier below comes after the last look-up in the previous window.
      window_tiles = 0;
      if (!__syncthreads_or(tiles > 0)) continue;
      if (tiles > 0) pool_row = request_row(p, request);
      if (pool_row < 0) tiles = 0;
      first_rows[slot] = rows.first;
      pool_rows[slot] = pool_row;
      reaches[slot] = reach;
      row_tiles[slot] = tiles;
      tiles *= static_cast<std::uint32_t>(rows.stop - rows.first);
      window_tiles = count_tiles(window, tiles, warp_end);
    }
    const Place place = find_tile(window, warp_end, tile);
    const std::uint32_t before = place.tile / row_tiles[place.slot];  // rows of the request
    const std::int64_t row = first_rows[place.slot] + before;
    const std::uint32_t in_row = place.tile - before * row_tiles[place.slot];
    const int column = static_cast<int>(in_row) * kTileColumns - alignment_offset(p, row);
    const Ends ends = ends_at(p, reaches[place.slot]);
    if (column < written_columns(p, ends)) copy_tile<1>(p, row, pool_rows[place.slot], column, ends);
    tile += warps;
  }
}

// ---- host side of the strategy
// Enough blocks for all tiles of rows of maximum length, up to a limit that follows from the device.
unsigned grid_blocks(const Params& p) {
  const std::int64_t tiles = p.batch_size * ((row_columns(p) + largest_offset(p) - 1) / kTileColumns + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const std::int64_t limit = p.sm_count * kBlocksPerSm;
  const std::int64_t blocks = wanted < limit ? wanted : limit;
  return static_cast<unsigned>(kFirstTableBlock + (blocks > 1 ? blocks : 1));
}
