// ---- how far rows are written: to max_len, at any request length -------------------------------------------------
using Ends = SameEnd;

__device__ __forceinline__ int row_reach(const Params& p, std::int64_t) {
  return static_cast<int>(p.columns);
}

__device__ __forceinline__ Ends ends_at(const Params&, int reach) {
  return {reach};
}
