// ---- lengths of sparse attention ---------------------------------------------------------------------------------
// The tokens of a length that sparse attention reads: at most kIndexTopk in complete pools, and every token behind
// the last complete pool.
__device__ __forceinline__ std::int32_t nsa_length(std::int32_t length) {
  if constexpr (kIndexKpool == 1) return length < kIndexTopk ? length : kIndexTopk;
  const std::int32_t remainder = length % kIndexKpool;
  const std::int32_t tail = remainder < 0 ? remainder + kIndexKpool : remainder;
  const std::int32_t complete = length - tail;
  return (complete < kIndexTopk ? complete : kIndexTopk) + tail;
}
