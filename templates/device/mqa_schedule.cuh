// ---- DeepGEMM's schedule of paged MQA logits ---------------------------------------------------------------------
// One block computes it from seq_lens, for any batch. An item is a request, or a row of one, with one split for every kSplit tokens (or pools). On sm_90 an item has a number of query atoms, each
// with the item's splits, one unit of work each. On sm_100 the item's tokens share its splits, kSplitCost units each.
// Every SM gets the same number of units; the remainder goes, one unit each, to the last or the first SMs. An SM begins
// with the split that contains its first unit.
constexpr std::uint32_t kSplit = 256;  // tokens, or pools

constexpr std::uint32_t kWorkOfSplit = kSplitCost > 0 ? kSplitCost : kAtoms;

// The splits of an item, or of one of its atoms.
__device__ __forceinline__ std::uint32_t mqa_splits(const Params& p, int item, int b) {
  const int request = kItemIsRow ? item / kNextN : item;
  std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  if constexpr (kItemIsRow) length = expanded_length(length, kNextN, item % kNextN);
  if constexpr (kIndexKpool > 1) {
    const std::int32_t pools = floor_div(length, kIndexKpool);
    return ((pools > 1 ? static_cast<std::uint32_t>(pools) : 1u) - 1) / kSplit + 1;
  }
  return length > 0 ? (static_cast<std::uint32_t>(length) - 1) / kSplit + 1 : 0;
}

__device__ void schedule_mqa(const Params& p, int b) {
  const int items = static_cast<int>(kItemIsRow ? p.batch_size * kNextN : p.batch_size);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  // Splits are summed in 64 bits. Every warp sums all of them by itself, consecutive items in each lane: no barrier.
  const int lane_items = (items + kWarpSize - 1) / kWarpSize;
  const auto splits_of = [&](int item) { return item < items ? mqa_splits(p, item, b) : 0; };
  std::uint64_t splits = 0;
#pragma unroll 4
  for (int i = 0; i < lane_items; ++i) splits += splits_of(lane * lane_items + i);
  const std::uint64_t end = warp_running_sum(splits);
  const std::uint64_t num_sms = static_cast<std::uint64_t>(p.num_sms);
  const std::uint64_t units = __shfl_sync(kFullMask, end, kWarpSize - 1) * kWorkOfSplit;
  const std::uint64_t share = units / num_sms;
  const std::uint64_t more = units - share * num_sms;  // SMs that get one unit more
  // A lane has an entry; all lanes of a warp take part in the look-up.
  for (std::uint64_t entry = threadIdx.x; entry - static_cast<unsigned>(lane) <= num_sms; entry += kThreads) {
    std::uint64_t start = entry * share;
    if constexpr (kRemainderLast) {
      const std::uint64_t even = num_sms - more;  // the first SM that gets one more
      start += entry > even ? entry - even : 0;
    } else {
      start += entry < more ? entry : more;
    }
    // The item that contains the start: how many lanes end at or before it, then how many of the next lane's items.
    const std::uint64_t wanted = start / kWorkOfSplit;
    int found = 0;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      if (__shfl_sync(kFullMask, end, found + step - 1) <= wanted) found += step;
    }
    std::uint64_t passed = __shfl_sync(kFullMask, end - splits, found);  // splits of the items before
    std::uint64_t sum = passed;
    const int begin = found * lane_items;
    int item = begin;
#pragma unroll 4
    for (int i = 0; i < lane_items; ++i) {
      sum += splits_of(begin + i);
      if (sum > wanted) continue;
      passed = sum;
      ++item;
    }
    if (entry > num_sms) continue;
    // The last entry is the end, and so are entries without work.
    std::uint64_t query = static_cast<std::uint64_t>(items) * kAtoms;
    std::uint64_t split = 0;
    if (start < units) {
      query = static_cast<std::uint64_t>(item) * kAtoms;
      split = start - passed * kWorkOfSplit;
      if constexpr (kSplitCost > 0) {
        split /= kWorkOfSplit;
      } else if constexpr (kAtoms > 1) {
        const std::uint32_t per_atom = splits_of(item);
        query += split / per_atom;
        split %= per_atom;
      }
    }
    store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(query));
    store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, static_cast<std::int32_t>(split));
  }
}
