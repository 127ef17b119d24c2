// ---- declared tables and packed fields ---------------------------------------------------------------------------
// An item is a row of a table, or a request of a packed field. Its elements are cut into parts of kComputedColumns, and
// parts into pieces. The warps of the grid's last blocks take the pieces of all items in turn, then those of the next
// field. Dead columns cost nothing. What all backends have alike is computed once, for the one with the most elements.
//
// A Field, emitted from its declaration, has
//   kPacked, kFilled       whether it is packed; whether dead columns of a table get kFill
//   kRowsEach              items of a request
//   kDestinations, kSets   destinations; 1 if all backends have equally many elements, otherwise kLengthSets
//   kApart                 whether an element's value, too, depends on the backend
//   element_count()        how many elements an item has in backend b, a Count
//   element_value()        one of them
//   destinations()         where they go
//   capacity()             columns of a row, or elements of a packed field, that there is room for
constexpr int kComputedEach = kComputedColumns / kWarpSize;  // elements of a lane
constexpr int kLog2Pieces = 3;  // most pieces that a part is cut into, where there are few

// Columns of an item, without a sign.
struct Columns {
  std::uint32_t first, stop;
};

// Columns are int32. A count of 32 bits needs no arithmetic of 64.
template <typename Count>
__device__ __forceinline__ std::uint32_t column_of(Count column) {
  constexpr Count kLast = 0x7fffffff;
  return static_cast<std::uint32_t>(column < 0 ? 0 : column < kLast ? column : kLast);
}

// Where an element of an item goes in destination d, and how far from one column to the next.
template <typename T, int N>
__device__ __forceinline__ T* address(T* const (&to)[N], int d, int, std::int64_t at) {
  return to[d] + at;
}

template <typename T, int N>
__device__ __forceinline__ T* address(const Strided<T> (&to)[N], int d, int item, std::int64_t at) {
  return to[d].data + item * to[d].request_stride + at * to[d].row_stride;
}

template <typename T, int N>
__device__ __forceinline__ std::int64_t column_stride(T* const (&)[N], int) {
  return 1;
}

template <typename T, int N>
__device__ __forceinline__ std::int64_t column_stride(const Strided<T> (&to)[N], int d) {
  return to[d].row_stride;
}

// How many backends are computed together: all, if only the numbers of elements differ.
template <typename Field>
constexpr int kTogether = Field::kApart ? 1 : Field::kSets;

// The most elements that an item has in a backend from b on.
template <typename Field>
__device__ __forceinline__ std::uint32_t most_elements(const Params& p, const Request& of, int item, int b) {
  std::uint32_t most = 0;
#pragma unroll(unrolled(kTogether<Field>))
  for (int i = 0; i < kTogether<Field>; ++i) {
    most = max(most, column_of(Field::element_count(p, of, item, b + i)));
  }
  return most;
}

// A table's parts begin at boundaries of kWarpSize elements in the memory of its first destination, so that a warp's
// stores share few lines: this many columns before the row.
template <typename Field>
__device__ __forceinline__ std::uint32_t columns_before(const Params& p, int item, int b) {
  const auto* row = address(Field::destinations(p), b, item, 0);
  return Field::kPacked ? 0 : reinterpret_cast<std::uintptr_t>(row) / sizeof(*row) % kWarpSize;
}

// How many columns an item's warps go through, up to a limit, those before its row included.
template <typename Field>
__device__ __forceinline__ std::uint32_t item_reach(
    const Params& p, const Request& of, int item, int b, std::uint32_t limit) {
  const std::uint32_t columns = Field::kFilled ? limit : min(limit, most_elements<Field>(p, of, item, b));
  return columns > 0 ? columns + columns_before<Field>(p, item, b) : 0;
}

// The number of parts of so many columns, without those that an item's own warps compute.
__device__ __forceinline__ std::uint32_t parts_of(std::uint32_t reach, std::uint32_t own_columns) {
  return reach > own_columns ? (reach - own_columns - 1) / kComputedColumns + 1 : 0;
}

// If each element is stored to several destinations, half a part keeps enough memory accesses in flight.
template <typename Field>
constexpr bool kHalves = Field::kDestinations > 1 && !Field::kApart;

// As which a power of two of pieces the warps take each of so many parts: small ones where there are few, so that all
// warps have work; whole ones where each warp has several, so that more look-ups are on their way.
template <typename Field>
__device__ __forceinline__ int log2_pieces(std::uint32_t parts, std::uint32_t warps) {
  return parts <= warps >> kLog2Pieces ? kLog2Pieces : kHalves<Field> || parts <= warps / 2 ? 1 : 0;
}

