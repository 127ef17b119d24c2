// ---- tables of pages alone, verified -----------------------------------------------------------------------------
// A tile is written only if it changed: a page's number, how many pages are live, or how many columns are filled.
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  static_assert(kTiles == 1);
  const std::uint64_t known = *kept_hash(p, row, first);
  std::int32_t numbers[kTileColumns / kWarpSize];
  read_page_numbers(p, pool_row, numbers, first, ends);
  std::uint64_t counts = tile_counts(ends, first, [](int tokens) { return pages_of(tokens); });
  if constexpr (kFillsPages) {
    const int filled = columns_before(static_cast<int>(row_columns(p)), first);
    counts = counts * kMixFactor + static_cast<std::uint64_t>(filled);
  }
  LaneHash lane(counts);
#pragma unroll
  for (const std::int32_t number : numbers) lane.add(number);
  const std::uint64_t hash = lane.of_tile();
  if (known == hash) return;
  write_page_numbers(p, row, numbers, first, ends);
  keep_hash(p, row, first, hash);
}
