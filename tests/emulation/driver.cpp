// Runs an emitted kernel on fibers: reads a job, launches it on the job's buffers, writes the buffers back.
//
//   driver <job> <results>
//
// A CUDA thread is a fiber: it runs until it waits for other threads, and then the seed draws one of those that can
// resume. So a seed repeats a run exactly. To ThreadSanitizer a fiber is a thread like any other, at 1 % of the cost.
// A kernel that spins until another thread has done something would hang: a fiber lets others run only when it waits.
//
// The driver is compiled without instrumentation, whatever the sanitizer, so ThreadSanitizer doesn't see how it passes
// values between threads. What CUDA orders, the driver reports by tsan_release and tsan_acquire. Two accesses that CUDA
// leaves unordered are therefore a race, however the threads happened to run, even if their blocks ran one after the
// other.
#include <cuda_runtime.h>

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "blocks.h"
#include "copies.h"
#include "jobs.h"
#include "sanitizers.h"

namespace emulation {
namespace {

constexpr int kExitCode = 70;  // of fail()

// ---- one launch ----------------------------------------------------------------------------------------------------
struct Recorded {
  Launch launch;
  int device;
};
std::vector<Recorded> recorded;
int current_device = 0;
constexpr int kDevices = 8;

// Runs the blocks in random order, up to `together` at once, each on its own copy while there are unused ones. A block
// that reuses a copy is ordered after the block before it, so no race between these two is seen.
void run_grid(const std::vector<Recorded>& launches, std::mt19937_64& random, unsigned together) {
  const unsigned blocks = launches[0].launch.grid.x;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  Grid grid;
  grid.random = &random;
  // A vector that grows moves its contents, which ThreadSanitizer sees.
  grid.ready.reserve(std::size_t{blocks} * launches[0].launch.block.x);
  grid.uses.resize(launches.size());
  std::vector<std::unique_ptr<Block>> running(blocks);
  tsan_release(&grid.begin);
  for (unsigned started = 0; grid.finished < blocks;) {
    if (started == blocks || started - grid.finished >= together || started - grid.finished >= launches.size()) {
      run_any(grid);
      continue;
    }
    auto block = std::make_unique<Block>();
    const unsigned index = order[started++];
    block->grid = &grid;
    unsigned copy = 0;
    while (grid.uses[copy].busy) ++copy;
    for (unsigned other = copy; other < launches.size(); ++other) {
      if (!grid.uses[other].busy && grid.uses[other].blocks < grid.uses[copy].blocks) copy = other;
    }
    grid.uses[copy].busy = true;
    ++grid.uses[copy].blocks;
    block->copy = copy;
    block->launch = &launches[block->copy].launch;
    block->index = index;
    block->count = block->launch->block.x;
    for (unsigned char* at = copies()[copy].shared; at < copies()[copy].shared_end; ++at) {
      *at = static_cast<unsigned char>(random());
    }
    start(*block);
    running[index] = std::move(block);
  }
  self = nullptr;
  tsan_acquire(&grid.end);
}

// Memory that the launch in progress may write: [first, second).
std::vector<std::pair<const unsigned char*, const unsigned char*>> variable;

constexpr int kDevice = 3;  // not the current one, so that the host code has to switch, and back
void* const kStream = &current_device;

void run_launch(Case& c, std::uint64_t seed, unsigned together, std::FILE* results) {
  context = "case " + c.name + ", seed " + std::to_string(seed) + ", " + std::to_string(together) + " blocks together";
  std::mt19937_64 random(seed);
  std::vector<std::int64_t> words = c.words;
  variable.clear();
  for (Buffer& b : c.buffers) {
    allocate(b);
    for (const auto& [word, offset] : b.patches) words.at(word) = reinterpret_cast<std::int64_t>(b.data) + offset;
    if (b.written) variable.emplace_back(b.data, b.data + b.bytes);
  }
  std::sort(variable.begin(), variable.end());
  current_device = 0;
  recorded.clear();
  for (const Copy& copy : copies()) {
    const std::size_t before = recorded.size();
    const int error = copy.launch(words.data(), kStream);
    if (error != 0) fail("the launch returned %d (%s)", error, copy.error(error));
    if (recorded.size() != before + 1) fail("%zu kernels were launched instead of one", recorded.size() - before);
    const Recorded& made = recorded.back();
    if (made.device != kDevice) fail("launched on device %d instead of %d", made.device, kDevice);
    if (made.launch.stream != kStream) fail("launched on another stream than the caller's");
    if (current_device != 0) fail("the current device is %d after the launch, and was 0", current_device);
    if (made.launch.grid.x != recorded[0].launch.grid.x) fail("copies of one kernel disagree on the grid");
  }
  std::fprintf(stderr, "emulation: %s: %u blocks of %u threads\n", context.c_str(), recorded[0].launch.grid.x,
               recorded[0].launch.block.x);
  run_grid(recorded, random, together);
  for (Buffer& b : c.buffers) {
    check_guards(b);
    if (b.written) {
      for (const auto& [offset, data] : b.segments) {
        if (std::fwrite(b.data + offset, 1, data.size(), results) != data.size()) fail("the results can't be written");
      }
    }
    release(b);
  }
}

}  // namespace

// ---- what the prelude declares -------------------------------------------------------------------------------------
void fail(const char* format, ...) {
  std::fprintf(stderr, "emulation error: %s", context.c_str());
  if (self != nullptr) std::fprintf(stderr, ", block %u, thread %u", self->block->index, self->index);
  std::fprintf(stderr, ": ");
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  _exit(kExitCode);
}

int lane() { return static_cast<int>(self->index % kWarp); }

bool barrier(int line, bool yes) {
  Block& block = *self->block;
  const unsigned turn = block.turn;  // can't change before this thread arrives
  tsan_release(&block.order[turn % 2]);
  self->waits = "__syncthreads";
  self->line = line;
  if (block.gone > 0) {
    fail("thread %u waits at a barrier that others will never reach:%s", self->index, waiting_threads(block).c_str());
  }
  if (block.arrived == 0) {
    block.line = line;
    block.votes[turn % 2] = false;
  } else if (block.line != line) {
    fail("threads of a block wait at different barriers:%s", waiting_threads(block).c_str());
  }
  block.votes[turn % 2] |= yes;
  if (++block.arrived < block.count) {
    wait(block);
  } else {
    block.arrived = 0;
    ++block.turn;
    wake(block, 0, block.count);
  }
  tsan_acquire(&block.order[turn % 2]);
  return block.votes[turn % 2];
}

Lanes exchange(const char* operation, int line, unsigned mask, std::uint64_t value, bool orders) {
  Block& block = *self->block;
  const unsigned bit = 1u << lane();
  self->waits = operation;
  self->line = line;
  if ((mask & bit) == 0) fail("%s, line %d: the mask 0x%08x lacks the calling lane %d", operation, line, mask, lane());
  Warp& warp = block.warps[self->index / kWarp];
  if ((mask & warp.gone) != 0) {
    fail("%s, line %d: lanes 0x%08x of the mask 0x%08x aren't there", operation, line, mask & warp.gone, mask);
  }
  for (const auto& [other, pending] : warp.meetings) {
    if (other != mask && (pending.arrived & mask) != 0 && (other & bit) != 0) {
      fail("%s, line %d: lanes that wait for one another use the masks 0x%08x and 0x%08x", operation, line, mask,
           other);
    }
  }
  Meeting& meeting = warp.meetings[mask];
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.line = line;
  } else if (meeting.line != line || std::strcmp(meeting.operation, operation) != 0) {
    fail("lanes of a warp are at %s, line %d, and at %s, line %d", operation, line, meeting.operation, meeting.line);
  }
  const unsigned turn = meeting.turn;
  if (orders) tsan_release(&meeting.order[turn % 2]);
  Lanes& lanes = meeting.lanes[turn % 2];
  lanes.value[lane()] = value;
  meeting.arrived |= bit;
  if (meeting.arrived != mask) {
    wait(block);
  } else {
    meeting.arrived = 0;
    ++meeting.turn;
    wake(block, self->index / kWarp * kWarp, kWarp, mask);
  }
  if (orders) tsan_acquire(&meeting.order[turn % 2]);
  return lanes;
}

