// ---- lengths -----------------------------------------------------------------------------------------------------
// The sum, which wraps at 2^32 as it does in PyTorch's int32; signed overflow is undefined in C++.
__device__ __forceinline__ std::int32_t wrapping_add(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}
