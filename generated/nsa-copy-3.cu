// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show nsa-copy-3
//
// configuration
//   operation               copy
//   mode                    decode
//   num_backends            3
//   fields                  cache_seqlens, cu_seqlens_k, page_indices, nsa_cache_seqlens, nsa_cu_seqlens_k,
//                           real_page_table
//   distinct                all
//   target                  cuda
//   checked                 False
// key bf9fc60ccd15c052a33145d9e05581859fa250cf07ae43292c5aafdd9bdccf44

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- settings ----------------------------------------------------------------------------------------------------
constexpr int kBackends = 3;
constexpr int kThreads = 256;  // per block
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLengthSets = 1;  // lengths per request: one for all backends, or one per backend
constexpr int kVectorWords = 4;  // a 16-byte access
constexpr int kUnroll = 2;  // 16-byte accesses that a thread has in flight
constexpr int kTileColumns = kWarpSize * kVectorWords * kUnroll;  // a tile: what one warp moves of a row
constexpr int kBlocksPerSm = 4;  // limits the blocks for the tables
constexpr bool kEqualRows = true;  // whether all rows are written up to the same column

// ---- arguments ---------------------------------------------------------------------------------------------------
struct Table {
  std::int32_t* data;
  std::int64_t row_stride;  // elements
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It is passed by value, which
// needs no pointer table in device memory and no copy before a launch.
struct Params {
  // set at each call
  std::int64_t batch_size;  // requests
  std::int64_t page_indices_columns;  // columns from here on are not written
  std::int64_t real_page_table_columns;  // columns from here on are not written
  // set when a plan is bound
  Table from_page_indices;  // precomputed
  Table page_indices[kBackends];  // [bs, W]
  Table from_real_page_table;  // precomputed
  Table real_page_table[kBackends];  // [bs, ceil(W / page_size)]
  std::int64_t device;  // ordinal
  std::int64_t sm_count;  // SMs of the device
  std::int32_t* from_cache_seqlens;  // precomputed
  std::int32_t* cache_seqlens[kBackends];  // [bs]
  std::int32_t* from_cu_seqlens_k;  // precomputed
  std::int32_t* cu_seqlens_k[kBackends];  // [bs + 1]
  std::int32_t* from_nsa_cache_seqlens;  // precomputed
  std::int32_t* nsa_cache_seqlens[kBackends];  // [bs]
  std::int32_t* from_nsa_cu_seqlens_k;  // precomputed
  std::int32_t* nsa_cu_seqlens_k[kBackends];  // [bs + 1]
};
constexpr int kParamWords = 37;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// ---- destinations ------------------------------------------------------------------------------------------------
// The unroll factor of a loop over destinations: a few are unrolled fully, many not at all, to keep the code short.
[[maybe_unused]] __host__ __device__ constexpr int unrolled(int destinations) {
  return destinations <= 8 ? destinations : 1;
}

// ---- writing an element ------------------------------------------------------------------------------------------
// What writes 16 bytes at once stores them itself.
template <typename T>
__device__ __forceinline__ void put(T* address, std::common_type_t<T> value) {
  *address = value;
}

// ---- storing an element ------------------------------------------------------------------------------------------
// Stores one element of a vector or a schedule to every backend; where the backends' lengths differ, to backend b.
// The destinations decide the type: to a bool goes whether the value isn't 0.
template <typename T, int N>
__device__ __forceinline__ void store(T* const (&to)[N], int b, std::int64_t index, std::common_type_t<T> value) {
  if constexpr (kLengthSets > 1) {
    put(to[b] + index, value);
  } else {
#pragma unroll(unrolled(N))
    for (int i = 0; i < N; ++i) put(to[i] + index, value);
  }
}

// ---- where rows end: at the same column in all destinations ------------------------------------------------------
// The end is the first column that is not written.
struct SameEnd {
  int end;
};
__device__ __forceinline__ int longest_end(SameEnd ends) {
  return ends.end;
}

template <int N>
__device__ __forceinline__ bool ends_differ(const Table (&)[N], SameEnd) {
  return false;
}

template <int N>
__device__ __forceinline__ int shortest_end(const Table (&)[N], SameEnd ends) {
  return ends.end;
}

template <int N>
__device__ __forceinline__ int end_of(const Table (&)[N], SameEnd ends, int) {
  return ends.end;
}

// ---- addresses that the compiler keeps as they are ---------------------------------------------------------------
// Keeps one base address in a register. Otherwise the compiler computes an address for each load.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* address) {
  if constexpr (kWarpSize > 1) asm("" : "+l"(address));
  return address;
}

// ---- one tile of a table row -------------------------------------------------------------------------------------
// A tile is kTileColumns columns of a row. One warp reads it once and writes it to every destination.

