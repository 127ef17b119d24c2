// ---- DeepGEMM's schedule of paged MQA logits ---------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of kThreads items, so the batch has no limit. An item is a request, or
// a row of one. Each item has the same number of query atoms, and each atom has one split for every kSplit tokens (or
// pools). Every SM gets the same number of splits; the remainder goes, one split each, to the last or the first SMs.
constexpr std::uint32_t kSplit = 256;  // tokens, or pools

// The splits of one atom of an item.
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
  block_running_sum(splits, total);
  total *= kAtoms;
  const std::uint64_t num_sms = static_cast<std::uint64_t>(p.num_sms);
  const std::uint64_t share = total / num_sms;
  const std::uint64_t more = total % num_sms;  // SMs that get one split more

  // Each thread writes its entries in order, each in the chunk that contains the entry's first split.
  __shared__ std::uint64_t ends[kThreads];  // splits of all items up to and including one of the chunk
  std::uint64_t entry = static_cast<std::uint64_t>(slot);
  RunningSum<std::uint64_t> split_sum;
  for (std::int64_t first = 0; first < items; first += kThreads) {
    const std::int64_t item = first + slot;
    const std::uint64_t carry = split_sum.carry;
    // The sum's barriers come after the last read of the previous chunk's ends.
    ends[slot] = split_sum.add(item < items ? std::uint64_t{kAtoms} * mqa_splits(p, item, b) : 0);
    __syncthreads();
    for (; entry < num_sms; entry += kThreads) {
      std::uint64_t start = entry * share;
      if constexpr (kRemainderLast) {
        const std::uint64_t even = num_sms - more;  // the first SM that gets one more
        start += entry > even ? entry - even : 0;
      } else {
        start += entry < more ? entry : more;
      }
      if (start >= split_sum.carry) break;
      int found = 0;  // items of the chunk that end at or before the start
      for (int step = kThreads / 2; step > 0; step /= 2) {
        if (ends[found + step - 1] <= start) found += step;
      }
      const std::uint64_t before = found > 0 ? ends[found - 1] : carry;
      const std::uint64_t per_atom = kAtoms > 1 ? (ends[found] - before) / kAtoms : 0;
      const std::uint64_t atom = kAtoms > 1 ? (start - before) / per_atom : 0;
      const std::uint64_t first_atom = static_cast<std::uint64_t>(first + found) * kAtoms;
      store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(first_atom + atom));
      const std::uint64_t split = (start - before) - atom * per_atom;
      store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, static_cast<std::int32_t>(split));
    }
  }
  // The last entry is the end, and so are entries that begin after the last split. If the remainder goes to the last
  // SMs, such entries exist only without any splits; they begin at the last item, whose length consumers may look up.
  for (; entry <= num_sms; entry += kThreads) {
    const std::int64_t item = kRemainderLast && entry < num_sms && items > 0 ? items - 1 : items;
    store(p.paged_mqa_schedule_metadata, b, 2 * entry, static_cast<std::int32_t>(item * kAtoms));
    store(p.paged_mqa_schedule_metadata, b, 2 * entry + 1, 0);
  }
}