// Negative counts move the elements of later requests back, and so more columns of these fit: by how much, in all
// backends.
template <typename Field>
__device__ __forceinline__ std::uint64_t moved_back(const Params& p, const Request& of, int item, int b) {
  std::uint64_t back = 0;
#pragma unroll(unrolled(kTogether<Field>))
  for (int i = 0; i < kTogether<Field>; ++i) {
    const std::int64_t count = Field::element_count(p, of, item, b + i);
    if (count < 0) back -= static_cast<std::uint64_t>(count);
  }
  return back;
}

// The sum of counts over the lanes of a warp, modulo 2^64.
template <typename Field>
__device__ __forceinline__ std::int64_t sum_of_counts(std::int64_t count) {
  if constexpr (sizeof(typename Field::Count) == sizeof(std::int32_t)) return warp_sum(count);
  const std::uint64_t sum = warp_running_sum(static_cast<std::uint64_t>(count));
  return static_cast<std::int64_t>(__shfl_sync(kFullMask, sum, kWarpSize - 1));
}

// Computes kMoved elements a lane, a part of an item or a piece of one, and stores them in each backend from b on.
// begin_in(b) is where the item begins in a packed field. It is asked while the look-ups are on their way. All look-ups
// are made before the first store, because the compiler moves none before a store.
template <typename Field, int kMoved, typename Begin>
__device__ __forceinline__ void compute_piece(
    const Params& p, const Request& of, int item, int b, std::uint32_t first, const Begin& begin_in) {
  if constexpr (!Field::kPacked) first -= columns_before<Field>(p, item, b);
  const std::uint32_t column = first + threadIdx.x % kWarpSize;  // one before the row is a large one, too
  // The columns that the item has in a backend, and for which there is room.
  const auto columns_in = [&](int backend, std::int64_t begin) {
    Columns columns{0, column_of(Field::element_count(p, of, item, backend))};
    if (begin < 0) columns.first = column_of(-begin);
    const std::int64_t room = Field::capacity(p) - begin;
    if (room < columns.stop) columns.stop = column_of(room);
    return columns;
  };
  Columns live{0, most_elements<Field>(p, of, item, b)};
  if constexpr (!Field::kPacked) live.stop = min(live.stop, column_of(Field::capacity(p)));
  if constexpr (kChecked && Field::kPacked) {
    // Nothing is looked up for what has no room, because it would be reported.
    live = {~0u, 0};
    for (int i = 0; i < kTogether<Field>; ++i) {
      const Columns own = columns_in(b + i, begin_in(b + i));
      if (own.first < own.stop) live = {min(live.first, own.first), max(live.stop, own.stop)};
    }
    if (first + kMoved * kWarpSize <= live.first) return;
  }
  // A piece may begin before its row.
  const bool behind = static_cast<std::int32_t>(first) >= static_cast<std::int32_t>(live.stop);
  const bool dead = behind || (Field::kFilled && live.stop == 0);
  if (!Field::kFilled && dead) return;
  decltype(Field::element_value(p, of, item, b, 0)) values[kMoved]{};
  if (!Field::kFilled || !dead) {
    // A lane outside of the live columns computes the nearest one, and needs no branch.
#pragma unroll
    for (int i = 0; i < kMoved; ++i) {
      const std::uint32_t at = max(live.first, min(column + i * kWarpSize, live.stop - 1));
      values[i] = Field::element_value(p, of, item, b, static_cast<std::int32_t>(at));
    }
  }
  // Destinations that have the same elements: of all backends, unless their numbers of elements differ.
  constexpr int kAlike = Field::kSets > 1 ? 1 : Field::kDestinations;
#pragma unroll(unrolled(kTogether<Field>))
  for (int i = 0; i < kTogether<Field>; ++i) {
    const std::int64_t begin = Field::kPacked ? begin_in(b + i) : 0;
    const Columns own = columns_in(b + i, begin);
    const std::uint32_t stop = Field::kFilled ? column_of(Field::capacity(p)) : own.stop;
#pragma unroll(unrolled(kAlike))
    for (int d = 0; d < kAlike; ++d) {
      auto* to = address(Field::destinations(p), b + i + d, item, begin + static_cast<std::int32_t>(column));
      const std::int64_t step = kWarpSize * column_stride(Field::destinations(p), b + i + d);
#pragma unroll
      for (int m = 0; m < kMoved; ++m, to += step) {
        const std::uint32_t at = column + m * kWarpSize;
        if (at >= own.first && at < stop) put(to, at < own.stop ? values[m] : Field::kFill);
      }
    }
  }
}

