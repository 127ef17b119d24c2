// ---- storing an element of a strided vector ----------------------------------------------------------------------
// Like store(), where a destination has its own strides; `once` if all backends have the same, though lengths differ.
template <bool once, typename T, int N>
__device__ __forceinline__ void store_strided(
    const Strided<T> (&to)[N], int b, std::int64_t request, std::int64_t row, std::common_type_t<T> value) {
  if constexpr (kLengthSets > 1 && !once) {
    put(to[b].data + request * to[b].request_stride + row * to[b].row_stride, value);
  } else {
    if (kLengthSets > 1 && b > 0) return;
#pragma unroll(unrolled(N))
    for (int i = 0; i < N; ++i) put(to[i].data + request * to[i].request_stride + row * to[i].row_stride, value);
  }
}
