// Emitted by onelaunch from templates/metadata.cu.j2. Do not edit: change the template, then regenerate with
//   onelaunch show nsa-copy-3-rows
//
// configuration
//   operation               copy
//   mode                    target_verify
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, page_indices, nsa_cache_seqlens, nsa_cu_seqlens_k,
//                           real_page_table, seqlens_expanded
//   distinct                all
//   target                  cuda
//   checked                 False
// key 4dad4ae9e1faa29e38b2c716fa99cd7097613ff0161e07d3f47d108616c33357

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// ---- what this kernel is specialized to --------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kThreads = 256;  // a block
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 4;
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // one warp's share of a row

// ---- arguments ---------------------------------------------------------------------------------------------------
struct Table {
  std::int32_t* data;
  std::int64_t row_stride;  // elements
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It travels by value: no
// pointer table in device memory, nothing to copy before a launch.
struct Params {
  // set at each call
  std::int64_t batch_size;  // requests
  std::int64_t rows;  // rows of all requests
  std::int64_t page_indices_columns;  // no column from here on is written
  std::int64_t real_page_table_columns;  // no column from here on is written
  // set when a plan is bound
  Table from_page_indices;  // precomputed
  Table page_indices[kBackends];  // [R, W]
  Table from_real_page_table;  // precomputed
  Table real_page_table[kBackends];  // [R, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // multiprocessors of the device
  std::int32_t* from_cache_seqlens;  // precomputed
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* from_cu_seqlens_k;  // precomputed
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* from_nsa_cache_seqlens;  // precomputed
  std::int32_t* nsa_cache_seqlens[kBackends];  // [R]
  std::int32_t* from_nsa_cu_seqlens_k;  // precomputed
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [R + 1]
  std::int32_t* from_seqlens_expanded;  // precomputed
  std::int32_t* seqlens_expanded[kBackends];  // [R]
};
constexpr int kParamWords = 42;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// ---- copying fields that were computed before --------------------------------------------------------------------
__device__ void copy_lengths(const Params& p) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i <= p.batch_size; i += threads) {
    const std::int32_t cu_seqlens_k = p.from_cu_seqlens_k[i];
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.cu_seqlens_k[b][i] = cu_seqlens_k;
    if (i == p.batch_size) break;  // only running sums have one element more
    const std::int32_t cache_seqlens = p.from_cache_seqlens[i];
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.cache_seqlens[b][i] = cache_seqlens;
  }
}

__device__ void copy_row_lengths(const Params& p) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i <= p.rows; i += threads) {
    const std::int32_t nsa_cu_seqlens_k = p.from_nsa_cu_seqlens_k[i];
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.nsa_cu_seqlens_k[b][i] = nsa_cu_seqlens_k;
    if (i == p.rows) break;  // only running sums have one element more
    const std::int32_t nsa_cache_seqlens = p.from_nsa_cache_seqlens[i];
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.nsa_cache_seqlens[b][i] = nsa_cache_seqlens;
    const std::int32_t seqlens_expanded = p.from_seqlens_expanded[i];
#pragma unroll
    for (int b = 0; b < kBackends; ++b) p.seqlens_expanded[b][i] = seqlens_expanded;
  }
}

// The four words that begin `shift` words into low and high, for shift from 0 to 3. Selects instead of an indexed
// array, which would live in local memory.
__device__ __forceinline__ int4 realign(int4 low, int4 high, int shift) {
  if (shift & 2) {
    low.x = low.z;
    low.y = low.w;
    low.z = high.x;
    low.w = high.y;
    high.x = high.z;
  }
  if (shift & 1) {
    low.x = low.y;
    low.y = low.z;
    low.z = low.w;
    low.w = high.x;
  }
  return low;
}

// An address that words are read from by their distance. Left to itself the compiler works out one for each word.
__device__ __forceinline__ const std::int32_t* kept(const std::int32_t* address) {
  asm("" : "+l"(address));
  return address;
}

// The 16-byte boundary at or before an address.
__device__ __forceinline__ const int4* boundary_before(const std::int32_t* address) {
  return reinterpret_cast<const int4*>(reinterpret_cast<std::uintptr_t>(address) / sizeof(int4) * sizeof(int4));
}

