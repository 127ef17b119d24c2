// ---- look-ups of formulas ----------------------------------------------------------------------------------------
// Whether an index lies within a size. Unsigned comparison: a negative index fails the bound check, too. Indices of 32
// bits need no arithmetic of 64.
template <typename At>
__device__ __forceinline__ bool within(At index, std::int64_t size) {
  using Unsigned = std::make_unsigned_t<At>;
  constexpr std::int64_t kAll = std::int64_t{1} << 31;
  if constexpr (sizeof(At) < sizeof(size)) size = size < kAll ? size : kAll;
  return static_cast<Unsigned>(index) < static_cast<Unsigned>(size);
}

// What isn't there isn't read, and yields `missing`, whose type is the formula's.
template <typename Value, typename T, typename Row, typename Column>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Source<T>& source, Row row, Column column, Value missing) {
  check_look_up(p, request, row, source.rows);
  check_look_up(p, request, column, source.columns);
  const bool row_there = within(row, source.rows);
  // The row's address is computed once for all columns, not in each one's branch.
  const T* data = opaque(source.data + (row_there ? row : 0) * source.row_stride);
  return row_there && within(column, source.columns) ? static_cast<Value>(__ldg(data + column)) : missing;
}

template <typename Value, typename T, typename At>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Map<T>& map, At index, Value missing) {
  check_look_up(p, request, index, map.size);
  return within(index, map.size) ? static_cast<Value>(__ldg(map.data + index)) : missing;
}