// Moves kTiles tiles with 4-byte accesses, column by column: any alignment, any end. Columns before 0 (a tile may begin
// at a boundary before the row) and from the row's end on are skipped.
template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_words(
    const Table (&to)[N], std::int64_t row, const T* source, int first, RowEnds ends) {
  constexpr int kWords = kTiles * kTileColumns / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int end = longest_end(ends);
  std::int32_t words[kWords];
  // Unsigned comparison: a negative column fails the bound check too.
  const unsigned column = static_cast<unsigned>(first + lane);
  const T* from = opaque(source + (first + lane));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const bool inside = column + i * kWarpSize < static_cast<unsigned>(end);
    words[i] = inside ? static_cast<std::int32_t>(__ldg(from + i * kWarpSize)) : 0;
  }
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    const unsigned stop = static_cast<unsigned>(end_of(to, ends, b));
    std::int32_t* data = to[b].data + row * to[b].row_stride + (first + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (column + i * kWarpSize < stop) put(data + i * kWarpSize, words[i]);
    }
  }
}

// ---- 16-byte reads of int32 rows of any alignment ----------------------------------------------------------------
// The four words that begin `shift` words into low and high, for shift from 0 to 3. Selects instead of an indexed
// array, which would be in local memory.
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

// The 16-byte boundary at or before an address.
__device__ __forceinline__ const int4* boundary_before(const std::int32_t* address) {
  return reinterpret_cast<const int4*>(reinterpret_cast<std::uintptr_t>(address) / sizeof(int4) * sizeof(int4));
}

// How many words an address lies after that boundary, 0 to 3.
__device__ __forceinline__ int words_past_boundary(const std::int32_t* address) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) / sizeof(std::int32_t) % kVectorWords);
}

// ---- 16-byte accesses --------------------------------------------------------------------------------------------
// Tiles begin at multiples of this in the destination: a 128-byte line, or a whole tile if that is shorter.
constexpr int kTileAlignment = kTileColumns < 32 ? kTileColumns : 32;  // words

// The first tile of a row begins this many columns before column 0. A row's address modulo 16 bytes is the same in all
// destinations; where it isn't, bind chooses a kernel with 4-byte stores.
template <int N>
__device__ __forceinline__ int alignment_offset(const Table (&to)[N], std::int64_t row) {
  const std::int32_t* begin = to[0].data + row * to[0].row_stride;
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) / sizeof(std::int32_t) % kTileAlignment);
}

// Moves kTiles tiles with 16-byte accesses if they lie inside the rows of all destinations; returns whether they do.
// If so, it calls `then` with the words that this lane moved. `width` is the number of readable elements of the source
// row.
template <int kTiles, typename T, int N, typename RowEnds, typename Then>
__device__ __forceinline__ bool copy_vectors(
    const Table (&to)[N], std::int64_t row, const T* source, int width, int first, RowEnds ends, const Then& then) {
  int4 words[kTiles * kUnroll];
  constexpr int kAccesses = kTiles * kUnroll;
  constexpr int kColumns = kTiles * kTileColumns;
  constexpr bool kRealigns = sizeof(T) == sizeof(std::int32_t);
  const int stop = shortest_end(to, ends);
  const int column = first + static_cast<int>(threadIdx.x % kWarpSize) * kVectorWords;
  if constexpr (kRealigns) {
    // Source rows have any alignment: each group of four words is selected from the two aligned groups that contain it.
    int next = 1;
    if constexpr (kEqualRows) {
      // A row that needs no shift has no second group to read, so 16-byte accesses reach its very end.
      const int shift = words_past_boundary(source + column);
      next = shift > 0 ? 1 : 0;
      const int behind = shift > 0 ? kVectorWords - shift : 0;
      if (first < shift || first + kColumns > stop || first + kColumns + behind > width) return false;
    } else {
      if (first < kVectorWords || first + kColumns > stop || first + kColumns + kVectorWords > width) return false;
    }
    const int shift = words_past_boundary(source + column);
    const int4* aligned = boundary_before(source + column);
    int4 high[kAccesses];
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      words[u] = __ldg(aligned + u * kWarpSize);
      high[u] = __ldg(aligned + u * kWarpSize + next);
    }
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) words[u] = realign(words[u], high[u], shift);
  } else {
    if (first < 0 || first + kColumns > stop) return false;
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) {
      const T* at = source + column + u * kWarpSize * kVectorWords;
      words[u].x = static_cast<std::int32_t>(__ldg(at));
      words[u].y = static_cast<std::int32_t>(__ldg(at + 1));
      words[u].z = static_cast<std::int32_t>(__ldg(at + 2));
      words[u].w = static_cast<std::int32_t>(__ldg(at + 3));
    }
  }
