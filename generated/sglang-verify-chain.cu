// Emitted by onelaunch from templates/kernel.cu.j2. Do not edit: change the templates, then regenerate with
//   onelaunch show sglang-verify-chain
//
// configuration
//   operation               precompute_and_broadcast
//   mode                    decode
//   num_backends            1
//   fields                  mask, out_cache_loc, positions, retrieve_index, retrieve_next_sibling, retrieve_next_token
//   distinct                all
//   target                  cuda
//   checked                 False
//   declare                 mask = vector('row % draft_tokens <= row // draft_tokens', dtype='bool', rows=16);
//                           out_cache_loc = vector('token(base_len + row)', dtype='int64', rows=4, pad=0); positions =
//                           vector('base_len + row', dtype='int64', rows=4, pad=0); retrieve_index = vector('request *
//                           draft_tokens + row', dtype='int64', rows=4); retrieve_next_sibling = vector('-1',
//                           dtype='int64', rows=4); retrieve_next_token = vector('where(row < draft_tokens - 1, row +
//                           1, -1)', dtype='int64', rows=4)
//   constants               draft_tokens: 4
// key 6b44fa3a4dbf2528b203a3a2ce047fbf396432fcc5305509887d4bb1ccd746e8

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// ---- settings ----------------------------------------------------------------------------------------------------
constexpr int kBackends = 1;
constexpr int kThreads = 256;  // per block
constexpr int kWarpSize = 32;
constexpr int kLengthSets = 1;  // lengths per request: one for all backends, or one per backend
constexpr int kFirstTableBlock = kLengthSets;  // other blocks come first
using SeqLen = std::int64_t;
constexpr std::int32_t kLongestOffset = 0;  // largest offset that a backend adds to seq_lens
using PoolIndex = std::int64_t;
using Token = std::int32_t;
constexpr std::int32_t user_draft_tokens = 4;  // declared

// ---- arguments ---------------------------------------------------------------------------------------------------
// What formulas look up: a table with a row for a request, or a map.
template <typename T>
struct Source {
  const T* data;
  std::int64_t rows, row_stride, columns;
};

template <typename T>
struct Map {
  const T* data;
  std::int64_t size;
};

// Every member is 64 bits wide, so that the host can fill the block as an array of words. It is passed by value, which
// needs no pointer table in device memory and no copy before a launch.
struct Params {
  // set at each call
  const SeqLen* seq_lens;  // [batch_size]
  std::int64_t seq_lens_stride;  // elements
  const PoolIndex* req_pool_indices;  // [batch_size], rows of req_to_token
  std::int64_t req_pool_indices_stride;  // elements
  std::int64_t batch_size;  // requests
  std::int64_t captured_size;  // requests, padding included
  // set when a plan is bound
  const Token* req_to_token;  // [pool rows, req_to_token_width]
  std::int64_t req_to_token_stride;  // elements from row to row
  std::int64_t req_to_token_width;  // elements of a row that may be read
  std::int64_t device;  // ordinal
  std::int64_t pool_rows;  // rows of req_to_token
  bool* user_mask[kBackends];  // [bs * 16]
  std::int64_t* user_out_cache_loc[kBackends];  // [bs * 4]
  std::int64_t* user_positions[kBackends];  // [bs * 4]
  std::int64_t* user_retrieve_index[kBackends];  // [bs * 4]
  std::int64_t* user_retrieve_next_sibling[kBackends];  // [bs * 4]
  std::int64_t* user_retrieve_next_token[kBackends];  // [bs * 4]
};
constexpr int kParamWords = 17;
static_assert(sizeof(Params) == kParamWords * sizeof(std::int64_t), "Params must be an array of 64-bit words");

// Every consumer reads int32 lengths; a wider input is truncated, as by tensor.to(torch.int32).
__device__ __forceinline__ std::int32_t request_length(const Params& p, std::int64_t request) {
  const SeqLen length = p.seq_lens[request * p.seq_lens_stride];
  return static_cast<std::int32_t>(length);
}

