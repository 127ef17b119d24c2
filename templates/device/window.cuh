// ---- which request a tile belongs to -----------------------------------------------------------------------------
// A window: the tile counts of up to kThreads requests, in shared memory. Each thread adds one request's; then every
// warp can look up a tile's request.
struct Window {
  std::uint32_t tile_end[kThreads];  // tiles up to and including a request's, among its group of kWarpSize requests
  std::uint32_t warp_tiles[kWarps];  // tiles of all requests of a group
};

struct Place {
  int slot;  // of the request in the window
  std::uint32_t tile;  // among the request's tiles
};

// Sums the tiles of the window's requests; `tiles` is the number of this thread's request. Returns the total; in lane
// w, `warp_end` becomes the sum up to and including group w. All threads must call it, after a barrier that follows the
// last look-up. It contains a barrier: what a thread wrote to shared memory before the call can be read after it.
__device__ __forceinline__ std::uint32_t count_tiles(Window& window, std::uint32_t tiles, std::uint32_t& warp_end) {
  static_assert(kWarps <= kWarpSize, "each warp needs a lane");
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  // Few rows of pages have a remainder. Where no lane's has one, there is nothing to sum.
  const bool any = !kPagesAlone || __ballot_sync(kFullMask, tiles > 0) != 0;
  const std::uint32_t in_warp = any ? warp_running_sum(tiles) : 0;
  window.tile_end[threadIdx.x] = in_warp;
  if (lane == kWarpSize - 1) window.warp_tiles[threadIdx.x / kWarpSize] = in_warp;
  __syncthreads();
  std::uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sum += window.warp_tiles[w];
    if (w <= lane) warp_end = sum;  // the lanes after the last warp hold the window's sum
  }
  return sum;
}

// Finds a tile's request: counts the groups that end at or before the tile, then the next group's requests that do.
__device__ __forceinline__ Place find_tile(const Window& window, std::uint32_t warp_end, std::uint32_t tile) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int warp = __popc(__ballot_sync(kFullMask, warp_end <= tile));
  const std::uint32_t before = __shfl_sync(kFullMask, warp_end, warp > 0 ? warp - 1 : 0);
  const std::uint32_t in_warp = tile - (warp > 0 ? before : 0);
  const int passed = __popc(__ballot_sync(kFullMask, window.tile_end[warp * kWarpSize + lane] <= in_warp));
  const int slot = warp * kWarpSize + passed;
  return {slot, in_warp - (passed > 0 ? window.tile_end[slot - 1] : 0)};
}
