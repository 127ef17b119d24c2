// ---- how far rows are written: to the request's length -----------------------------------------------------------
// Live columns: the first seq_len columns of a row, within the table.
using Ends = SameEnd;

__device__ __forceinline__ int row_reach(const Params& p, std::int64_t request) {
  if constexpr (kLongestOffset == 0) {
    const std::int32_t length = request_length(p, request);
    const int columns = static_cast<int>(p.columns);
    return length < 0 ? 0 : length < columns ? length : columns;
  }
  const std::int64_t length = std::int64_t{request_length(p, request)} + kLongestOffset;
  return static_cast<int>(length < 0 ? 0 : length < p.columns ? length : p.columns);
}

__device__ __forceinline__ Ends ends_at(const Params&, int reach) {
  return {reach};
}
