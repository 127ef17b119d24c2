// ---- lengths of rows ---------------------------------------------------------------------------------------------
// How many tokens row `row` of a request with `rows` rows attends to: the last row all seq_len, each row before it one
// fewer. Never negative, because consumers read it as unsigned; a padding request has fewer tokens than rows.
__device__ __forceinline__ std::int32_t expanded_length(std::int32_t seq_len, int rows, int row) {
  const std::int32_t length = wrap(bits(seq_len) - rows + row + 1);
  return length > 0 ? length : 0;
}