// The offset that every backend adds to seq_lens.
__device__ __forceinline__ std::int32_t length_offset(int) {
  return kLongestOffset;
}

// A request's row of req_to_token. If it is negative, the request has none and nothing may be read.
__device__ __forceinline__ std::int64_t request_row(const Params& p, std::int64_t request) {
  const std::int64_t row = p.req_pool_indices[request * p.req_pool_indices_stride];
  return row;
}

__device__ __forceinline__ Source<Token> token_source(const Params& p) {
  return {p.req_to_token, p.pool_rows, p.req_to_token_stride, p.req_to_token_width};
}

// Unchecked: a look-up outside of its source isn't reported.
__device__ __forceinline__ void check_look_up(const Params&, std::int64_t, std::int64_t, std::int64_t) {}

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

// ---- division ----------------------------------------------------------------------------------------------------
// The quotient rounded down, as Python's //; the divisor is positive.
template <typename T>
__device__ __forceinline__ T floor_div(T value, int divisor) {
  return value / divisor - (value % divisor < 0 ? 1 : 0);
}

// ---- remainder ---------------------------------------------------------------------------------------------------
// The remainder of floor_div, as Python's %: 0 or more, and less than the divisor, which is positive.
template <typename T>
__device__ __forceinline__ T floor_mod(T value, int divisor) {
  const T remainder = value % divisor;
  return remainder < 0 ? remainder + divisor : remainder;
}

// ---- arithmetic that wraps ---------------------------------------------------------------------------------------
// wrap(bits(a) + b) is a sum that wraps at 2^32, as PyTorch's int32 does; signed overflow is undefined in C++.
template <typename T>
__device__ __forceinline__ std::make_unsigned_t<T> bits(T value) {
  return static_cast<std::make_unsigned_t<T>>(value);
}

template <typename T>
__device__ __forceinline__ std::make_signed_t<T> wrap(T value) {
  return static_cast<std::make_signed_t<T>>(value);
}

// ---- addresses that the compiler keeps as they are ---------------------------------------------------------------
// Keeps one base address in a register. Otherwise the compiler computes an address for each load.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* address) {
  if constexpr (kWarpSize > 1) asm("" : "+l"(address));
  return address;
}

// ---- look-ups of formulas ----------------------------------------------------------------------------------------
// Whether an index lies within a size. Unsigned comparison: a negative index fails the bound check, too. Indices of 32
// bits need no arithmetic of 64.
template <typename At>
__device__ __forceinline__ bool within(At index, std::int64_t size) {
  using Unsigned = std::make_unsigned_t<At>;
  constexpr std::int64_t kAll = std::int64_t{1} << 31;
  if constexpr (sizeof(At) < sizeof(size)) size = size < kAll ? size : kAll;
  return static_cast<Unsigned>(index) < static_cast<Unsigned>(size);
}

// What isn't there isn't read, and yields `missing`, whose type is the formula's.
template <typename Value, typename T, typename Row, typename Column>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Source<T>& source, Row row, Column column, Value missing) {
  check_look_up(p, request, row, source.rows);
  check_look_up(p, request, column, source.columns);
  const bool row_there = within(row, source.rows);
  // The row's address is computed once for all columns, not in each one's branch.
  const T* data = opaque(source.data + (row_there ? row : 0) * source.row_stride);
  return row_there && within(column, source.columns) ? static_cast<Value>(__ldg(data + column)) : missing;
}

