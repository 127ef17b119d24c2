// ---- division, rounded up ----------------------------------------------------------------------------------------
// The quotient rounded up; the divisor is positive.
template <typename T>
__device__ __forceinline__ T ceil_div(T value, std::common_type_t<T> divisor) {
  return value / divisor + (value % divisor > 0 ? 1 : 0);
}
