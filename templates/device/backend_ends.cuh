// ---- how far rows are written: to the request's length in each backend -------------------------------------------
// Live columns: the first seq_len columns of a row, within the table. Each backend adds its own offset to seq_len.
// `reach` represents all backends: it is the length in the backend with the largest offset, capped where even the
// backend with the smallest one reaches the end of the table.
struct Ends {
  const Params& p;
  int reach;
};

__device__ __forceinline__ int row_reach(const Params& p, std::int64_t request) {
  const std::int64_t length = std::int64_t{request_length(p, request)} + kLongestOffset;
  const std::int64_t limit = p.columns + (kLongestOffset - kShortestOffset);
  return static_cast<int>(length < 0 ? 0 : length < limit ? length : limit);
}

__device__ __forceinline__ Ends ends_at(const Params& p, int reach) {
  return {p, reach};
}

// The end in a backend that adds `offset`.
__device__ __forceinline__ int end_with(Ends ends, std::int32_t offset) {
  const int length = ends.reach - (kLongestOffset - offset);
  return length < 0 ? 0 : length < ends.p.columns ? length : static_cast<int>(ends.p.columns);
}

__device__ __forceinline__ int longest_end(Ends ends) {
  return end_with(ends, kLongestOffset);
}

// A table that all backends share is written up to the longest backend's end.
template <int N>
__device__ __forceinline__ bool ends_differ(const Table (&)[N], Ends) {
  return N == kBackends;
}

template <int N>
__device__ __forceinline__ int shortest_end(const Table (&)[N], Ends ends) {
  return end_with(ends, N == kBackends ? kShortestOffset : kLongestOffset);
}

template <int N>
__device__ __forceinline__ int end_of(const Table (&)[N], Ends ends, int b) {
  return end_with(ends, N == kBackends ? length_offset(b) : kLongestOffset);
}
