// ---- SGLang's split counts of Triton's attention -----------------------------------------------------------------
// One block computes them from seq_lens, for any batch and all backends. The longest and the shortest length count, so
// each warp looks at all lengths for itself, without shared memory and a barrier.
//
// The float arithmetic is to the bit that of SGLang's Triton kernel on NVIDIA GPUs. There tl.log2 is libdevice's
// __nv_log2f, and so is CUDA's log2f: the same instructions with the same constants, each rounded to nearest. Triton's
// flush subnormal numbers, which don't occur with lengths of 1 or more. The quotient by 64 is exact however it is made,
// and the compiler can't contract the product, because nothing is added to it.
__device__ __forceinline__ std::uint32_t split_length(const Params& p, std::int64_t request) {
  const std::int32_t length = request_length(p, request);
  return length > 1 ? static_cast<std::uint32_t>(length) : 1;
}

__device__ void count_kv_splits(const Params& p, int) {
  if (p.batch_size == 0) return;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  std::uint32_t longest = 1;
  std::uint32_t shortest = 0xffffffffu;
  for (std::int64_t request = lane; request < p.batch_size; request += kWarpSize) {
    const std::uint32_t length = split_length(p, request);
    longest = max(longest, length);
    shortest = min(shortest, length);
  }
  longest = __reduce_max_sync(kFullMask, longest);
  shortest = __reduce_min_sync(kFullMask, shortest);
  // Lengths that differ by less than a quarter count as equal.
  if (std::uint64_t{longest} * 8 < std::uint64_t{shortest} * 10) shortest = longest;
  const std::uint32_t even = min(ceil_div(longest, shortest), kMaxKvSplits);
  const float doublings = log2f(static_cast<float>(longest) / 64);
  const auto cores = static_cast<std::uint32_t>(kCores * (doublings > 1 ? doublings : 1));
  const std::uint64_t blocks = min(static_cast<std::uint64_t>(p.batch_size) * kSplitBlocks, std::uint64_t{cores});
  const std::uint32_t filling = min(ceil_div(cores, static_cast<std::uint32_t>(blocks)), kMaxKvSplits);
  const std::uint32_t even_tokens = ceil_div(longest, even);
  const std::uint32_t filling_tokens = ceil_div(longest, filling);
  for (std::int64_t request = threadIdx.x; request < p.batch_size; request += kThreads) {
    const std::uint32_t length = split_length(p, request);
    const std::uint32_t splits = max(ceil_div(length, even_tokens), ceil_div(length, filling_tokens));
    store_once(p.num_kv_splits, 0, request, static_cast<std::int32_t>(splits));
  }
}
