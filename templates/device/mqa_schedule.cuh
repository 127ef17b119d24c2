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

__device__ void schedule_mqa(const Params& p, int b) {
  const std::int64_t items = kItemIsRow ? p.batch_size * kNextN : p.batch_size;
  const int slot = static_cast<int>(threadIdx.x);
  std::uint64_t splits = 0;
  for (std::int64_t item = slot; item < items; item += kThreads) splits += mqa_splits(p, item, b);
  std::uint64_t total;
  const std::uint64_t splits_end = block_running_sum(splits, total);
  total *= kWorkOfSplit;
  const std::uint64_t num_sms = static_cast<std::uint64_t>(p.num_sms);
  const std::uint64_t share = total / num_sms;
  const std::uint64_t more = total % num_sms;  // SMs that get one unit more

  // Each thread writes its entries in order, each in the chunk that contains the entry's first unit.
  __shared__ std::uint64_t ends[kThreads];  // units of all items up to and including one of the chunk
  std::uint64_t entry = static_cast<std::uint64_t>(slot);
  RunningSum<std::uint64_t> work_sum;
  for (std::int64_t first = 0; first < items; first += kThreads) {
    const std::int64_t item = first + slot;
    const std::uint64_t carry = work_sum.carry;
    if (items <= kThreads) {
      ends[slot] = splits_end * kWorkOfSplit;  // a thread has one item: its sum is known
      work_sum.carry = total;
    } else {
      // The sum's barriers come after the last read of the previous chunk's ends.
      ends[slot] = work_sum.add(item < items ? std::uint64_t{kWorkOfSplit} * mqa_splits(p, item, b) : 0);
    }
    __syncthreads();
    for (; entry < num_sms; entry += kThreads) {
      std::uint64_t start = entry * share;
      if constexpr (kRemainderLast) {
        const std::uint64_t even = num_sms - more;  // the first SM that gets one more
        start += entry > even ? entry - even : 0;
      } else {
        start += entry < more ? entry : more;
      }
      if (start >= work_sum.carry) break;
      int found = 0;  // items of the chunk that end at or before the start
      for (int step = kThreads / 2; step > 0; step /= 2) {
        if (step <= items && ends[found + step - 1] <= start) found += step;
      }
      const std::uint64_t before = found > 0 ? ends[found - 1] : carry;
      std::uint64_t query = static_cast<std::uint64_t>(first + found) * kAtoms;
      std::uint64_t split = start - before;
      if constexpr (kSplitCost > 0) {
        split /= kSplitCost;
      } else if constexpr (kAtoms > 1) {
        const std::uint64_t per_atom = (ends[found] - before) / kAtoms;
        query += split / per_atom;
        split %= per_atom;
      }
      store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(query));
      store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, static_cast<std::int32_t>(split));
    }
  }
  // The last entry is the end, and so are entries without work.
  for (; entry <= num_sms; entry += kThreads) {
    store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(items * kAtoms));
    store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, 0);
  }
}
