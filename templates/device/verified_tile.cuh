// ---- tiles of tokens that are written only if they changed -------------------------------------------------------
// Tiles begin at 16-byte boundaries of the destinations, which a row's address decides alone; with 4-byte stores they
// begin at column 0.
constexpr int kTileAlignment = kVectorStores ? kVectorWords : 1;  // words
constexpr int kTileWords = kTileColumns / kWarpSize;  // of a lane

template <int N>
__device__ __forceinline__ int alignment_offset(const Table (&to)[N], std::int64_t row) {
  if constexpr (!kVectorStores) return 0;
  const std::int32_t* begin = to[0].data + row * to[0].row_stride;
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(std::int32_t) % kTileAlignment);
}

// The columns of a lane in a tile, from its first: groups of four where stores have 16 bytes, else every kWarpSize-th.
__device__ __forceinline__ int first_word() {
  return static_cast<int>(threadIdx.x % kWarpSize) * (kVectorStores ? kVectorWords : 1);
}

__device__ __forceinline__ constexpr int word_offset(int i) {
  return kVectorStores ? i / kVectorWords * kVectorWords * kWarpSize + i % kVectorWords : i * kWarpSize;
}

// Reads this lane's words of tiles; those before column 0 and from `end` on are 0.
template <int kRead, typename T>
__device__ __forceinline__ void read_words(T (&words)[kRead], const T* source, int width, int first, int end) {
  const int column = first + first_word();
  if constexpr (kVectorStores && sizeof(T) == sizeof(std::int32_t)) {
    constexpr int kColumns = kRead * kWarpSize;
    if (first >= kVectorWords && first + kColumns <= end && first + kColumns + kVectorWords <= width) {
      // Source rows begin anywhere: each group is selected from the two aligned groups that it lies in.
      const int shift = words_past_boundary(source + column);
      const int4* aligned = boundary_before(source + column);
      constexpr int kGroups = kRead / kVectorWords;
      int4 low[kGroups], high[kGroups];
#pragma unroll
      for (int u = 0; u < kGroups; ++u) {
        low[u] = __ldg(aligned + u * kWarpSize);
        high[u] = __ldg(aligned + u * kWarpSize + 1);
      }
#pragma unroll
      for (int u = 0; u < kGroups; ++u) {
        const int4 group = realign(low[u], high[u], shift);
        words[u * kVectorWords] = group.x;
        words[u * kVectorWords + 1] = group.y;
        words[u * kVectorWords + 2] = group.z;
        words[u * kVectorWords + 3] = group.w;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kRead; ++i) {
    // Unsigned comparison: a negative column fails the bound check too.
    const bool inside = static_cast<unsigned>(column + word_offset(i)) < static_cast<unsigned>(end);
    words[i] = inside ? __ldg(source + column + word_offset(i)) : 0;
  }
}

// Stores this lane's words of the tile that begins at `first` to every destination. `words` begins with them.
template <int N, typename T>
__device__ __forceinline__ void store_words(
    const Table (&to)[N], std::int64_t row, const T* words, int first, Ends ends) {
  const int column = first + first_word();
  const bool inside = kVectorStores && first >= 0 && first + kTileColumns <= shortest_end(to, ends);
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const unsigned stop = static_cast<unsigned>(end_of(to, ends, b));
    std::int32_t* data = to[b].data + row * to[b].row_stride + column;
    if (inside) {
#pragma unroll
      for (int i = 0; i < kTileWords; i += kVectorWords) {
        *reinterpret_cast<int4*>(data + word_offset(i)) = int4{
            static_cast<std::int32_t>(words[i]), static_cast<std::int32_t>(words[i + 1]),
            static_cast<std::int32_t>(words[i + 2]), static_cast<std::int32_t>(words[i + 3])};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTileWords; ++i) {
        if (static_cast<unsigned>(column + word_offset(i)) < stop) {
          data[word_offset(i)] = static_cast<std::int32_t>(words[i]);
        }
      }
    }
  }
}

// Writes those of kTiles tiles that changed, and calls then(first) for each before its hash is kept. The tile in which
// a row ends changes at nearly every step. A small launch lasts as long as that tile: it is written as soon as its
// words are there, without a hash. As one of several tiles it isn't what a launch waits for.
template <int kTiles, typename Then>
__device__ __forceinline__ void copy_changed(
    const Params& p, std::int64_t row, const Token* source, int first, Ends ends, const Then& then) {
  const int end = longest_end(ends);
  if (kTiles == 1 && first + kTileColumns >= end) {
    forget_hash(p, row, first);
    copy_words<1>(token_table(p), row, source, first, ends);
    then(first);
    return;
  }
  std::uint64_t known[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    known[t] = first + t * kTileColumns < end ? *kept_hash(p, row, first + t * kTileColumns) : 0;
  }
  Token words[kTiles * kTileWords];
  read_words(words, source, static_cast<int>(p.req_to_token_width), first, end);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int begin = first + t * kTileColumns;
    if (begin >= end) break;
    LaneHash lane(tile_counts(ends, begin, [](int tokens) { return tokens; }));
#pragma unroll
    for (int i = 0; i < kTileWords; ++i) lane.add(words[t * kTileWords + i]);
    const std::uint64_t hash = lane.of_tile();
    if (known[t] == hash) continue;
    store_words(token_table(p), row, words + t * kTileWords, begin, ends);
    then(begin);
    keep_hash(p, row, begin, hash);
  }
}
