// ---- where rows end: at the same column in all destinations ------------------------------------------------------
// The end is the first column that is not written.
struct SameEnd {
  int end;
};
__device__ __forceinline__ int longest_end(SameEnd ends) {
  return ends.end;
}

template <int N>
__device__ __forceinline__ bool ends_differ(const Table (&)[N], SameEnd) {
  return false;
}

template <int N>
__device__ __forceinline__ int shortest_end(const Table (&)[N], SameEnd ends) {
  return ends.end;
}

template <int N>
__device__ __forceinline__ int end_of(const Table (&)[N], SameEnd ends, int) {
  return ends.end;
}
