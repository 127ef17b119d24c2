// ---- the pages that begin in a tile of tokens --------------------------------------------------------------------
// Stores one page to a table that has one column per `pages_per_column` pages.
template <int N>
__device__ __forceinline__ void store_page(
    const Table (&to)[N], int pages_per_column, std::int64_t row, int page, std::int32_t number, Ends ends) {
  if (page % pages_per_column != 0) return;
  const std::int32_t value = floor_div(number, pages_per_column);
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    if (ends_differ(to, ends) && page >= pages_of(end_of(to, ends, b))) continue;
    put(to[b].data + row * to[b].row_stride + page / pages_per_column, value);
  }
}

__device__ __forceinline__ void write_page(const Params& p, std::int64_t row, int page, Token token, Ends ends) {
  const std::int32_t number = page_of(token);
  for_each_page_table(p, [&](const auto& table, int pages_per_column) {
    store_page(table, pages_per_column, row, page, number, ends);
  });
}

// Writes the pages that begin in kTiles tiles. Their numbers come from req_to_token, never from a destination that
// other threads are writing.
template <int kTiles>
__device__ __forceinline__ void read_pages(
    const Params& p, std::int64_t row, const Token* source, int first, Ends ends) {
  constexpr int kColumns = kTiles * kTileColumns;
  const int end = longest_end(ends);
  const unsigned begin = static_cast<unsigned>(first > 0 ? first : 0);
  const unsigned stop = static_cast<unsigned>(first + kColumns < end ? first + kColumns : end);
  const unsigned stop_page = (stop - 1) / kPageSize + 1;
  unsigned page = (begin + kPageSize - 1) / kPageSize + threadIdx.x % kWarpSize;
  for (; page < stop_page; page += kWarpSize) {
    write_page(p, row, static_cast<int>(page), __ldg(source + static_cast<std::int64_t>(page) * kPageSize), ends);
    if constexpr (kColumns <= kWarpSize * kPageSize) break;  // a lane has one page at most
  }
}
