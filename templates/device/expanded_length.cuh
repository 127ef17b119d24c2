// ---- lengths of rows ---------------------------------------------------------------------------------------------
// The length that row `row` of a request with `rows` rows attends to: the last row sees all seq_len tokens, each row
// before it one token less. Never negative: a padding request has fewer tokens than rows, and consumers read the
// length as unsigned.
__device__ __forceinline__ std::int32_t expanded_length(std::int32_t seq_len, int rows, int row) {
  const std::int32_t length = wrap(bits(seq_len) - rows + row + 1);
  return length > 0 ? length : 0;
}
