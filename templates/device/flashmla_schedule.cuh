// ---- FlashMLA's schedule -----------------------------------------------------------------------------------------
// One block computes it from seq_lens, in chunks of requests, so the batch has no limit. The parts take the requests'
// blocks in order, each as many as share + kMlaOverhead pay for: kMlaOverhead for each request that it ends, and for
// the one that it cuts. In the cost of all blocks and requests before it, part p + 1 begins at
//
//   begin(p + 1) = y = begin(p) + share, or the end of a request in [y, y + kMlaOverhead] if there is one
//
// because an end that near is paid for, and what remains after it is too little to cut the next request. So from an end
// that a part begins at, the next such end is the first at a distance that leaves at most kMlaOverhead when divided by
// share, and the parts between begin at multiples of share. Every thread looks for the next end of one end: a hop. Hops
// over 2, 4, 8 ... ends are joined of shorter ones, and every part takes those that lead to it, the longest first: no
// part waits for the one before it.
constexpr int kMlaBlock = 64;  // tokens
constexpr int kMlaOverhead = 5;  // fixed cost of a request in a part, in blocks
constexpr int kMlaChunk = kThreads < 256 ? kThreads : 256;  // requests
constexpr int kMlaLevels = 9;  // hops over 1, 2, 4 ... 256 ends
constexpr int kMlaGroup = kThreads < 8 ? kThreads : 8;  // ends that a thread tests at once
constexpr std::uint32_t kMlaHop = 1u << 16;  // a hop is the end that it leads to * kMlaHop + the parts until there

// Where the parts begin, in shared memory.
struct Parts {
  std::int32_t request[kMaxSmParts];
  std::int32_t block[kMaxSmParts];  // within that request
  std::int32_t cuts[kMaxSmParts];  // parts up to and including this one that begin within a request
};

// The last part whose begin is known.
struct LastPart {
  std::uint64_t begin;  // in cost
  std::int32_t part;
  std::int32_t cuts;
};

// A chunk of requests, in shared memory. Hops begin at end 0, which is where the last part before the chunk begins, or
// at the end of one of its requests, from 1 on.
struct Chunk {
  std::uint64_t ends[kMlaChunk + 1];  // the cost of all requests up to and including each one
  std::uint32_t
      rests[kMlaChunk];  // what the distance of end i + 1 from end 0 leaves when divided by share; modulo 2^32
  std::uint32_t hops[kMlaLevels][kMlaChunk];  // from each end over 2^level ends; 0 if the chunk has no such end
  LastPart last;
};

__device__ __forceinline__ std::int32_t mla_length(const Params& p, int request, int b) {
  return wrap(bits(request_length(p, request)) + length_offset(b));
}

__device__ __forceinline__ std::int32_t mla_blocks(std::int32_t length) {
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// The cost of a request in blocks, unless a part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request, int b) {
  return static_cast<std::uint64_t>(mla_blocks(mla_length(p, request, b)) + kMlaOverhead);
}

// The last of ascending numbers 0 .. last that is at most `limit`, as number 0 is. `step` is a power of two above
// last / 2.
template <typename T>
__device__ __forceinline__ int last_at_most(const T* numbers, int last, int step, T limit) {
  int found = 0;
  for (; step > 0; step /= 2) {
    if (found + step <= last && numbers[found + step] <= limit) found += step;
  }
  return found;
}

// The hop from an end over one. Ends lie further apart than kMlaOverhead, so that at most one pays for a part.
__device__ __forceinline__ std::uint32_t first_hop(const Chunk& chunk, int count, int end, std::uint64_t share) {
  const std::uint32_t own_rest = end > 0 ? chunk.rests[end - 1] : 0;
  for (int group = end / kMlaGroup * kMlaGroup; group < count; group += kMlaGroup) {
    unsigned near = 0;  // a bit for each end of the group
#pragma unroll
    for (int i = 0; i < kMlaGroup; ++i) {
      const std::uint32_t rest = chunk.rests[group + i] - own_rest;  // or, if that is negative, share more
      near |= min(rest, rest + static_cast<std::uint32_t>(share)) <= kMlaOverhead ? 1u << i : 0;
    }
    if (group < end) near &= ~0u << (end - group);
    for (; near != 0; near &= near - 1) {
      const int next = group + __popc((near & (0u - near)) - 1u) + 1;
      if (next > count) return 0;
      const std::uint64_t distance = chunk.ends[next] - chunk.ends[end];
      // The first part that the end isn't too far from.
      const std::uint64_t parts = (distance - kMlaOverhead - 1) / share + 1;
      if (parts * share > distance) continue;  // near modulo 2^32 only
      return next * kMlaHop + static_cast<std::uint32_t>(parts);
    }
  }
  return 0;
}

// The hop from an end over twice as many ends as on this level.
__device__ __forceinline__ std::uint32_t double_hop(const Chunk& chunk, int count, int level, int end) {
  const std::uint32_t hop = chunk.hops[level][end];
  if (hop == 0 || hop / kMlaHop == static_cast<std::uint32_t>(count)) return 0;
  const std::uint32_t next = chunk.hops[level][hop / kMlaHop];
  return next > 0 ? next + hop % kMlaHop : 0;
}

