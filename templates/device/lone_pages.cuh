// ---- tables of pages, without a table of tokens ------------------------------------------------------------------
// The columns of a tile are pages.
[[maybe_unused]] __device__ __forceinline__ int written_columns(const Params& p, Ends ends) {
  return kFillsPages ? static_cast<int>(row_columns(p)) : pages_of(longest_end(ends));
}

__device__ __forceinline__ int alignment_offset(const Params&, std::int64_t) {
  return 0;
}

__host__ __device__ __forceinline__ std::int64_t largest_offset(const Params&) {
  return 0;
}

// Stores this lane's pages of a tile to one table.
template <int kPages, int N>
__device__ __forceinline__ void store_pages(
    const Params& p, const Table (&to)[N], int pages_per_column, std::int64_t row,
    const std::int32_t (&numbers)[kPages], int first, Ends ends) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const int live = pages_of(end_of(to, ends, b));
    const std::int64_t stop = kFillsPages ? row_columns(p) : live;
    std::int32_t* data = to[b].data + row * to[b].row_stride;
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int page = first + lane + i * kWarpSize;
      const bool dead = kFillsPages && ends_differ(to, ends) && page >= live;
      if (page < stop && page % pages_per_column == 0) {
        put(data + page / pages_per_column, dead ? kPageFill : floor_div(numbers[i], pages_per_column));
      }
    }
  }
}

// Reads the numbers of this lane's pages of a tile; those beyond the longest backend's end are kPageFill.
template <int kPages>
__device__ __forceinline__ void read_page_numbers(
    const Params& p, std::int64_t pool_row, std::int32_t (&numbers)[kPages], int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int end = pages_of(longest_end(ends));
#pragma unroll
  for (int i = 0; i < kPages; ++i) {
    const int page = first + lane + i * kWarpSize;
    numbers[i] = page < end ? page_of(__ldg(source + static_cast<std::int64_t>(page) * kPageSize)) : kPageFill;
  }
}

template <int kPages>
__device__ __forceinline__ void write_page_numbers(
    const Params& p, std::int64_t row, const std::int32_t (&numbers)[kPages], int first, Ends ends) {
  for_each_page_table(p, [&](const auto& table, int pages_per_column) {
    store_pages(p, table, pages_per_column, row, numbers, first, ends);
  });
}
