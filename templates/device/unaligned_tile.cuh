// ---- 4-byte accesses throughout ----------------------------------------------------------------------------------
// Destinations whose addresses differ modulo 16 bytes can't take the same 16-byte stores.
constexpr int kTileAlignment = 1;  // words

template <int N>
__device__ __forceinline__ int alignment_offset(const Table (&)[N], std::int64_t) {
  return 0;
}

template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_columns(
    const Table (&to)[N], std::int64_t row, const T* source, int, int first, RowEnds ends) {
  copy_words<kTiles>(to, row, source, first, ends);
}