void check_constant(const void* address, std::size_t bytes, int line) {
  const auto* from = static_cast<const unsigned char*>(address);
  auto after = std::upper_bound(variable.begin(), variable.end(), std::make_pair(from + bytes, from + bytes));
  while (after != variable.begin()) {
    --after;
    if (after->second <= from) return;  // buffers don't overlap
    if (after->first < from + bytes) fail("__ldg, line %d, reads memory that the launch writes", line);
  }
}

int launch(Launch launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) fail("the emulation knows one dimension only");
  if (launch.dynamic_shared_bytes != 0) fail("the emulation knows no dynamic shared memory");
  if (launch.parameter_bytes > 32764) return cudaErrorInvalidValue;
  if (grid.x < 1 || grid.x > INT_MAX || block.x < 1 || block.x > 1024) return cudaErrorInvalidConfiguration;
  recorded.push_back({std::move(launch), current_device});
  return cudaSuccess;
}

int device() { return current_device; }

int set_device(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

}  // namespace emulation

int main(int argc, char** argv) {
  using namespace emulation;
  if (argc != 3) fail("usage: driver <job> <results>");
  if (copies().empty()) fail("no kernel was linked");
  std::int64_t resources[3] = {-1, -1, -1};
  if (const int error = copies()[0].prepare(kDevice, resources)) fail("prepare returned %d", error);
  if (current_device != 0) fail("the current device is %d after prepare, and was 0", current_device);
  for (std::int64_t resource : resources) {
    if (resource < 0) fail("prepare left a resource unset");
  }
  if (copies()[0].prepare(kDevices, resources) != cudaErrorInvalidDevice) fail("prepare hid an invalid device");
  if (__tsan_get_current_fiber != nullptr) program.tsan = __tsan_get_current_fiber();
  std::FILE* job_file = std::fopen(argv[1], "rb");
  std::FILE* results = std::fopen(argv[2], "wb");
  if (job_file == nullptr || results == nullptr) fail("the job or the results can't be opened");
  Reader job(job_file);
  for (std::int64_t cases = job.number(); cases > 0; --cases) {
    Case c = read_case(job);
    for (const auto& [seed, together] : c.launches) run_launch(c, seed, together, results);
  }
  if (std::fclose(results) != 0) fail("the results can't be written");
}
