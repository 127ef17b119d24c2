// ---- storing an element that all backends have alike -------------------------------------------------------------
// Where lengths differ each backend has a block, and the first one stores what doesn't depend on the backend.
template <typename T, int N>
__device__ __forceinline__ void store_once(T* const (&to)[N], int b, std::int64_t index, std::common_type_t<T> value) {
  if (b > 0) return;
#pragma unroll(unrolled(N))
  for (int i = 0; i < N; ++i) put(to[i] + index, value);
}
