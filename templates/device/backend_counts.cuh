// ---- how many columns of a tile are written: a number for each backend -------------------------------------------
// All of the numbers in one; they differ in the tiles that a backend's columns end in. `column_end` makes the number of
// columns of a number of tokens.
template <typename ColumnEnd>
__device__ __forceinline__ std::uint64_t tile_counts(Ends ends, int first, const ColumnEnd& column_end) {
  if (columns_before(column_end(end_with(ends, kShortestOffset)), first) == kTileColumns) return kTileColumns;
  std::uint64_t counts = 1;
#pragma unroll(unrolled(kBackends))
  for (int b = 0; b < kBackends; ++b) {
    const int count = columns_before(column_end(end_with(ends, length_offset(b))), first);
    counts = counts * kMixFactor + static_cast<std::uint64_t>(count);
  }
  return counts;
}