template <typename Value, typename T, typename At>
__device__ __forceinline__ Value
look_up(const Params& p, std::int64_t request, const Map<T>& map, At index, Value missing) {
  check_look_up(p, request, index, map.size);
  return within(index, map.size) ? static_cast<Value>(__ldg(map.data + index)) : missing;
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// One block takes the requests in chunks of kThreads and carries the sums from chunk to chunk, so the batch has no
// limit. Where the backends' lengths differ, block b writes the vectors of backend b.
__device__ void refresh_vectors(const Params& p, int b) {
  const int batch_size = static_cast<int>(p.batch_size);
  for (int first = 0; first < batch_size; first += kThreads) {
    const int request = first + static_cast<int>(threadIdx.x);
    const bool present = request < batch_size;
    const std::int32_t base_len = present ? request_length(p, request) : 0;
    [[maybe_unused]] const std::int64_t pool_row = present ? request_row(p, request) : -1;
    [[maybe_unused]] const std::int32_t offset = length_offset(b);
    [[maybe_unused]] const std::int32_t seq_len = wrap(bits(base_len) + offset);
    if (!present) continue;
    for (int row = 0; row < 16; ++row) {
      const std::int32_t user_mask =
          static_cast<std::int32_t>(floor_mod(row, user_draft_tokens) <= floor_div(row, user_draft_tokens));
      store(p.user_mask, b, std::int64_t{request} * 16 + row, user_mask);
    }
    for (int row = 0; row < 4; ++row) {
      const std::int64_t user_out_cache_loc =
          look_up(p, request, token_source(p), pool_row, wrap(bits(std::int64_t{base_len}) + row), std::int64_t{0});
      store(p.user_out_cache_loc, b, std::int64_t{request} * 4 + row, user_out_cache_loc);
    }
    for (int row = 0; row < 4; ++row) {
      const std::int64_t user_positions = wrap(bits(std::int64_t{base_len}) + row);
      store(p.user_positions, b, std::int64_t{request} * 4 + row, user_positions);
    }
    for (int row = 0; row < 4; ++row) {
      const std::int64_t user_retrieve_index = wrap(bits(std::int64_t{request}) * user_draft_tokens + row);
      store(p.user_retrieve_index, b, std::int64_t{request} * 4 + row, user_retrieve_index);
    }
    for (int row = 0; row < 4; ++row) {
      store(p.user_retrieve_next_sibling, b, std::int64_t{request} * 4 + row, std::int64_t{-1});
    }
    for (int row = 0; row < 4; ++row) {
      const std::int64_t user_retrieve_next_token = (row < 3 ? wrap(bits(std::int64_t{row}) + 1) : std::int64_t{-1});
      store(p.user_retrieve_next_token, b, std::int64_t{request} * 4 + row, user_retrieve_next_token);
    }
  }
  // Padding, up to the captured size.
  for (std::int64_t request = batch_size + threadIdx.x; request < p.captured_size; request += kThreads) {
    for (int row = 0; row < 4; ++row) store(p.user_out_cache_loc, b, request * 4 + row, 0);
    for (int row = 0; row < 4; ++row) store(p.user_positions, b, request * 4 + row, 0);
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads)
    onelaunch_broadcast_decode_n1_6b44fa3a4dbf2528(const __grid_constant__ Params p) {
  int block = blockIdx.x;
  if (block < kLengthSets) return refresh_vectors(p, block);
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
int onelaunch_broadcast_decode_n1_6b44fa3a4dbf2528_launch(const std::int64_t* words, void* stream) {
  Params params;
  std::memcpy(&params, words, sizeof(Params));
  return on_device(params.device, [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kFirstTableBlock, 1, 1);
    config.blockDim = dim3(kThreads, 1, 1);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, onelaunch_broadcast_decode_n1_6b44fa3a4dbf2528, params);
  });
}

// Loads the kernel on a device, so that the first launch doesn't have to, and reads its resources: registers per
// thread, bytes of shared memory per block, bytes of local memory per thread. Returns a cudaError_t.
int onelaunch_broadcast_decode_n1_6b44fa3a4dbf2528_prepare(std::int64_t device, std::int64_t* resources) {
  return on_device(device, [&] {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, onelaunch_broadcast_decode_n1_6b44fa3a4dbf2528);
    resources[0] = attributes.numRegs;
    resources[1] = static_cast<std::int64_t>(attributes.sharedSizeBytes);
    resources[2] = static_cast<std::int64_t>(attributes.localSizeBytes);
    return error;
  });
}

const char* onelaunch_broadcast_decode_n1_6b44fa3a4dbf2528_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // extern "C"
