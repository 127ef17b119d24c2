// ---- FlashMLA's schedule -----------------------------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of kThreads requests, so the batch has no limit. The parts take the
// requests' blocks in order, so one thread walks along them. If the current part has room for what remains of the
// chunk, the walk skips it; otherwise a search with doubling steps finds the last request that fits. So there is one
// turn per part and per chunk. The walk records where each part begins; all threads derive the entries from that.
constexpr int kMlaBlock = 64;  // tokens
constexpr int kMlaOverhead = 5;  // fixed cost of a request in a part, in blocks

// Where the parts begin, in shared memory.
struct Parts {
  std::int32_t request[kMaxSmParts];
  std::int32_t block[kMaxSmParts];  // within that request
  std::int32_t split[kMaxSmParts];  // splits of that request in earlier parts
  std::int32_t cuts[kMaxSmParts];  // parts up to and including this one that begin within a request; -1 after the last
};

__device__ __forceinline__ std::int32_t mla_blocks(const Params& p, int request, int b) {
  const std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// The cost of a request in blocks, unless a part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request, int b) {
  return static_cast<std::uint64_t>(mla_blocks(p, request, b) + kMlaOverhead);
}

// Fills `begin`; ends with a barrier.
__device__ __forceinline__ void walk_parts(const Params& p, int b, Parts& begin) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  std::uint64_t cost = 0;
  for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request, b);
  std::uint64_t total;
  block_running_sum(cost, total);
  const std::uint64_t share = (total + static_cast<std::uint64_t>(parts) - 1) / static_cast<std::uint64_t>(parts);
  const std::int64_t payload = static_cast<std::int64_t>(share) + kMlaOverhead;

  __shared__ std::int64_t ends[kThreads];  // cost of all requests up to and including one of the chunk
  // The state of the walk; only thread 0 uses it.
  std::int64_t place = 0;  // cost taken so far, without that of splitting
  std::int64_t remain = payload;
  int part = 0;
  std::int32_t block = 0, split = 0, cut = 0;
  for (int i = slot; i < parts; i += kThreads) {
    // The values of parts that the walk doesn't reach; it overwrites the others.
    begin.request[i] = i == 0 ? 0 : batch_size;
    begin.block[i] = begin.split[i] = 0;
    begin.cuts[i] = i == 0 ? 0 : -1;
  }
  RunningSum<std::uint64_t> cost_sum;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    // The sum's barriers come after the walk's last read of the previous chunk's ends.
    ends[slot] = static_cast<std::int64_t>(cost_sum.add(request < batch_size ? mla_cost(p, request, b) : 0));
    __syncthreads();
    const int count = batch_size - first < kThreads ? batch_size - first : kThreads;
    int at = 0;  // the chunk's first request that isn't done
    while (slot == 0 && at < count) {
      const std::int64_t limit = place + remain;
      const int from = at;
      if (ends[count - 1] <= limit) {
        at = count;
      } else {
        int step = 1;
        for (; at + step <= count && ends[at + step - 1] <= limit; step *= 2) at += step;
        for (step /= 2; step > 0; step /= 2) {
          if (at + step <= count && ends[at + step - 1] <= limit) at += step;
        }
      }
      if (at > from) {
        place = ends[at - 1];
        remain = limit - place;
        block = split = 0;
      }
      if (at == count) break;
      // The part ends here, with as many blocks of this request as still fit.
      if (remain > kMlaOverhead) {
        place += remain - kMlaOverhead;
        block += static_cast<std::int32_t>(remain - kMlaOverhead);
        ++split;
        ++cut;
      }
      remain = payload;
      ++part;
      begin.request[part] = first + at;
      begin.block[part] = block;
      begin.split[part] = split;
      begin.cuts[part] = cut;
    }
  }
  __syncthreads();
}

// A request has one split, and one more for each part that begins within it. A template, because Params has num_splits
// only if it is a field.
template <typename P>
__device__ __forceinline__ void write_num_splits(const P& p, int b, const Parts& begin) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int request = static_cast<int>(threadIdx.x) - 1; request < batch_size; request += kThreads) {
    int found = 0;  // the last part that begins in this request or before it
    if (request >= 0) {
      for (int step = kMaxSmParts / 2; step > 0; step /= 2) {
        const int part = found + step;
        if (part < parts && begin.cuts[part] >= 0 && begin.request[part] <= request) found = part;
      }
    }
    store(p.num_splits, b, request + 1, request + 1 + (request >= 0 ? begin.cuts[found] : 0));
  }
}

__device__ void schedule_flashmla(const Params& p, int b) {
  __shared__ Parts begin;
  walk_parts(p, b, begin);
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin.block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin.request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    const std::int32_t blocks_of_last = last >= 0 ? mla_blocks(p, last, b) : 0;
    const std::int32_t stop = ends_within ? begin.block[i + 1] : blocks_of_last;
    const std::int32_t request = begin.request[i];
    const std::int32_t block = begin.block[i];
    if constexpr (kFlashMlaOrder == 2026) {
      const bool first_is_split = block != 0;
      const bool last_is_split = stop != blocks_of_last;
      const std::int32_t begins_split = first_is_split || (request == last && last_is_split);
      const std::int32_t ends_split = last_is_split || (request == last && first_is_split);
      const std::int32_t row[8] = {request, last, block, stop, begin.split[i], begins_split, ends_split, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    } else {
      const std::int32_t row[8] = {request, block, last, stop, begin.split[i], 0, 0, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    }
  }
  if constexpr (kHasNumSplits) write_num_splits(p, b, begin);
}
