// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show flashmla-dense-decode-3
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, real_page_table, flashmla_metadata, num_splits
//   distinct                all
//   target                  cuda
//   checked                 False
//   page_fill               -1
// key d7c39656c367a96ba4fc885d91ad7dec16260be2786f7b0977db88ecf62b195d

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kPageSize = 64;  // tokens
constexpr std::int32_t kPageFill = -1;  // in columns that aren't live
constexpr int kMlaBlock = 64;    // tokens
constexpr int kMlaOverhead = 5;  // blocks
constexpr int kMaxSmParts = 512;
using SeqLen = std::int64_t;
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr int kThreads = 256;  // a block
constexpr int kResidentBlocks = 4;  // of a multiprocessor at least: 64 registers a thread
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // groups of four words that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // one warp's share of a row
constexpr int kSpreadTiles = 16;  // a multiprocessor: with fewer half of each block's warps take them
constexpr int kScheduleBlocks = 1;  // the first ones, a schedule each
constexpr int kLengthBlocks = kScheduleBlocks + 1;  // and those that write lengths; the others write tables

// ---- arguments ---------------------------------------------------------------------------------------------------
struct Table {
  std::int32_t* data;
  std::int64_t row_stride;  // elements
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It travels by value: no
// pointer table in device memory, nothing to copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  const PoolIndex* req_pool_indices;  // [batch_size], rows of req_to_token
  std::int64_t req_pool_indices_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t columns;  // no column from here on is written
  // set when a plan is bound
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  Table real_page_table[kBackends];  // [bs, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // multiprocessors of the device
  std::int64_t real_page_table_width;  // columns
  std::int64_t num_sm_parts;  // parts of FlashMLA's schedule
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* flashmla_metadata[kBackends];  // [num_sm_parts, 8]
  std::int32_t* num_splits[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 27;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// ---- running sums ------------------------------------------------------------------------------------------------
// Unsigned, because sums wrap at 2^32 as they do in PyTorch's int32, and signed overflow isn't defined.

// The inclusive running sum of `value` over the lanes of a warp, doubling the distance.
__device__ __forceinline__ std::uint64_t warp_running_sum(std::uint64_t value) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::uint64_t other = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  return value;
}

// The same over the threads of the block; `total` gets the block's sum. The warps' totals meet in shared memory: right
// for any block of whole warps, whatever part of it holds requests.
__device__ __forceinline__ std::uint64_t block_running_sum(std::uint64_t value, std::uint64_t& total) {
  __shared__ std::uint64_t warp_totals[kWarps];
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const std::uint64_t in_warp = warp_running_sum(value);
  if (static_cast<int>(threadIdx.x % kWarpSize) == kWarpSize - 1) warp_totals[warp] = in_warp;
  __syncthreads();
  std::uint64_t sum = 0;
  std::uint64_t before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = sum;
    sum += warp_totals[w];
  }
  __syncthreads();  // the next sum writes warp_totals again
  total = sum;
  return before + in_warp;
}

// ---- lengths -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk: no limit on the batch.
__device__ void refresh_lengths(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    // Lengths are int32 in every consumer; a wider input is truncated as tensor.to(torch.int32) does it.
    const std::int32_t length = present ? static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]) : 0;
    if (present) {
#pragma unroll
      for (int b = 0; b < kBackends; ++b) p.cache_seqlens[b][request] = length;
    }
  }
}

// ---- schedules ---------------------------------------------------------------------------------------------------
// Blocks of their own compute them from seq_lens, however many requests there are: in chunks of kThreads.
// What the consumer takes for a request's length.
__device__ __forceinline__ std::int32_t scheduled_length(const Params& p, int request) {
  return static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]);
}

__device__ __forceinline__ std::int32_t mla_blocks(const Params& p, int request) {
  const std::int32_t length = scheduled_length(p, request);
  return length > 0 ? (length - 1) / kMlaBlock + 1 : 1;
}

// What a request costs in blocks, as long as no part begins within it.
__device__ __forceinline__ std::uint64_t mla_cost(const Params& p, int request) {
  return static_cast<std::uint64_t>(mla_blocks(p, request) + kMlaOverhead);
}