// Fills `parts` and returns the share; ends with a barrier.
__device__ __forceinline__ std::uint64_t find_parts(const Params& p, int b, Parts& parts) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int stop = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  __shared__ Chunk chunk;
  LastPart last{0, 0, 0};
  if (slot == 0) chunk.last = last;
  for (int i = slot; i < stop; i += kThreads) {
    // Overwritten for the parts that have blocks.
    parts.request[i] = i == 0 ? 0 : batch_size;
    parts.block[i] = 0;
    parts.cuts[i] = 0;
  }
  // A warp has lanes for so few requests: it alone finds their hops, and the block waits for these once.
  const bool few = batch_size > 0 && batch_size <= kWarpSize;
  const auto sync = [few] { few ? __syncwarp() : __syncthreads(); };
  std::uint64_t cost_end, total;  // up to and including this thread's request, if it has one at most
  if (few) {
    const int lane = slot % kWarpSize;
    cost_end = warp_running_sum(lane < batch_size ? mla_cost(p, lane, b) : 0);
    total = __shfl_sync(kFullMask, cost_end, kWarpSize - 1);
  } else {
    std::uint64_t cost = 0;
    for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request, b);
    cost_end = block_running_sum(cost, total);
  }
  const std::uint64_t share = (total + static_cast<std::uint64_t>(stop) - 1) / static_cast<std::uint64_t>(stop);
  RunningSum<std::uint64_t> cost_sum;
  for (int first = 0; first < batch_size; first += kMlaChunk) {
    const int count = batch_size - first < kMlaChunk ? batch_size - first : kMlaChunk;
    const bool present = slot < count;
    const std::uint64_t before = cost_sum.carry;
    std::uint64_t end = cost_end;
    // Its barriers also tell that the last chunk isn't read any more.
    if (batch_size > kMlaChunk) end = cost_sum.add(present ? mla_cost(p, first + slot, b) : 0);
    if (present) {
      chunk.ends[slot + 1] = end;
      chunk.rests[slot] = static_cast<std::uint32_t>((end - last.begin) % share);
    }
    if (slot == 0) chunk.ends[0] = last.begin;
    sync();
    if (present) chunk.hops[0][slot] = first_hop(chunk, count, slot, share);
    int levels = 1;
    for (; (1 << levels) <= count; ++levels) {
      sync();
      if (present) chunk.hops[levels][slot] = double_hop(chunk, count, levels - 1, slot);
    }
    __syncthreads();
    for (int i = last.part + 1 + slot; i < stop; i += kThreads) {
      int hopped = 0;  // the end that the hops lead to
      int part = last.part;  // which begins there
      int at_ends = 0;  // parts after the last one, up to that one, that begin at an end
      for (int level = levels - 1; level >= 0; --level) {
        const std::uint32_t hop = hopped < count ? chunk.hops[level][hopped] : 0;
        const int there = part + static_cast<int>(hop % kMlaHop);
        if (hop == 0 || there > i) continue;
        hopped = static_cast<int>(hop / kMlaHop);
        part = there;
        at_ends += 1 << level;
      }
      const std::uint64_t begin = chunk.ends[hopped] + static_cast<std::uint64_t>(i - part) * share;
      if (begin > chunk.ends[count]) break;
      const int found = last_at_most(chunk.ends, count, 1 << (levels - 1), begin);
      parts.request[i] = first + found;
      parts.block[i] = static_cast<std::int32_t>(begin - (found > 0 ? chunk.ends[found] : before));
      parts.cuts[i] = last.cuts + i - last.part - at_ends;
      if (begin + share > chunk.ends[count]) chunk.last = {begin, i, parts.cuts[i]};
    }
    __syncthreads();
    last = chunk.last;
  }
  return share;
}

// A request has one split, and one more for each part that begins within it. A template, because Params has num_splits
// only if it is a field.
template <typename P>
__device__ __forceinline__ void write_num_splits(const P& p, int b, const Parts& begin) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int last = static_cast<int>(p.num_sm_parts) - 1;
  // The last threads first: the first ones write parts.
  for (int request = kThreads - 2 - static_cast<int>(threadIdx.x); request < batch_size; request += kThreads) {
    // The last part that begins in this request or before it.
    const int part = request >= 0 ? last_at_most(begin.request, last, kMaxSmParts / 2, request) : 0;
    store(p.num_splits, b, request + 1, request + 1 + begin.cuts[part]);
  }
}

__device__ void schedule_flashmla(const Params& p, int b) {
  __shared__ Parts begin;
  // Blocks are counted in 31 bits: a larger share is as good as this one.
  const auto share = static_cast<std::uint32_t>(min(find_parts(p, b, begin), std::uint64_t{1} << 31));
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin.block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin.request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    // A request of length 0 is paid for as one block, but ends before it.
    const std::int32_t length_of_last = last >= 0 ? mla_length(p, last, b) : 0;
    const std::int32_t stop = ends_within ? begin.block[i + 1] : length_of_last == 0 ? 0 : mla_blocks(length_of_last);
    const std::int32_t request = begin.request[i];
    std::int32_t block = begin.block[i];
    // The parts that begin in a request before this one, and the one that it begins in: a share apart.
    const std::int32_t split =
        block > 0 ? static_cast<std::int32_t>((static_cast<std::uint32_t>(block) - 1) / share + 1) : 0;
    const bool first_is_split = block > 0;
    // Of a part without work FlashMLA reads this beyond an array, where the first request's last block is.
    if (request == batch_size && batch_size > 0) block = mla_blocks(mla_length(p, 0, b)) - 1;
    if constexpr (kFlashMlaOrder == 2026) {
      const std::int32_t begins_split = first_is_split || (request == last && ends_within);
      const std::int32_t ends_split = ends_within || (request == last && first_is_split);
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
