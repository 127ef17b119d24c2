// ---- FlashMLA's schedule -----------------------------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of kThreads requests, so the batch has no limit. The parts take the
// requests' blocks in order, each as many as share + kMlaOverhead pay for: kMlaOverhead for each request that it ends,
// and for the one that it cuts. In the cost of all blocks and requests before it, part p + 1 begins at
//
//   begin(p + 1) = y = begin(p) + share, or the end of a request in [y, y + kMlaOverhead] if there is one
//
// because an end that near is paid for, and what remains after it is too little to cut the next request. So between
// two parts that begin with a request, all begins are known at once: the lanes of a warp test one part each. Where
// ends follow one another in few parts, that is looked up: all threads search the next such end for one request each.
constexpr int kMlaBlock = 64;  // tokens
constexpr int kMlaOverhead = 5;  // fixed cost of a request in a part, in blocks

constexpr int kMlaAhead = 32;  // ends that the search for the next one covers
constexpr int kMlaMaxHop = 256;  // parts up to the next end, if that search finds it

// Where the parts begin, in shared memory.
struct Parts {
  std::int64_t begin[kMaxSmParts];  // in cost
  std::int32_t request[kMaxSmParts];
  std::int32_t block[kMaxSmParts];  // within that request
  std::int32_t cuts[kMaxSmParts];  // parts up to and including this one that begin within a request
};

// A chunk of requests, in shared memory.
struct Chunk {
  std::int64_t ends[kThreads + 1];  // the cost of all requests before the chunk, and up to and including each one
  std::uint32_t next[kThreads];  // from an end: the next end that a part begins at, and how many parts later; or 0
};

__device__ __forceinline__ std::int32_t mla_blocks(const Params& p, int request, int b) {
  const std::int32_t length = wrap(bits(request_length(p, request)) + length_offset(b));
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// The cost of a request in blocks, unless a part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request, int b) {
  return static_cast<std::uint64_t>(mla_blocks(p, request, b) + kMlaOverhead);
}

// The first lane of a vote; kWarpSize if there is none.
__device__ __forceinline__ int first_lane(unsigned votes) {
  return votes == 0 ? kWarpSize : __popc((votes & (0u - votes)) - 1u);
}

// The last of `count` + 1 ends that is at or before a cost.
__device__ __forceinline__ int end_before(const Chunk& chunk, int count, std::int64_t cost) {
  int found = 0;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (found + step <= count && chunk.ends[found + step] <= cost) found += step;
  }
  return found;
}

// What Chunk::next says of an end. Ends lie further apart than kMlaOverhead, so that at most one pays for a part.
__device__ __forceinline__ std::uint32_t next_end(
    const Chunk& chunk, int count, int end, std::int64_t share, std::uint64_t reciprocal) {
  const std::int64_t from = chunk.ends[end];
  const int stop = count < end + kMlaAhead ? count : end + kMlaAhead;
  for (int next = end + 1; next < stop; ++next) {
    const std::int64_t distance = chunk.ends[next] - from;
    // The first part that the end isn't too far from: (distance - kMlaOverhead) / share, rounded up.
    const std::int64_t before = distance - kMlaOverhead - 1;
    std::int64_t parts = static_cast<std::int64_t>(__umul64hi(static_cast<std::uint64_t>(before), reciprocal)) + 1;
    if (before - (parts - 1) * share >= share) ++parts;
    if (parts > kMlaMaxHop) return 0;
    if (parts * share <= distance) return static_cast<std::uint32_t>(next * (2 * kMlaMaxHop) + parts);
  }
  return 0;
}

// One warp finds the begins of the parts after `part` that lie before the chunk's last end; returns the last such part.
__device__ __forceinline__ int walk_chunk(
    const Chunk& chunk, int count, std::int64_t share, int stop, int part, Parts& parts) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  std::int64_t begin = parts.begin[part];
  int end = begin == chunk.ends[0] ? 0 : -1;  // the end that the part begins at; -1 within a request
  while (part + 1 < stop) {
    const std::uint32_t next = end >= 0 ? chunk.next[end] : 0;
    if (next > 0) {
      const int steps = static_cast<int>(next % (2 * kMlaMaxHop));
      end = static_cast<int>(next / (2 * kMlaMaxHop));
      const std::int64_t last = chunk.ends[end];
      for (int i = lane + 1; i <= steps && part + i < stop; i += kWarpSize) {
        parts.begin[part + i] = i < steps ? begin + i * share : last;
      }
      begin = last;
      part += steps;
      continue;
    }
    // A lane's part, as if no part before it began at an end.
    std::int64_t mine = begin + (lane + 1) * share;
    const bool inside = mine + kMlaOverhead < chunk.ends[count];
    const int found = inside ? end_before(chunk, count, mine + kMlaOverhead) : 0;
    const bool at_end = inside && chunk.ends[found] >= mine;
    if (at_end) mine = chunk.ends[found];
    const int outside = first_lane(__ballot_sync(kFullMask, !inside));
    const int first_end = first_lane(__ballot_sync(kFullMask, at_end));
    const int steps = first_end < outside ? first_end + 1 : outside;
    if (lane < steps && part + 1 + lane < stop) parts.begin[part + 1 + lane] = mine;
    if (steps == 0) break;
    begin = __shfl_sync(kFullMask, mine, steps - 1);
    end = first_end < outside ? __shfl_sync(kFullMask, found, steps - 1) : -1;
    part += steps;
    if (first_end >= outside && outside < kWarpSize) break;
  }
  return part < stop ? part : stop - 1;
}