// FlashMLA's schedule. The parts take blocks of the requests one after the other, so one thread walks them: past all
// requests of a chunk at once, or in steps that double while whole requests fit into a part: as many turns as there are
// parts and chunks. It notes where each part begins; from that all threads derive the rest.
__device__ void schedule_flashmla(const Params& p) {
  const int batch_size = static_cast<int>(p.batch_size);
  const int parts = static_cast<int>(p.num_sm_parts);
  const int slot = static_cast<int>(threadIdx.x);
  std::uint64_t cost = 0;
  for (int request = slot; request < batch_size; request += kThreads) cost += mla_cost(p, request);
  std::uint64_t total;
  block_running_sum(cost, total);
  const std::uint64_t share = (total + static_cast<std::uint64_t>(parts) - 1) / static_cast<std::uint64_t>(parts);
  const std::int64_t payload = static_cast<std::int64_t>(share) + kMlaOverhead;

  __shared__ std::int64_t ends[kThreads];  // the cost of the requests up to and with one of the chunk
  __shared__ std::int32_t begin_request[kMaxSmParts], begin_block[kMaxSmParts];
  __shared__ std::int32_t begin_split[kMaxSmParts];  // splits of that request in the parts before
  __shared__ std::int32_t cuts[kMaxSmParts];  // parts up to this one that begin within a request, -1 behind the walk
  // The walk's place, in the thread that walks.
  std::int64_t place = 0;  // the cost of what was taken, without that of splitting
  std::int64_t remain = payload;
  int part = 0;
  std::int32_t block = 0, split = 0, cut = 0;
  for (int i = slot; i < parts; i += kThreads) {
    // As the parts behind the walk's end are; the walk overwrites the others.
    begin_request[i] = i == 0 ? 0 : batch_size;
    begin_block[i] = begin_split[i] = 0;
    cuts[i] = i == 0 ? 0 : -1;
  }
  std::uint64_t carry = 0;
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + slot;
    std::uint64_t chunk;
    const std::uint64_t own = request < batch_size ? mla_cost(p, request) : 0;
    ends[slot] = static_cast<std::int64_t>(carry + block_running_sum(own, chunk));
    carry += chunk;
    __syncthreads();
    const int count = batch_size - first < kThreads ? batch_size - first : kThreads;
    int at = 0;  // in the chunk: the first request that isn't done
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
      // The part ends here, with as many blocks of this request as it still can take.
      if (remain > kMlaOverhead) {
        place += remain - kMlaOverhead;
        block += static_cast<std::int32_t>(remain - kMlaOverhead);
        ++split;
        ++cut;
      }
      remain = payload;
      ++part;
      begin_request[part] = first + at;
      begin_block[part] = block;
      begin_split[part] = split;
      cuts[part] = cut;
    }  // and nobody is at ends any more when the next chunk's sum is done
  }
  __syncthreads();

  for (int i = slot; i < parts; i += kThreads) {
    const bool ends_within = i + 1 < parts && begin_block[i + 1] > 0;
    const std::int32_t last = (i + 1 < parts ? begin_request[i + 1] : batch_size) - (ends_within ? 0 : 1);
    const std::int32_t of_last = last >= 0 ? mla_blocks(p, last) : 0;
    const std::int32_t stop = ends_within ? begin_block[i + 1] : of_last;
    const bool first_is_split = begin_block[i] != 0;
    const bool last_is_split = stop != of_last;
    const bool one = begin_request[i] == last;
    const std::int32_t begins_split = first_is_split || (one && last_is_split);
    const std::int32_t ends_split = last_is_split || (one && first_is_split);
    const std::int32_t begin[3] = {begin_request[i], begin_block[i], begin_split[i]};
    const std::int32_t row[8] = {begin[0], last, begin[1], stop, begin[2], begins_split, ends_split, 0};
#pragma unroll
    for (int b = 0; b < kBackends; ++b) {
#pragma unroll
      for (int w = 0; w < 8; ++w) p.flashmla_metadata[b][8 * i + w] = row[w];
    }
  }

  // A request has one split, and one more for each part that begins within it.
  for (int request = slot - 1; request < batch_size; request += kThreads) {
    int found = 0;  // the last part that begins in this request or before it
    if (request >= 0) {
      for (int step = kMaxSmParts / 2; step > 0; step /= 2) {
        if (found + step < parts && cuts[found + step] >= 0 && begin_request[found + step] <= request) found += step;
      }
    }
    const std::int32_t splits = request + 1 + (request >= 0 ? cuts[found] : 0);
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.num_splits[b][request + 1] = splits;
  }
}

// ---- one tile of a table row -------------------------------------------------------------------------------------
// The page of a token, rounded down for padding tokens below zero too.
__device__ __forceinline__ std::int32_t page_of(Token token) {
  return static_cast<std::int32_t>(token >> 6);
}

// One warp writes the pages [first, first + kTileColumns), as far as they lie in [0, end): the token that begins each
// page is read once, and its page written to every backend.
__device__ __forceinline__ void write_pages(
    const Params& p, std::int64_t row, const Token* source, int first, int end) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  constexpr int kWords = kTileColumns / kWarpSize;
  std::int32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int page = first + lane + i * kWarpSize;
    words[i] = page < end ? page_of(__ldg(source + static_cast<std::int64_t>(page) * kPageSize)) : kPageFill;
  }
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    std::int32_t* to = p.real_page_table[b].data + row * p.real_page_table[b].row_stride;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int page = first + lane + i * kWarpSize;
      if (page < p.real_page_table_width) to[page] = words[i];
    }
  }
}

