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
  std::uint32_t blocks = table_grid(p) - split.own_blocks;
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