// Fills `parts`; ends with a barrier.
__device__ __forceinline__ void find_parts(const Params& p, int b, Parts& parts) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int stop = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  std::uint64_t cost = 0;
  for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request, b);
  std::uint64_t total;
  const std::uint64_t cost_end = block_running_sum(cost, total);
  const std::int64_t share = static_cast<std::int64_t>((total + static_cast<std::uint64_t>(stop) - 1) / stop);
  const std::uint64_t reciprocal = ~std::uint64_t{0} / static_cast<std::uint64_t>(share > 0 ? share : 1);
  for (int i = slot; i < stop; i += kThreads) {
    // Overwritten for the first part, and for the parts that have blocks.
    parts.begin[i] = i == 0 ? 0 : static_cast<std::int64_t>(total);
    parts.request[i] = i == 0 ? 0 : batch_size;
    parts.block[i] = 0;
  }
  __shared__ Chunk chunk;
  __shared__ int last_part;
  int part = 0;  // the first whose request isn't known
  RunningSum<std::uint64_t> cost_sum;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    const int count = batch_size - first < kThreads ? batch_size - first : kThreads;
    const std::uint64_t carry = cost_sum.carry;
    std::uint64_t end = cost_end;  // a thread has one request: its sum is known
    if (batch_size > kThreads) end = cost_sum.add(request < batch_size ? mla_cost(p, request, b) : 0);
    __syncthreads();  // the last chunk's ends aren't read any more
    chunk.ends[slot + 1] = static_cast<std::int64_t>(end);
    if (slot == 0) chunk.ends[0] = static_cast<std::int64_t>(carry);
    __syncthreads();
    chunk.next[slot] = slot < count ? next_end(chunk, count, slot, share, reciprocal) : 0;
    __syncthreads();
    const int known = part;
    if (slot < kWarpSize) {
      const int last = walk_chunk(chunk, count, share, stop, part > 0 ? part - 1 : 0, parts);
      if (slot == 0) last_part = last;
    }
    __syncthreads();
    part = last_part + 1;
    for (int i = known + slot; i < part; i += kThreads) {
      const int found = end_before(chunk, count, parts.begin[i]);
      parts.request[i] = first + found;
      parts.block[i] = static_cast<std::int32_t>(parts.begin[i] - chunk.ends[found]);
    }
  }
  __syncthreads();
  RunningSum<std::uint32_t> cuts;
  for (int first = 0; first < stop; first += kThreads) {
    const int i = first + slot;
    const std::uint32_t sum = cuts.add(i < stop && parts.block[i] > 0 ? 1 : 0);
    if (i < stop) parts.cuts[i] = static_cast<std::int32_t>(sum);
  }
  __syncthreads();
}

// The splits that the request which a part begins within has in the parts before.
__device__ __forceinline__ std::int32_t splits_before(const Parts& parts, int part) {
  if (parts.block[part] == 0) return 0;
  const std::int64_t begin = parts.begin[part] - parts.block[part];
  int found = 0;  // the last part that begins at the request or before it
  for (int step = kMaxSmParts / 2; step > 0; step /= 2) {
    if (found + step <= part && parts.begin[found + step] <= begin) found += step;
  }
  return part - found;
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
        if (part < parts && begin.request[part] <= request) found = part;
      }
    }
    store(p.num_splits, b, request + 1, request + 1 + (request >= 0 ? begin.cuts[found] : 0));
  }
}

__device__ void schedule_flashmla(const Params& p, int b) {
  __shared__ Parts begin;
  find_parts(p, b, begin);
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin.block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin.request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    const std::int32_t blocks_of_last = last >= 0 ? mla_blocks(p, last, b) : 0;
    const std::int32_t stop = ends_within ? begin.block[i + 1] : blocks_of_last;
    const std::int32_t request = begin.request[i];
    const std::int32_t block = begin.block[i];
    const std::int32_t split = splits_before(begin, i);
    if constexpr (kFlashMlaOrder == 2026) {
      const bool first_is_split = block != 0;
      const bool last_is_split = stop != blocks_of_last;
      const std::int32_t begins_split = first_is_split || (request == last && last_is_split);
      const std::int32_t ends_split = last_is_split || (request == last && first_is_split);
      const std::int32_t row[8] = {request, last, block, stop, split, begins_split, ends_split, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    } else {
      const std::int32_t row[8] = {request, block, last, stop, split, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) store(p.flashmla_metadata, b, 8 * i + w, row[w]);
    }
  }
  if constexpr (kHasNumSplits) write_num_splits(p, b, begin);
}
