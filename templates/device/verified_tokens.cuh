// ---- tables of tokens, verified ----------------------------------------------------------------------------------
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  copy_changed<kTiles>(p, row, source, first, ends, [](int) {});
}
