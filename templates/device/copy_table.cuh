// ---- copying a precomputed table ---------------------------------------------------------------------------------
// All rows are equally long. The warps of all blocks take the tiles in turn.
template <int N>
__device__ __forceinline__ void copy_table(
    const Table& from, const Table (&to)[N], std::int64_t row_count, std::int64_t column_count) {
  const int columns = static_cast<int>(column_count);
  const std::uint32_t tiles_per_row = static_cast<std::uint32_t>((columns + kTileAlignment - 2) / kTileColumns + 1);
  const std::uint32_t tiles = columns > 0 ? tiles_per_row * static_cast<std::uint32_t>(row_count) : 0;
  for (std::uint32_t tile = blockIdx.x * kWarps + threadIdx.x / kWarpSize; tile < tiles; tile += gridDim.x * kWarps) {
    const std::int64_t row = tile / tiles_per_row;
    const std::int32_t* source = from.data + row * from.row_stride;
    const int column = static_cast<int>(tile % tiles_per_row) * kTileColumns - alignment_offset(to, row);
    if (column < columns) copy_columns<1>(to, row, source, columns, column, SameEnd{columns});
  }
}
