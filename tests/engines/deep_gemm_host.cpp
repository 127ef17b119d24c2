// DeepGEMM's own schedule kernels, compiled for the host from the headers in an engine's wheel: deep_gemm.py builds this.
// A CUDA thread is a thread of the host. What DeepGEMM's utility headers define is defined here, because they are full of
// PTX; deep_gemm.py puts empty files in their place. The kernels themselves are DeepGEMM's text.
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define CUTLASS_GLOBAL static
#define CUTLASS_DEVICE inline
#define CUTLASS_HOST_DEVICE inline
#define __launch_bounds__(...)
#define __shared__
#define DG_STATIC_ASSERT(cond, ...) static_assert(cond, __VA_ARGS__)
#define DG_DEVICE_ASSERT(cond) \
  if (!(cond)) std::abort()

struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct Index {
  std::uint32_t x;
};

constexpr std::uint32_t kLanes = 32;

struct Warp {
  std::barrier<> meet{kLanes};
  std::uint32_t values[kLanes];
};

static thread_local Index threadIdx;
static Index blockDim;
static std::unique_ptr<std::barrier<>> block;
static std::vector<std::unique_ptr<Warp>> warps;

using std::min;
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
inline void cudaGridDependencySynchronize() {}
inline void __syncthreads() { block->arrive_and_wait(); }
// DeepGEMM calls it where some lanes have left already. The shuffles order memory here.
inline void __syncwarp() {}
inline std::uint32_t atomicOr(std::uint32_t* at, std::uint32_t bits) { return __atomic_fetch_or(at, bits, __ATOMIC_SEQ_CST); }

inline std::uint32_t __shfl_sync(std::uint32_t, std::uint32_t value, std::uint32_t lane) {
  Warp& warp = *warps[threadIdx.x / kLanes];
  warp.values[threadIdx.x % kLanes] = value;
  warp.meet.arrive_and_wait();
  const std::uint32_t taken = warp.values[lane];
  warp.meet.arrive_and_wait();
  return taken;
}
inline std::uint32_t __shfl_up_sync(std::uint32_t mask, std::uint32_t value, std::uint32_t delta) {
  const std::uint32_t lane = threadIdx.x % kLanes;
  return __shfl_sync(mask, value, lane >= delta ? lane - delta : lane);
}

namespace cute {
using std::max;
using std::min;
using std::numeric_limits;
inline bool elect_one_sync() { return threadIdx.x % kLanes == 0; }
}  // namespace cute

namespace cutlass {
inline std::uint32_t canonical_warp_idx_sync() { return threadIdx.x / kLanes; }
namespace arch {
inline void launch_dependent_grids() {}
}  // namespace arch
}  // namespace cutlass

namespace deep_gemm {
namespace ptx {
inline std::uint32_t get_lane_idx() { return threadIdx.x % kLanes; }
inline std::uint32_t exchange(std::uint32_t value, std::uint32_t lane) { return __shfl_sync(~0u, value, lane); }
}  // namespace ptx
namespace math {
inline std::uint32_t ceil_div(std::uint32_t a, std::uint32_t b) { return (a + b - 1) / b; }
template <std::uint32_t kThreads>
std::uint32_t cta_exclusive_sum(std::uint32_t value, std::uint32_t* warp_sums) {
  std::uint32_t sum = value;
  for (std::uint32_t offset = 1; offset < kLanes; offset *= 2) {
    const std::uint32_t below = __shfl_up_sync(~0u, sum, offset);
    if (ptx::get_lane_idx() >= offset) sum += below;
  }
  if (ptx::get_lane_idx() == kLanes - 1) warp_sums[threadIdx.x / kLanes] = sum;
  __syncthreads();
  for (std::uint32_t warp = 0; warp < threadIdx.x / kLanes; ++warp) sum += warp_sums[warp];
  return sum - value;
}
}  // namespace math
namespace sched {
std::uint32_t smem[1 << 14], smem_buffer[1 << 14];  // the kernels' dynamic shared memory
}  // namespace sched
}  // namespace deep_gemm

#include <deep_gemm/scheduler/sm100_paged_mqa_logits.cuh>
#include <deep_gemm/scheduler/sm90_paged_mqa_logits.cuh>

namespace {

constexpr std::uint32_t kMaxBatch = 320, kSplit = 256, kThreads = 64;

template <typename Kernel>
void launch(std::uint32_t threads, Kernel kernel) {
  blockDim.x = threads;
  block = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (std::uint32_t warp = 0; warp < threads / kLanes; ++warp) warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> running;
  for (std::uint32_t thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx.x = thread;
      kernel();
    });
  }
  for (std::thread& thread : running) thread.join();
}

// The kernels have the number of SMs as a template argument: those that the tests use.
template <typename Run>
int with_sms(std::uint32_t num_sms, Run run) {
  switch (num_sms) {
    case 1: return run(std::integral_constant<std::uint32_t, 1>{}), 0;
    case 7: return run(std::integral_constant<std::uint32_t, 7>{}), 0;
    case 66: return run(std::integral_constant<std::uint32_t, 66>{}), 0;
    case 132: return run(std::integral_constant<std::uint32_t, 132>{}), 0;
    default: return 1;
  }
}

}  // namespace

// 0, or 1 for a number that isn't compiled in.
extern "C" int sm90_schedule(std::uint32_t batch, std::uint32_t n, std::uint32_t atoms, std::uint32_t num_sms,
                             const std::uint32_t* context_lens, std::uint32_t* schedule) {
  if (batch > kMaxBatch) return 1;
  return with_sms(num_sms, [&](auto sms) {
    launch(kLanes, [&] {
      deep_gemm::sched::sm90_paged_mqa_logits_metadata<kMaxBatch, kSplit, sms.value>(batch, n, true, atoms, context_lens,
                                                                                     nullptr, schedule);
    });
  });
}

// With BLOCK_Q of 2.
extern "C" int sm100_schedule(std::uint32_t tokens, std::uint32_t num_sms, const std::uint32_t* context_lens,
                              const std::uint32_t* indices, std::uint32_t* schedule) {
  return with_sms(num_sms, [&](auto sms) {
    launch(kThreads, [&] {
      deep_gemm::sched::sm100_paged_mqa_logits_metadata<kSplit, sms.value, 2, kThreads>(tokens, context_lens, indices,
                                                                                       schedule);
    });
  });
}