// How many words an address lies past it, 0 to 3.
__device__ __forceinline__ int words_past_boundary(const std::int32_t* address) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) / sizeof(std::int32_t) % kVectorWords);
}

// One warp reads the columns [first, first + kTileColumns) of a row once, as far as they lie in [0, end), and writes
// them to every backend. `first` counts from a 16-byte boundary of the destination row, so it can be negative.
// `width` is how far the source row may be read.
__device__ __forceinline__ void copy_page_indices_columns(
    const Params& p, std::int64_t row, const std::int32_t* source, int first, int end, int width) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int column = first + lane * kVectorWords;
  const int shift = words_past_boundary(source + column);  // the same in all lanes
  // Inside the row, with room for the words that realigning reads on either side, if it has to: 16-byte accesses
  // throughout.
  const int behind = shift > 0 ? kVectorWords - shift : 0;
  if (first >= shift && first + kTileColumns <= end && first + kTileColumns + behind <= width) {
    const int next = shift > 0 ? 1 : 0;
    const int4* aligned = boundary_before(source + column);
    int4 words[kUnroll];
    int4 high[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + next);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) words[u] = realign(words[u], high[u], shift);
#pragma unroll
    for (int b = 0; b < kBackends; ++b) {
      int4* to = reinterpret_cast<int4*>(p.page_indices[b].data + row * p.page_indices[b].row_stride + column);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) to[u * kWarpSize] = words[u];
    }
    return;
  }
  // An edge of the row: single words, still one coalesced access a warp.
  constexpr int kWords = kTileColumns / kWarpSize;
  std::int32_t words[kWords];
  // Compared without a sign, what lies before the row lies behind it too.
  const unsigned edge = static_cast<unsigned>(first + lane);
  const std::int32_t* from = kept(source + (first + lane));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = edge + i * kWarpSize < static_cast<unsigned>(end);
    words[i] = inside ? static_cast<std::int32_t>(__ldg(from + i * kWarpSize)) : 0;
  }
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    std::int32_t* to = p.page_indices[b].data + row * p.page_indices[b].row_stride + (first + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (edge + i * kWarpSize < static_cast<unsigned>(end)) to[i * kWarpSize] = words[i];
    }
  }
}

// Rows of equal length: the warps take their tiles in turn.
__device__ void copy_page_indices(const Params& p) {
  const int columns = static_cast<int>(p.page_indices_columns);
  const std::uint32_t tiles_per_row = static_cast<std::uint32_t>((columns + kVectorWords - 2) / kTileColumns + 1);
  const std::uint32_t tiles = columns > 0 ? tiles_per_row * static_cast<std::uint32_t>(p.rows) : 0;
  for (std::uint32_t tile = blockIdx.x * kWarps + threadIdx.x / kWarpSize; tile < tiles; tile += gridDim.x * kWarps) {
    const std::int64_t row = tile / tiles_per_row;
    const std::int32_t* source = p.from_page_indices.data + row * p.from_page_indices.row_stride;
    const int lead = words_past_boundary(p.page_indices[0].data + row * p.page_indices[0].row_stride);
    const int column = static_cast<int>(tile % tiles_per_row) * kTileColumns - lead;
    if (column < columns) copy_page_indices_columns(p, row, source, column, columns, columns);
  }
}

// One warp reads the columns [first, first + kTileColumns) of a row once, as far as they lie in [0, end), and writes
// them to every backend. `first` counts from a 16-byte boundary of the destination row, so it can be negative.
// `width` is how far the source row may be read.
__device__ __forceinline__ void copy_real_page_table_columns(
    const Params& p, std::int64_t row, const std::int32_t* source, int first, int end, int width) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int column = first + lane * kVectorWords;
  const int shift = words_past_boundary(source + column);  // the same in all lanes
  // Inside the row, with room for the words that realigning reads on either side, if it has to: 16-byte accesses
  // throughout.
  const int behind = shift > 0 ? kVectorWords - shift : 0;
  if (first >= shift && first + kTileColumns <= end && first + kTileColumns + behind <= width) {
    const int next = shift > 0 ? 1 : 0;
    const int4* aligned = boundary_before(source + column);
    int4 words[kUnroll];
    int4 high[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + next);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) words[u] = realign(words[u], high[u], shift);