// No more items than a warp has lanes: each warp counts for itself, without shared memory and barriers. `piece` is what
// the warp takes next.
template <typename Field>
__device__ __forceinline__ void compute_few(
    const Params& p, int items, int b, std::uint32_t own_columns, std::uint32_t warps, std::uint32_t& piece) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  Request of{};
  if (lane < items) of = read_request(p, lane / Field::kRowsEach);
  std::uint32_t limit = column_of(Field::capacity(p));
  if constexpr (Field::kPacked) {
    const auto back = static_cast<std::int64_t>(lane < items ? moved_back<Field>(p, of, lane, b) : 0);
    if (__ballot_sync(kFullMask, back != 0) != 0) limit = column_of(Field::capacity(p) + sum_of_counts<Field>(back));
  }
  const std::uint32_t parts = lane < items ? parts_of(item_reach<Field>(p, of, lane, b, limit), own_columns) : 0;
  const std::uint32_t all_parts = __reduce_add_sync(kFullMask, parts);
  const int log2 = log2_pieces<Field>(all_parts, warps);
  const std::uint32_t pieces = all_parts << log2;
  if (piece < pieces) {
    std::uint32_t parts_end = parts;
    for (int distance = 1; distance < items; distance *= 2) {
      const std::uint32_t other = __shfl_up_sync(kFullMask, parts_end, static_cast<unsigned>(distance));
      if (lane >= distance) parts_end += other;
    }
    const std::uint32_t parts_before = parts_end - parts;
    if (lane >= items) parts_end = all_parts;
    for (; piece < pieces; piece += warps) {
      const std::uint32_t part = piece >> log2;
      const int item = __popc(__ballot_sync(kFullMask, parts_end <= part));  // those whose parts end before it
      const Request found = shuffled(of, item);
      const std::uint32_t in_item = part - __shfl_sync(kFullMask, parts_before, item);
      const std::uint32_t first = own_columns + in_item * kComputedColumns;
      const std::uint32_t in_part = (piece & ((1u << log2) - 1)) * (kComputedColumns >> log2);
      const auto begin_in = [&](int backend) {
        return sum_of_counts<Field>(lane < item ? Field::element_count(p, of, lane, backend) : 0);
      };
      // Few pieces come last: short batches fetch the fewest instructions.
      if (log2 == 0) {
        compute_piece<Field, kComputedEach>(p, found, item, b, first, begin_in);
      } else if (log2 == 1) {
        compute_piece<Field, kComputedEach / 2>(p, found, item, b, first + in_part, begin_in);
      } else {
        compute_piece<Field, (kComputedEach >> kLog2Pieces)>(p, found, item, b, first + in_part, begin_in);
      }
    }
  }
  piece -= pieces;
}

// A window of items, in shared memory.
struct ComputedWindow {
  Window parts;
  Request requests[kThreads];
  std::int64_t sums[kLengthSets][kWarps];  // elements of the items of a warp, in a packed field
  std::int64_t before[kLengthSets];  // and of the windows before
};

template <typename Field>
__device__ __forceinline__ void compute_many(
    const Params& p, ComputedWindow& window, int items, int b, std::uint32_t own_columns, std::uint32_t warps,
    std::uint32_t& piece) {
  const int slot = static_cast<int>(threadIdx.x);
  const int lane = slot % kWarpSize;
  std::uint32_t warp_end = 0;
  std::uint32_t limit = column_of(Field::capacity(p));
  std::uint64_t back = 0;  // of the windows so far
  for (int base = 0; base < items; base += kThreads) {
    const int own = base + slot;
    Request of{};
    if (own < items) of = read_request(p, own / Field::kRowsEach);
    // No warp looks anything up in the last window after the first of these barriers.
    if constexpr (Field::kPacked) {
      const std::uint64_t own_back = own < items ? moved_back<Field>(p, of, own, b) : 0;
      if (__syncthreads_or(own_back > 0)) {
        std::uint64_t of_window;
        block_running_sum(own_back, of_window);
        back += of_window;
        limit = column_of(Field::capacity(p) + static_cast<std::int64_t>(back));
      }
      for (int i = slot; i < kTogether<Field>; i += kThreads) {
        std::int64_t before = 0;
        for (int w = 0; w < kWarps && base > 0; ++w) before += window.sums[i][w];
        window.before[i] = base > 0 ? window.before[i] + before : 0;
      }
      if (base > 0) __syncthreads();
#pragma unroll(unrolled(kTogether<Field>))
      for (int i = 0; i < kTogether<Field>; ++i) {
        const std::int64_t sum = sum_of_counts<Field>(own < items ? Field::element_count(p, of, own, b + i) : 0);
        if (lane == 0) window.sums[i][slot / kWarpSize] = sum;
      }
    } else {
      __syncthreads();
    }
    window.requests[slot] = of;
    const std::uint32_t parts = own < items ? parts_of(item_reach<Field>(p, of, own, b, limit), own_columns) : 0;
    const std::uint32_t window_parts = count_tiles(window.parts, parts, warp_end);
    const int log2 = min(log2_pieces<Field>(window_parts, warps), 1);
    for (; piece < window_parts << log2; piece += warps) {
      const Place place = find_tile(window.parts, warp_end, piece >> log2);
      const Request found = window.requests[place.slot];
      const auto begin_in = [&](int backend) {
        const int full = place.slot / kWarpSize;  // warps of items before the item's
        const int other = full * kWarpSize + lane;
        std::int64_t sum = lane < full ? window.sums[backend - b][lane] : 0;
        if (other < place.slot) sum += Field::element_count(p, window.requests[other], base + other, backend);
        return window.before[backend - b] + sum_of_counts<Field>(sum);
      };
      const int item = base + place.slot;
      const std::uint32_t first = own_columns + place.tile * kComputedColumns;
      if (log2 == 1) {
        const std::uint32_t in_part = piece % 2 * (kComputedColumns / 2);
        compute_piece<Field, kComputedEach / 2>(p, found, item, b, first + in_part, begin_in);
      } else {
        compute_piece<Field, kComputedEach>(p, found, item, b, first, begin_in);
      }
    }
    piece -= window_parts << log2;
  }
}

