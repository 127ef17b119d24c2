// ---- the rows of a request ---------------------------------------------------------------------------------------
// All of them get the same tokens. Each has tiles of its own, because its alignment offset is its own: rows whose stride
// isn't a multiple of four begin anywhere. What the first row reads, the others find in the L1 cache.

// The largest alignment offset of these rows, or an upper bound.
__device__ __forceinline__ int longest_offset(const Params& p, Rows rows) {
  return rows.stop - rows.first == 1 ? alignment_offset(p, rows.first) : kTileAlignment - 1;
}

// Copies the kTiles tiles of each row that begin at `place`, columns from where the row's first tile begins. `columns`
// is how many are written.
template <int kTiles>
__device__ __forceinline__ void copy_rows(
    const Params& p, Rows rows, std::int64_t pool_row, int place, int columns, Ends ends) {
#pragma unroll 1
  for (std::int64_t row = rows.first; row < rows.stop; ++row) {
    const int column = place - alignment_offset(p, row);
    if (column < columns) copy_tile<kTiles>(p, row, pool_row, column, ends);
  }
}
