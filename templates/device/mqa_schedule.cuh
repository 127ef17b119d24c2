// ---- DeepGEMM's schedule of paged MQA logits ---------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of kThreads items, so the batch has no limit. An item is a request, or
// a row of one, with one split for every kSplit tokens (or pools). On sm_90 an item has a number of query atoms, each
// with the item's splits, one unit of work each. On sm_100 the item's tokens share its splits, kSplitCost units each.
// Every SM gets the same number of units; the remainder goes, one unit each, to the last or the first SMs. An SM begins
// with the split that contains its first unit.
constexpr std::uint32_t kSplit = 256;  // tokens, or pools

constexpr std::uint32_t kWorkOfSplit = kSplitCost > 0 ? kSplitCost : kAtoms;

// The splits of an item, or of one of its atoms.
__device__ __forceinline__ std::uint32_t mqa_splits(const Params& p, std::int64_t item, int b) {
  // 32 bits, because a 64-bit index adds 200 instructions to the loops over items.
  const int request = static_cast<int>(kItemIsRow ? item / kNextN : item);
  std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  if constexpr (kItemIsRow) length = expanded_length(length, kNextN, static_cast<int>(item % kNextN));
  if constexpr (kIndexKpool > 1) {
    const std::int32_t pools = floor_div(length, kIndexKpool);
    return ((pools > 1 ? static_cast<std::uint32_t>(pools) : 1u) - 1) / kSplit + 1;
  }
  return length > 0 ? (static_cast<std::uint32_t>(length) - 1) / kSplit + 1 : 0;
}

// The splits of a chunk's items, in shared memory. The sums of a warp have 32 bits: a length has 2^23 splits at most.
struct Splits {
  std::uint32_t in_warp[kThreads];  // up to and including an item, within its warp
  std::uint32_t of_warp[kWarps];
};

__device__ void schedule_mqa(const Params& p, int b) {
  const std::int64_t items = kItemIsRow ? p.batch_size * kNextN : p.batch_size;
  const int slot = static_cast<int>(threadIdx.x);
  const std::uint64_t num_sms = static_cast<std::uint64_t>(p.num_sms);
  std::uint64_t total = 0;  // of all chunks; one chunk's is known when it is added up
  if (items > kThreads) {
    std::uint64_t splits = 0;
    for (std::int64_t item = slot; item < items; item += kThreads) splits += mqa_splits(p, item, b);
    block_running_sum(splits, total);
  }
  __shared__ Splits splits;
  // Each thread writes its entries in order, each in the chunk that contains the entry's first unit.
  std::uint64_t entry = static_cast<std::uint64_t>(slot);
  std::uint64_t carry = 0;  // splits of the chunks before
  for (std::int64_t first = 0; first < items; first += kThreads) {
    const std::int64_t item = first + slot;
    const std::uint32_t in_warp = warp_running_sum(item < items ? mqa_splits(p, item, b) : 0u);
    if (first > 0) __syncthreads();  // no thread reads the previous chunk's any more
    splits.in_warp[slot] = in_warp;
    if (slot % kWarpSize == kWarpSize - 1) splits.of_warp[slot / kWarpSize] = in_warp;
    __syncthreads();
    std::uint64_t chunk = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) chunk += splits.of_warp[w];
    if (items <= kThreads) total = chunk;
    const std::uint64_t units = total * kWorkOfSplit;
    const std::uint64_t share = units / num_sms;
    const std::uint64_t more = units - share * num_sms;  // SMs that get one unit more
    for (; entry < num_sms; entry += kThreads) {
      std::uint64_t start = entry * share;
      if constexpr (kRemainderLast) {
        const std::uint64_t even = num_sms - more;  // the first SM that gets one more
        start += entry > even ? entry - even : 0;
      } else {
        start += entry < more ? entry : more;
      }
      if (start >= (carry + chunk) * kWorkOfSplit) break;
      // The item that contains the start: first its warp, then how many of the warp's items end at or before it.
      std::uint64_t before = carry;
      int found = 0;
#pragma unroll
      for (int w = 0; w < kWarps - 1; ++w) {
        if ((before + splits.of_warp[w]) * kWorkOfSplit > start || found < w * kWarpSize) continue;
        before += splits.of_warp[w];
        found += kWarpSize;
      }
      const std::uint32_t wanted = static_cast<std::uint32_t>(start / kWorkOfSplit - before);
      const int begin = found;
#pragma unroll
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        if (splits.in_warp[found + step - 1] <= wanted) found += step;
      }
      const std::uint32_t passed = found > begin ? splits.in_warp[found - 1] : 0;
      std::uint64_t query = static_cast<std::uint64_t>(first + found) * kAtoms;
      std::uint64_t split = start - (before + passed) * kWorkOfSplit;
      if constexpr (kSplitCost > 0) {
        split /= kSplitCost;
      } else if constexpr (kAtoms > 1) {
        const std::uint32_t per_atom = splits.in_warp[found] - passed;
        query += split / per_atom;
        split %= per_atom;
      }
      store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(query));
      store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, static_cast<std::int32_t>(split));
    }
    carry += chunk;
  }
  // The last entry is the end, and so are entries without work.
  for (; entry <= num_sms; entry += kThreads) {
    store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(items * kAtoms));
    store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, 0);
  }
}