#pragma unroll
    for (int b = 0; b < kBackends; ++b) {
      int4* to = reinterpret_cast<int4*>(p.real_page_table[b].data + row * p.real_page_table[b].row_stride + column);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) to[u * kWarpSize] = words[u];
    }
    return;
  }
  // An edge of the row: single words, still one coalesced access a warp.
  constexpr int kWords = kTileColumns / kWarpSize;
  std::int32_t words[kWords];
  // Compared without a sign, what lies before the row lies behind it too.
  const unsigned edge = static_cast<unsigned>(first + lane);
  const std::int32_t* from = kept(source + (first + lane));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = edge + i * kWarpSize < static_cast<unsigned>(end);
    words[i] = inside ? static_cast<std::int32_t>(__ldg(from + i * kWarpSize)) : 0;
  }
#pragma unroll
  for (int b = 0; b < kBackends; ++b) {
    std::int32_t* to = p.real_page_table[b].data + row * p.real_page_table[b].row_stride + (first + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (edge + i * kWarpSize < static_cast<unsigned>(end)) to[i * kWarpSize] = words[i];
    }
  }
}

// Rows of equal length: the warps take their tiles in turn.
__device__ void copy_real_page_table(const Params& p) {
  const int columns = static_cast<int>(p.real_page_table_columns);
  const std::uint32_t tiles_per_row = static_cast<std::uint32_t>((columns + kVectorWords - 2) / kTileColumns + 1);
  const std::uint32_t tiles = columns > 0 ? tiles_per_row * static_cast<std::uint32_t>(p.rows) : 0;
  for (std::uint32_t tile = blockIdx.x * kWarps + threadIdx.x / kWarpSize; tile < tiles; tile += gridDim.x * kWarps) {
    const std::int64_t row = tile / tiles_per_row;
    const std::int32_t* source = p.from_real_page_table.data + row * p.from_real_page_table.row_stride;
    const int lead = words_past_boundary(p.real_page_table[0].data + row * p.real_page_table[0].row_stride);
    const int column = static_cast<int>(tile % tiles_per_row) * kTileColumns - lead;
    if (column < columns) copy_real_page_table_columns(p, row, source, column, columns, columns);
  }
}

// ---- the one launch ----------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_copy_target_verify_n3_4dad4ae9e1faa29e(const __grid_constant__ Params p) {
  copy_lengths(p);
  copy_row_lengths(p);
  copy_page_indices(p);
  copy_real_page_table(p);
}

}  // namespace

// ---- host side ---------------------------------------------------------------------------------------------------
// As many blocks as the tables could need, up to a number that suits the device.
static unsigned grid_blocks(const Params& p) {
  std::int64_t tiles = 0;
  tiles += p.rows * ((p.page_indices_columns + kVectorWords - 2) / kTileColumns + 1);
  tiles += p.rows * ((p.real_page_table_columns + kVectorWords - 2) / kTileColumns + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const std::int64_t most = p.sm_count * kBlocksPerSm * 2;  // where no block adds lengths up, more of them cost nothing
  const std::int64_t blocks = wanted < most ? wanted : most;
  return static_cast<unsigned>((blocks > 1 ? blocks : 1));
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
int onelaunch_copy_target_verify_n3_4dad4ae9e1faa29e_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid_blocks(params), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_copy_target_verify_n3_4dad4ae9e1faa29e, params);
  });
}

// Loads the kernel on a device, so that no later launch has to, and reads what it needs there:
// registers a thread, bytes of shared memory a block, bytes of local memory a thread. Returns a cudaError_t.
int onelaunch_copy_target_verify_n3_4dad4ae9e1faa29e_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_copy_target_verify_n3_4dad4ae9e1faa29e);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_copy_target_verify_n3_4dad4ae9e1faa29e_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
