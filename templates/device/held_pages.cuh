// ---- tables of tokens and of pages: the tokens that begin pages are in registers already -------------------------
// A page is a multiple of four tokens, so these tokens are at the same place in every lane's four words.

// One of four words. Selects instead of an indexed array, which would be in local memory.
__device__ __forceinline__ std::int32_t word_of(int4 words, int index) {
  const std::int32_t even = index & 2 ? words.z : words.x;
  const std::int32_t odd = index & 2 ? words.w : words.y;
  return index & 1 ? odd : even;
}

// Writes the pages that begin in a tile inside the row. `words` holds the tile's tokens.
template <int kAccesses>
__device__ __forceinline__ void write_held_pages(
    const Params& p, std::int64_t row, const int4 (&words)[kAccesses], int first, Ends ends) {
  constexpr int kGroup = kWarpSize * kVectorWords;  // columns that a warp holds in words[u]
  static_assert(kPageSize % kVectorWords == 0 && kAccesses * kGroup <= kWarpSize * kPageSize);
  const int before = -first & (kPageSize - 1);  // columns of the tile that belong to the previous page
  // Where in the tile this lane's page begins, and which lane holds its token.
  const int column = before + static_cast<int>(threadIdx.x % kWarpSize) * kPageSize;
  const int holder = column / kVectorWords % kWarpSize;
  std::int32_t token = 0;
#pragma unroll
  for (int u = 0; u < kAccesses; ++u) {
    const std::int32_t found = __shfl_sync(0xffffffffu, word_of(words[u], before % kVectorWords), holder);
    if (column / kGroup == u) token = found;
  }
  if (column < kAccesses * kGroup) write_page(p, row, (first + column) / kPageSize, token, ends);
}

template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  const int width = static_cast<int>(p.req_to_token_width);
  if (copy_vectors<kTiles>(token_table(p), row, source, width, first, ends, [&](const auto& words) {
        write_held_pages(p, row, words, first, ends);
      }))
    return;
  copy_words<kTiles>(token_table(p), row, source, first, ends);
  read_pages<kTiles>(p, row, source, first, ends);
}