// A row's own warp, number `turn` of `each`, reads no other row's length. It takes one piece, as small as all of them
// together reach the row's end in; otherwise what is left is computed by other blocks.
template <typename Field>
__device__ __forceinline__ void compute_own(const Params& p, int row, int b, std::uint32_t turn, std::uint32_t each) {
  constexpr std::uint32_t kSmall = kComputedColumns >> kLog2Pieces;
  const Request of = read_request(p, row / Field::kRowsEach);
  const std::uint32_t reach = item_reach<Field>(p, of, row, b, column_of(Field::capacity(p)));
  const auto begin_in = [](int) { return std::int64_t{0}; };
  if (!kHalves<Field> && reach > each * (kComputedColumns / 2)) {
    compute_piece<Field, kComputedEach>(p, of, row, b, turn * kComputedColumns, begin_in);
  } else if (reach > each * kSmall) {
    compute_piece<Field, kComputedEach / 2>(p, of, row, b, turn * (kComputedColumns / 2), begin_in);
  } else if (reach > 0) {
    compute_piece<Field, (kComputedEach >> kLog2Pieces)>(p, of, row, b, turn * kSmall, begin_in);
  }
}

// A table needs no sums. As in device/live.cuh, blocks belong to its rows: all of them if they reach the end of the
// widest rows in one piece a warp; half of them, beside others that compute what is left, if they reach a third of it.
// With more or longer rows to share the warps among, all blocks count, as they do for a packed field. `piece` is what
// the warp takes next of packed fields.
template <typename Field>
__device__ __forceinline__ void compute(
    const Params& p, ComputedWindow& window, std::uint32_t block, std::uint32_t& piece) {
  constexpr std::uint32_t kOwnColumns = kHalves<Field> ? kComputedColumns / 2 : kComputedColumns;
  const int items = static_cast<int>(p.batch_size) * Field::kRowsEach;
  const auto blocks = static_cast<std::uint32_t>(p.computed_blocks);
  const std::uint32_t in_block = threadIdx.x / kWarpSize;
  const auto by_items = [&](std::uint32_t number) {
    return __umulhi(number / Field::kRowsEach + 1, static_cast<std::uint32_t>(p.computed_reciprocal));
  };
  std::uint32_t own_blocks = 0;
  std::uint32_t each = 0;  // own warps of a row
  if constexpr (!Field::kPacked) {
    const std::uint32_t widest = column_of(Field::capacity(p)) + kWarpSize;
    own_blocks = blocks;
    each = by_items(blocks * kWarps);
    if (each * kOwnColumns < widest) {
      own_blocks = blocks / 2;
      each = by_items(own_blocks * kWarps);
      if (each * kOwnColumns < widest / 3) own_blocks = each = 0;
    }
  }
  for (int b = 0; b < Field::kSets; b += kTogether<Field>) {
    if (block < own_blocks) {
      // Neighbouring pieces go to different SMs.
      const std::uint32_t warp = in_block * own_blocks + block;
      const std::uint32_t turn = by_items(warp);
      const int row = static_cast<int>(warp - turn * static_cast<std::uint32_t>(items));
      if (turn < each) compute_own<Field>(p, row, b, turn, each);
    } else if (own_blocks < blocks) {
      std::uint32_t left = (block - own_blocks) * kWarps + in_block;
      std::uint32_t& next = Field::kPacked ? piece : left;
      const std::uint32_t warps = (blocks - own_blocks) * kWarps;
      if (items <= kWarpSize) {
        compute_few<Field>(p, items, b, each * kOwnColumns, warps, next);
      } else {
        compute_many<Field>(p, window, items, b, each * kOwnColumns, warps, next);
      }
    }
  }
}
