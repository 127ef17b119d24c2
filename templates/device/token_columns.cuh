// ---- the columns of a tile are tokens ----------------------------------------------------------------------------
[[maybe_unused]] __device__ __forceinline__ int written_columns(const Params&, Ends ends) {
  return longest_end(ends);
}

__device__ __forceinline__ int alignment_offset(const Params& p, std::int64_t row) {
  return alignment_offset(token_table(p), row);
}

// An upper bound of the rows' alignment offsets: 0 if all rows begin at a boundary.
__host__ __device__ __forceinline__ std::int64_t largest_offset(const Params& p) {
  const Table& table = token_table(p)[0];
  const std::uint64_t begin = reinterpret_cast<std::uintptr_t>(table.data) / sizeof(std::int32_t);
  const std::uint64_t stride = static_cast<std::uint64_t>(table.row_stride);
  return begin % kTileAlignment == 0 && stride % kTileAlignment == 0 ? 0 : kTileAlignment - 1;
}
