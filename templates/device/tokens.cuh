// ---- tables of tokens --------------------------------------------------------------------------------------------
template <int kTiles>
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, Ends ends) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  copy_columns<kTiles>(token_table(p), row, source, static_cast<int>(p.req_to_token_width), first, ends);
}
