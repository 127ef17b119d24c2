// ---- one tile of a table row -------------------------------------------------------------------------------------
// A tile is kTileColumns columns of a row. One warp reads it once and writes it to every destination.

// Moves kTiles tiles with 4-byte accesses, column by column: any alignment, any end. Columns before 0 (a tile may begin
// at a boundary before the row) and from the row's end on are skipped.
template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_words(
    const Table (&to)[N], std::int64_t row, const T* source, int first, RowEnds ends) {
  constexpr int kWords = kTiles * kTileColumns / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int end = longest_end(ends);
  std::int32_t words[kWords];
  // Unsigned comparison: a negative column fails the bound check too.
  const unsigned column = static_cast<unsigned>(first + lane);
  const T* from = opaque(source + (first + lane));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = column + i * kWarpSize < static_cast<unsigned>(end);
    words[i] = inside ? static_cast<std::int32_t>(__ldg(from + i * kWarpSize)) : 0;
  }
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const unsigned stop = static_cast<unsigned>(end_of(to, ends, b));
    std::int32_t* data = to[b].data + row * to[b].row_stride + (first + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (column + i * kWarpSize < stop) put(data + i * kWarpSize, words[i]);
    }
  }
}
