// ---- 16-byte accesses --------------------------------------------------------------------------------------------
// Tiles begin at multiples of this in the destination: a 128-byte line, or a whole tile if that is shorter.
constexpr int kTileAlignment = kTileColumns < 32 ? kTileColumns : 32;  // words

// The first tile of a row begins this many columns before column 0. A row's address modulo 16 bytes is the same in all
// destinations; where it isn't, bind chooses a kernel with 4-byte stores.
template <int N>
__device__ __forceinline__ int alignment_offset(const Table (&to)[N], std::int64_t row) {
  const std::int32_t* begin = to[0].data + row * to[0].row_stride;
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(std::int32_t) % kTileAlignment);
}

// Moves kTiles tiles with 16-byte accesses if they lie inside the rows of all destinations; returns whether they do.
// If so, it calls `then` with the words that this lane moved. `width` is the number of readable elements of the source
// row.
template <int kTiles, typename T, int N, typename RowEnds, typename Then>
__device__ __forceinline__ bool copy_vectors(
    const Table (&to)[N], std::int64_t row, const T* source, int width, int first, RowEnds ends, const Then& then) {
  int4 words[kTiles * kUnroll];
  constexpr int kAccesses = kTiles * kUnroll;
  constexpr int kColumns = kTiles * kTileColumns;
  constexpr bool kRealigns = sizeof(T) == sizeof(std::int32_t);
  const int stop = shortest_end(to, ends);
  const int column = first + static_cast<int>(threadIdx.x % kWarpSize) * kVectorWords;
  if constexpr (kRealigns) {
    // Source rows have any alignment: each group of four words is selected from the two aligned groups that contain it.
    int next = 1;
    if constexpr (kEqualRows) {
      // A row that needs no shift has no second group to read, so 16-byte accesses reach its very end.
      const int shift = words_past_boundary(source + column);
      next = shift > 0 ? 1 : 0;
      const int behind = shift > 0 ? kVectorWords - shift : 0;
      if (first < shift || first + kColumns > stop || first + kColumns + behind > width) return false;
    } else {
      if (first < kVectorWords || first + kColumns > stop || first + kColumns + kVectorWords > width) return false;
    }
    const int shift = words_past_boundary(source + column);
    const int4* aligned = boundary_before(source + column);
    int4 high[kAccesses];
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + next);
    }
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) words[u] = realign(words[u], high[u], shift);
  } else {
    if (first < 0 || first + kColumns > stop) return false;
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const T* at = source + column + u * kWarpSize * kVectorWords;
      words[u].x = static_cast<std::int32_t>(__ldg(at));
      words[u].y = static_cast<std::int32_t>(__ldg(at + 1));
      words[u].z = static_cast<std::int32_t>(__ldg(at + 2));
      words[u].w = static_cast<std::int32_t>(__ldg(at + 3));
    }
  }
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    int4* data = reinterpret_cast<int4*>(to[b].data + row * to[b].row_stride + column);
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) data[u * kWarpSize] = words[u];
  }
  then(words);
  return true;
}

// Moves kTiles tiles: with 16-byte accesses inside the rows, with 4-byte accesses at their ends.
template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_columns(
    const Table (&to)[N], std::int64_t row, const T* source, int width, int first, RowEnds ends) {
  if (!copy_vectors<kTiles>(to, row, source, width, first, ends, [](const auto&) {})) {
    copy_words<kTiles>(to, row, source, first, ends);
  }
}
