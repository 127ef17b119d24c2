// ---- remainder ---------------------------------------------------------------------------------------------------
// The remainder of floor_div, as Python's %: 0 or more, and less than the divisor, which is positive.
template <typename T>
__device__ __forceinline__ T floor_mod(T value, int divisor) {
  const T remainder = value % divisor;
  return remainder < 0 ? remainder + divisor : remainder;
}
