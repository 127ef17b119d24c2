// ---- sums over the lanes of a warp -------------------------------------------------------------------------------
// The sum of numbers of up to 58 bits over the lanes of a warp, which adds up 32 bits at once: 26 of them can't wrap.
__device__ __forceinline__ std::int64_t warp_sum(std::int64_t value) {
  constexpr int kLowBits = 26;
  const std::uint32_t low = static_cast<std::uint32_t>(value) & ((1u << kLowBits) - 1);
  const std::uint32_t high = __reduce_add_sync(kFullMask, static_cast<std::uint32_t>(value >> kLowBits));
  return std::int64_t{static_cast<std::int32_t>(high)} * (1 << kLowBits) + __reduce_add_sync(kFullMask, low);
}
