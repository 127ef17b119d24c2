// ---- destinations ------------------------------------------------------------------------------------------------
// How often a loop over so many destinations is unrolled: fully while that stays short.
[[maybe_unused]] __host__ __device__ constexpr int unrolled(int destinations) {
  return destinations <= 8 ? destinations : 1;
}
