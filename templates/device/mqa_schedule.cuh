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

// How the units of work are shared out. T holds them all; there are fewer than 2^31 SMs.
template <typename T>
struct Shares {
  T units;
  T num_sms;
  T share;
  T more;  // SMs that get one unit more

  __device__ __forceinline__ Shares(const Params& p, T splits)
      : units(splits * kWorkOfSplit), num_sms(static_cast<T>(p.num_sms)) {
    share = units / num_sms;
    more = units - share * num_sms;
  }

  // The first unit of an SM.
  __device__ __forceinline__ T start(T entry) const {
    if constexpr (!kRemainderLast) return entry * share + (entry < more ? entry : more);
    const T even = num_sms - more;  // the first SM that gets one more
    return entry * share + (entry > even ? entry - even : 0);
  }
};

// Writes an SM's entry: it begins in `item`, before which there are `passed` splits.
template <typename T>
__device__ __forceinline__ void write_entry(
    const Params& p, int b, const Shares<T>& shares, T entry, int items, int item, T passed) {
  // The last entry is the end, and so are entries without work.
  T query = static_cast<T>(items) * kAtoms;
  T split = 0;
  const T start = shares.start(entry);
  if (start < shares.units) {
    query = static_cast<T>(item) * kAtoms;
    split = start - passed * kWorkOfSplit;
    if constexpr (kSplitCost > 0) {
      split /= kWorkOfSplit;
    } else if constexpr (kAtoms > 1) {
      const std::uint32_t per_atom = mqa_splits(p, item, b);
      query += split / per_atom;
      split %= per_atom;
    }
  }
  const std::int64_t index = 2 * static_cast<std::int64_t>(entry);
  store(p.paged_mqa_schedule_metadata, b, index, static_cast<std::int32_t>(query));
  store(p.paged_mqa_schedule_metadata, b, index + 1, static_cast<std::int32_t>(split));
}

// The units of so few items fit in 32 bits, which are divided in a third of the time, unless a split costs much.
constexpr int kLaneItems = 2;  // of a lane at most
constexpr std::uint64_t kMostSplits = (std::uint64_t{1} << 31) / kSplit;  // of an item
using FewUnits = std::conditional_t<
    kWarpSize * kLaneItems * kMostSplits * kWorkOfSplit <= 0xffffffffu, std::uint32_t, std::uint64_t>;

// One or two consecutive items a lane: each warp sums them for itself, without shared memory and a barrier. A look-up
// takes two steps, whose shuffles don't wait for one another.
template <int kItems>
__device__ __forceinline__ void schedule_few(const Params& p, int b, int items) {
  constexpr int kAtOnce = 8;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  if (threadIdx.x - static_cast<unsigned>(lane) > p.num_sms) return;  // no lane of the warp has an entry
  const auto splits_of = [&](int item) { return item < items ? mqa_splits(p, item, b) : 0; };
  const std::uint32_t first_splits = splits_of(lane * kItems);  // of the lane's first item
  const std::uint32_t splits = first_splits + (kItems > 1 ? splits_of(lane * kItems + 1) : 0);
  // The shares don't wait for the running sum: they are divided beside it.
  const Shares<FewUnits> shares(p, __reduce_add_sync(kFullMask, splits));
  const std::uint32_t end = warp_running_sum(splits);
  // All lanes take part in a warp's look-ups.
  for (FewUnits entry = threadIdx.x; entry - static_cast<unsigned>(lane) <= shares.num_sms; entry += kThreads) {
    const FewUnits wanted = shares.start(entry) / kWorkOfSplit;
    int found = 0;  // counts the lanes whose items end at or before it
#pragma unroll
    for (int step = kAtOnce; step > 0; step /= kAtOnce) {
      const int first = found;
#pragma unroll
      for (int i = step; i < step * kAtOnce && i < kWarpSize; i += step) {
        if (__shfl_sync(kFullMask, end, first + i - 1) <= wanted) found += step;
      }
    }
    int item = found * kItems;
    FewUnits passed = __shfl_sync(kFullMask, end - splits, found);
    if constexpr (kItems > 1) {
      const FewUnits next = passed + __shfl_sync(kFullMask, first_splits, found);
      if (next <= wanted) {
        passed = next;
        ++item;
      }
    }
    if (entry <= shares.num_sms) write_entry(p, b, shares, entry, items, item, passed);
  }
}

__device__ void schedule_mqa(const Params& p, int b) {
  const int items = static_cast<int>(kItemIsRow ? p.batch_size * kNextN : p.batch_size);
  if (items <= kWarpSize) return schedule_few<1>(p, b, items);
  if (items <= kWarpSize * kLaneItems) return schedule_few<kLaneItems>(p, b, items);
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
  const Shares<std::uint64_t> shares(p, total);
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
