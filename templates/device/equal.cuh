// ---- strategy: rows of equal length ------------------------------------------------------------------------------
// Every row has the same number of tiles, whatever the requests' lengths. Warp row * tiles + i takes tile i of a row,
// and no other: a loop would make the compiler fetch the constants of all destinations before the first load.
//
//   block   0 .. kFirstTableBlock   0             1             2
//          +-----------------------+-------------+-------------+-------------+
//          | vectors, schedules    | tiles 0-7   | tiles 8-15  | tiles 16-23 |   with kWarps = 8
//          +-----------------------+-------------+-------------+-------------+
constexpr int kWideFrom = 16;  // from this many tiles per SM, a warp takes kWideTiles tiles at once
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
