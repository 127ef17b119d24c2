// ---- DeepGEMM's schedule of paged MQA logits ---------------------------------------------------------------------
// One block computes it from seq_lens, for any batch. An item is a request, or a row of one, with one split for every
// kSplit tokens (or pools). On sm_90 an item has a number of query atoms, each with the item's splits, one unit of
// work each. On sm_100 the item's tokens share its splits, kSplitCost units each. Every SM gets the same number of
// units, and the last or the first SMs get one unit more. An SM begins with the split that contains its first unit.
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

// How the units of work are shared out.
struct Shares {
  std::uint64_t units;
  std::uint64_t num_sms;
  std::uint64_t share;
  std::uint64_t more;  // SMs that get one unit more

  __device__ __forceinline__ Shares(const Params& p, std::uint64_t splits)
      : units(splits * kWorkOfSplit), num_sms(static_cast<std::uint64_t>(p.num_sms)) {
    share = units / num_sms;
    more = units - share * num_sms;
  }

  // The first unit of an SM.
  __device__ __forceinline__ std::uint64_t start(std::uint64_t entry) const {
    if constexpr (!kRemainderLast) return entry * share + (entry < more ? entry : more);
    const std::uint64_t even = num_sms - more;  // the first SM that gets one more
    return entry * share + (entry > even ? entry - even : 0);
  }
};

// Writes an SM's entry: it begins in `item`, before which there are `passed` splits.
__device__ __forceinline__ void write_entry(
    const Params& p, int b, const Shares& shares, std::uint64_t entry, int items, int item, std::uint64_t passed) {
  // The last entry is the end, and so are entries without work.
  std::uint64_t query = static_cast<std::uint64_t>(items) * kAtoms;
  std::uint64_t split = 0;
  const std::uint64_t start = shares.start(entry);
  if (start < shares.units) {
    query = static_cast<std::uint64_t>(item) * kAtoms;
    split = start - passed * kWorkOfSplit;
    if constexpr (kSplitCost > 0) {
      split /= kWorkOfSplit;
    } else if constexpr (kAtoms > 1) {
      const std::uint32_t per_atom = mqa_splits(p, item, b);
      query += split / per_atom;
      split %= per_atom;
    }
  }
  store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(query));
  store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, static_cast<std::int32_t>(split));
}

// No more items than a warp has lanes: each warp sums them for itself, without shared memory and a barrier, in as few
// steps as there are items.
__device__ __forceinline__ void schedule_few(const Params& p, int b, int items) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const std::uint32_t splits = lane < items ? mqa_splits(p, lane, b) : 0;
  std::uint32_t end = splits;
  int reach = 1;
  for (; reach < items; reach *= 2) {
    const std::uint32_t other = __shfl_up_sync(kFullMask, end, static_cast<unsigned>(reach));
    if (lane >= reach) end += other;
  }
  const Shares shares(p, __shfl_sync(kFullMask, end, reach - 1));
  // All lanes take part in a warp's look-ups.
  for (std::uint64_t entry = threadIdx.x; entry - static_cast<unsigned>(lane) <= shares.num_sms; entry += kThreads) {
    const std::uint64_t wanted = shares.start(entry) / kWorkOfSplit;
    int item = 0;  // counts the items that end at or before it
    for (int step = reach / 2; step > 0; step /= 2) {
      if (__shfl_sync(kFullMask, end, item + step - 1) <= wanted) item += step;
    }
    const std::uint32_t passed = __shfl_sync(kFullMask, end - splits, item);
    if (entry <= shares.num_sms) write_entry(p, b, shares, entry, items, item, passed);
  }
}

__device__ void schedule_mqa(const Params& p, int b) {
  const int items = static_cast<int>(kItemIsRow ? p.batch_size * kNextN : p.batch_size);
  if (items <= kWarpSize) return schedule_few(p, b, items);
  // Each thread sums consecutive items, and looks up in the sums of all threads.
  const int slot = static_cast<int>(threadIdx.x);
  const int thread_items = (items - 1) / kThreads + 1;
  const auto splits_of = [&](int item) { return item < items ? mqa_splits(p, item, b) : 0; };
  std::uint64_t splits = 0;
  for (int i = 0; i < thread_items; ++i) splits += splits_of(slot * thread_items + i);
  __shared__ std::uint64_t in_warp[kThreads];  // splits up to and including a thread's, within its warp
  __shared__ std::uint64_t of_warp[kWarps];
  const std::uint64_t end = warp_running_sum(splits);
  in_warp[slot] = end;
  if (slot % kWarpSize == kWarpSize - 1) of_warp[slot / kWarpSize] = end;
  __syncthreads();
  std::uint64_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += of_warp[w];
  const Shares shares(p, total);
  for (std::uint64_t entry = threadIdx.x; entry <= shares.num_sms; entry += kThreads) {
    const std::uint64_t wanted = shares.start(entry) / kWorkOfSplit;
    // The warp, the thread and the item that contain it: how many end at or before it.
    std::uint64_t passed = 0;
    int begin = 0;
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w) {
      if (begin < w * kWarpSize || passed + of_warp[w] > wanted) continue;
      passed += of_warp[w];
      begin += kWarpSize;
    }
    int found = begin;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      if (passed + in_warp[found + step - 1] <= wanted) found += step;
    }
    if (found > begin) passed += in_warp[found - 1];
    int item = found * thread_items;
    for (int i = 1; i < thread_items; ++i) {
      const std::uint64_t next = passed + splits_of(item);
      if (next > wanted) break;
      passed = next;
      ++item;
    }
    write_entry(p, b, shares, entry, items, item, passed);
  }
}
