// ---- remainder ---------------------------------------------------------------------------------------------------
// What floor_div leaves, as Python's %: from 0 up to the divisor, which is positive.
template <typename T>
__device__ __forceinline__ T floor_mod(T value, int divisor) {
  const T remainder = value % divisor;
  return remainder < 0 ? remainder + divisor : remainder;
}