#pragma unroll(unrolled(N))
  for (int b = 0; b < N; ++b) {
    int4* data = reinterpret_cast<int4*>(to[b].data + row * to[b].row_stride + column);
#pragma unroll
    for (int u = 0; u < kAccesses; ++u) data[u * kWarpSize] = words[u];
  }
  then(words);
  return true;
}

// Moves kTiles tiles: with 16-byte accesses inside the rows, with 4-byte accesses at their ends.
template <int kTiles, typename T, int N, typename RowEnds>
__device__ __forceinline__ void copy_columns(
    const Table (&to)[N], std::int64_t row, const T* source, int width, int first, RowEnds ends) {
  if (!copy_vectors<kTiles>(to, row, source, width, first, ends, [](const auto&) {})) {
    copy_words<kTiles>(to, row, source, first, ends);
  }
}

// ---- copying a precomputed table ---------------------------------------------------------------------------------
// All rows are equally long. The warps of all blocks take the tiles in turn.
template <int N>
__device__ __forceinline__ void copy_table(
    const Table& from, const Table (&to)[N], std::int64_t row_count, std::int64_t column_count) {
  const int columns = static_cast<int>(column_count);
  const std::uint32_t tiles_per_row = static_cast<std::uint32_t>((columns + kTileAlignment - 2) / kTileColumns + 1);
  const std::uint32_t tiles = columns > 0 ? tiles_per_row * static_cast<std::uint32_t>(row_count) : 0;
  for (std::uint32_t tile = blockIdx.x * kWarps + threadIdx.x / kWarpSize; tile < tiles; tile += gridDim.x * kWarps) {
    const std::int64_t row = tile / tiles_per_row;
    const std::int32_t* source = from.data + row * from.row_stride;
    const int column = static_cast<int>(tile % tiles_per_row) * kTileColumns - alignment_offset(to, row);
    if (column < columns) copy_columns<1>(to, row, source, columns, column, SameEnd{columns});
  }
}

// ---- strategy: copy ----------------------------------------------------------------------------------------------
__device__ void write_tables(const Params& p) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (std::int64_t i = thread; i <= p.batch_size; i += threads) {
    store(p.cu_seqlens_k, 0, i, p.from_cu_seqlens_k[i]);
    store(p.nsa_cu_seqlens_k, 0, i, p.from_nsa_cu_seqlens_k[i]);
    if (i == p.batch_size) break;  // only running sums have this last element
    store(p.cache_seqlens, 0, i, p.from_cache_seqlens[i]);
    store(p.nsa_cache_seqlens, 0, i, p.from_nsa_cache_seqlens[i]);
  }
  copy_table(p.from_page_indices, p.page_indices, p.batch_size, p.page_indices_columns);
  copy_table(p.from_real_page_table, p.real_page_table, p.batch_size, p.real_page_table_columns);
}

// Enough blocks for all tiles, up to a limit that follows from the device.
unsigned grid_blocks(const Params& p) {
  std::int64_t tiles = 0;
  tiles += p.batch_size * ((p.page_indices_columns + kTileAlignment - 2) / kTileColumns + 1);
  tiles += p.batch_size * ((p.real_page_table_columns + kTileAlignment - 2) / kTileColumns + 1);
  const std::int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const std::int64_t limit = p.sm_count * kBlocksPerSm * 2;  // twice the usual limit: no lengths to sum
  const std::int64_t blocks = wanted < limit ? wanted : limit;
  return static_cast<unsigned>(blocks > 1 ? blocks : 1);
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_copy_decode_n3_bf9fc60ccd15c052(const __grid_constant__ Params p) {
  write_tables(p);
}

// ---- host side ---------------------------------------------------------------------------------------------------
// Runs `call` while `device` is the current device.
template <typename Call>
cudaError_t on_device(std::int64_t device, const Call& call) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error != cudaSuccess || current == device) return error != cudaSuccess ? error : call();
  error = cudaSetDevice(static_cast<int>(device));
  if (error != cudaSuccess) return error;
  error = call();
  const cudaError_t restored = cudaSetDevice(current);
  return error != cudaSuccess ? error : restored;
}

}  // namespace

extern "C" {

// Launches the kernel once on `stream` with the parameter block in `words`; returns a cudaError_t.
int onelaunch_copy_decode_n3_bf9fc60ccd15c052_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid_blocks(params), 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_copy_decode_n3_bf9fc60ccd15c052, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_copy_decode_n3_bf9fc60ccd15c052_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_copy_decode_n3_bf9fc60ccd15c052);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_copy_decode_n3_bf9fc60ccd15c052_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
