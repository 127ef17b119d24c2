// ---- verified writes: what a tile holds --------------------------------------------------------------------------
// A warp reads its tile as always, and writes it only if the tile would change. A 64-bit hash of what was written last
// says so: one for each tile of each row of the tables, or 0 where nothing is known and the tile is written. It covers
// every word and how many columns each backend has. Where tiles begin depends on the tables' memory alone, so all plans
// of one memory share the hashes, and a tile is touched by one warp of a launch alone, so nothing races.
//
// Exact but for a collision: a tile that changed keeps its hash with a probability of about 2^-63. Each step of a lane
// is injective, in the word and in what was added before; the last one mixes a lane's 64 bits, and the lanes' are
// combined by exclusive or.
constexpr std::uint32_t kCarryFactor = 0xfffeb81bu;  // of Marsaglia's multiply-with-carry generator
constexpr std::uint64_t kMixFactor = 0x9e3779b97f4a7c15ull;

// The hash of the words of one lane, in their order: a multiply-with-carry generator that takes a word in each step.
struct LaneHash {
  std::uint64_t value;

  // Begins with how many columns there are, and which lane it is: equal words of two lanes must not cancel out. Mixed
  // before the lane is added, or the lanes of 33 columns would only be those of 36 in another order.
  __device__ __forceinline__ explicit LaneHash(std::uint64_t counts) : value(counts * kMixFactor) {
    add_word(threadIdx.x % kWarpSize);
  }

  __device__ __forceinline__ void add_word(std::uint32_t word) {
    value = std::uint64_t{static_cast<std::uint32_t>(value) ^ word} * kCarryFactor + (value >> 32);
  }

  template <typename T>
  __device__ __forceinline__ void add(T word) {
    add_word(static_cast<std::uint32_t>(word));
    if constexpr (sizeof(T) > sizeof(std::uint32_t)) {
      add_word(static_cast<std::uint32_t>(static_cast<std::uint64_t>(word) >> 32));
    }
  }

  // The tile's hash, in all lanes; never 0.
  __device__ __forceinline__ std::uint64_t of_tile() const {
    const std::uint64_t mixed = (value ^ value >> 32) * kMixFactor;
    const std::uint32_t low = __reduce_xor_sync(0xffffffffu, static_cast<std::uint32_t>(mixed));
    const std::uint32_t high = __reduce_xor_sync(0xffffffffu, static_cast<std::uint32_t>(mixed >> 32));
    return (std::uint64_t{high} << 32 | low) | 1;
  }
};

// How many columns of the tile that begins at `first` lie before `end`.
__device__ __forceinline__ int columns_before(int end, int first) {
  const int count = end - first;
  return count < 0 ? 0 : count < kTileColumns ? count : kTileColumns;
}

// Where the hash of a tile of a row is kept. A tile may begin up to three columns before a multiple of kTileColumns.
__device__ __forceinline__ std::uint64_t* kept_hash(const Params& p, std::int64_t row, int first) {
  return p.tile_hashes + row * p.tile_hashes_stride + (first + kTileColumns - 1) / kTileColumns;
}

// Keeps the hash of a tile that was written. After the barrier the warp's words are written and no lane reads the old
// hash any more.
__device__ __forceinline__ void keep_hash(const Params& p, std::int64_t row, int first, std::uint64_t hash) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) *kept_hash(p, row, first) = hash;
}

// Keeps no hash of a tile that is written next.
__device__ __forceinline__ void forget_hash(const Params& p, std::int64_t row, int first) {
  if (threadIdx.x % kWarpSize == 0) *kept_hash(p, row, first) = 0;
}