// Everything that one tile of a request's row needs: `end` is the first column that isn't live.
__device__ __forceinline__ void copy_tile(
    const Params& p, std::int64_t row, std::int64_t pool_row, int first, int end) {
  const Token* source = p.req_to_token + pool_row * p.req_to_token_stride;
  write_pages(p, row, source, first, end);
}

// ---- which warp takes which tile ---------------------------------------------------------------------------------
// What the host works out for a launch: dividing by a number that isn't a constant takes a thread dozens of
// instructions, one after the other.
struct Split {
  std::uint32_t tiles;  // of a row
  std::uint32_t warps;  // of a block that take tiles
  std::uint64_t reciprocal;  // (2^64 - 1) / tiles
};

// The columns of a request that its length makes live, in pages.
__device__ __forceinline__ int live_columns(const Params& p, std::uint32_t request) {
  const std::int32_t length = static_cast<std::int32_t>(p.seq_lens[request * p.seq_lens_stride]);
  const int most = static_cast<int>(p.columns);
  const int columns = length < 0 ? 0 : length < most ? length : most;
  return columns / kPageSize + (columns % kPageSize != 0);
}

// Every row is written to its end: each warp takes one tile of equal rows. A loop would have the compiler
// fetch the constants of all destinations before the first read.
__device__ void gather_tables(const Params& p, const Split& split) {
  const int columns = static_cast<int>(p.real_page_table_width);
  const std::uint32_t warp = threadIdx.x / kWarpSize;
  if (warp >= split.warps) return;
  // 32 bits hold the count of tiles of any table that fits a device.
  const std::uint32_t tile = (blockIdx.x - kLengthBlocks) * split.warps + warp;
  const std::int64_t row = __umul64hi(std::uint64_t{tile} + 1, split.reciprocal);  // tile / tiles of a row
  const std::uint32_t in_row = tile - static_cast<std::uint32_t>(row) * split.tiles;
  const int column = static_cast<int>(in_row) * kTileColumns;
  if (row >= p.batch_size || column >= columns) return;
  const std::int64_t pool_row = p.req_pool_indices[row * p.req_pool_indices_stride];
  const int end = live_columns(p, static_cast<int>(row));
  copy_tile(p, row, pool_row, column, end);
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads, kResidentBlocks) onelaunch_broadcast_decode_n3_d7c39656c367a96b(
    const __grid_constant__ Split split, const __grid_constant__ Params p) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < 1) {
    schedule_flashmla(p);
  } else if (block < kLengthBlocks) {
    refresh_lengths(p);
  } else {
    gather_tables(p, split);
  }
}

}  // namespace

// ---- host side ---------------------------------------------------------------------------------------------------
static Split split_of(const Params& p) {
  const std::int64_t columns = p.real_page_table_width;
  const std::int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  // Where there are few tiles half of a block's warps take them, so that twice as many blocks take part.
  const bool few = p.batch_size * tiles < p.sm_count * kSpreadTiles;
  return {
      static_cast<std::uint32_t>(tiles),
      static_cast<std::uint32_t>(few ? (kWarps + 1) / 2 : kWarps),
      ~std::uint64_t{0} / static_cast<std::uint64_t>(tiles > 0 ? tiles : 1),
  };
}

// As many blocks as the tables need.
static unsigned grid_blocks(const Params& p, const Split& split) {
  const std::int64_t tiles = p.batch_size * std::int64_t{split.tiles};
  const std::int64_t blocks = (tiles + split.warps - 1) / split.warps;
  return static_cast<unsigned>(kLengthBlocks + (blocks > 1 ? blocks : 1));
}

// Runs `call` with the plan's device as the current one.
template <typename Call>
static cudaError_t on_device(std::int64_t device, const Call& call) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess || current == device) return error != cudaSuccess ? error : call();
  error = cudaSetDevice(static_cast<int>(device));
  if (error != cudaSuccess) return error;
  error = call();
  const cudaError_t restored = cudaSetDevice(current);
  return error != cudaSuccess ? error : restored;
}

extern "C" {

// Launches the kernel once on `stream` with the parameter block in `words`; returns a cudaError_t.
int onelaunch_broadcast_decode_n3_d7c39656c367a96b_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    const Split split = split_of(params);
    const unsigned blocks = grid_blocks(params, split);
    config.gridDim = dim3(blocks, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n3_d7c39656c367a96b, split, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n3_d7c39656c367a96b_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n3_d7c39656c367a96b);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n3_d7c39656c367a96b_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
