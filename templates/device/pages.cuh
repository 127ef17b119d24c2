// ---- pages -------------------------------------------------------------------------------------------------------
// The number of pages that hold `tokens` tokens.
__device__ __forceinline__ int pages_of(int tokens) {
  return tokens / kPageSize + (tokens % kPageSize != 0);
}

// The page of a token, rounded down: padding tokens are negative.
__device__ __forceinline__ std::int32_t page_of(Token token) {
  if constexpr ((kPageSize & (kPageSize - 1)) == 0) return static_cast<std::int32_t>(token >> kPageShift);
  return static_cast<std::int32_t>(floor_div(token, kPageSize));
}
