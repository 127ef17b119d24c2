// ---- look-ups of formulas ----------------------------------------------------------------------------------------
// What isn't there isn't read, and yields `missing`, whose type is the formula's.
template <typename Value, typename T>
__device__ __forceinline__ Value look_up(
    const Params& p, std::int64_t request, const Source<T>& source, std::int64_t row, std::int64_t column,
    Value missing) {
  check_look_up(p, request, row, source.rows);
  check_look_up(p, request, column, source.columns);
  const bool there = row >= 0 && row < source.rows && column >= 0 && column < source.columns;
  return there ? static_cast<Value>(__ldg(source.data + row * source.row_stride + column)) : missing;
}

template <typename Value, typename T>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Map<T>& map, std::int64_t index, Value missing) {
  check_look_up(p, request, index, map.size);
  return index >= 0 && index < map.size ? static_cast<Value>(__ldg(map.data + index)) : missing;
}
