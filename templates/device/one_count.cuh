// ---- how many columns of a tile are written: as many in all backends ---------------------------------------------
// `column_end` makes the number of columns of a number of tokens.
template <typename ColumnEnd>
__device__ __forceinline__ std::uint64_t tile_counts(Ends ends, int first, const ColumnEnd& column_end) {
  return static_cast<std::uint64_t>(columns_before(column_end(longest_end(ends)), first));
}
