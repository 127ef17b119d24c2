// ---- tables of pages alone, all of which is written --------------------------------------------------------------
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  std::int32_t numbers[kTiles * kTileColumns / kWarpSize];
  read_page_numbers(p, pool_row, numbers, first, ends);
  write_page_numbers(p, row, numbers, first, ends);
}
