// ---- storing an element ------------------------------------------------------------------------------------------
// Stores one element of a vector or a schedule to every backend; where the backends' lengths differ, to backend b.
template <int N>
__device__ __forceinline__ void store(std::int32_t* const (&to)[N], int b, std::int64_t index, std::int32_t value) {
  if constexpr (kLengthSets > 1) {
    to[b][index] = value;
  } else {
#pragma unroll(unrolled(N))
    for (int i = 0; i < N; ++i) to[i][index] = value;
  }
}
