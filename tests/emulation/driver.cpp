// Runs an emitted kernel on fibers: reads a job, launches it on the job's buffers, writes the buffers back.
//
//   driver <job> <results>
//
// A CUDA thread is a fiber: it runs until it waits for others, and then one of those that can go on does, drawn by the
// seed, which thus repeats a run to the letter. A fiber is a thread like any other to ThreadSanitizer, and costs a
// hundredth of one. A kernel that spins until another thread has done something would hang: only who waits lets go.
//
// This file is compiled without instrumentation, whatever the sanitizer: how it hands values from thread to thread is
// invisible, and what CUDA does order is told to ThreadSanitizer in words (tsan_release, tsan_acquire). So two accesses
// that CUDA leaves unordered are a race in its eyes, however the threads happened to run, even when their blocks ran
// one after the other.
#include <cuda_runtime.h>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

// Present only where the sanitizer is.
extern "C" {
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** kept, const void* bottom, std::size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* kept, const void** bottom, std::size_t* bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, std::size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, std::size_t bytes);
}

// The copies of the kernel's object file, renamed by the harness; one for each block that runs at the same time.
#define EMULATION_COPIES(X)                                                                                     \
  X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) \
  X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31) X(32)

extern "C" {
#define X(k)                                                                                       \
  __attribute__((weak)) int emulated_launch_##k(const std::int64_t* words, void* stream);          \
  __attribute__((weak)) int emulated_prepare_##k(std::int64_t device, std::int64_t* resources);    \
  __attribute__((weak)) const char* emulated_error_##k(int code);                                  \
  extern __attribute__((weak)) unsigned char __start_emulated_shared_##k, __stop_emulated_shared_##k;
EMULATION_COPIES(X)
#undef X
}

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

struct Copy {
  int (*launch)(const std::int64_t*, void*);
  int (*prepare)(std::int64_t, std::int64_t*);
  const char* (*error)(int);
  unsigned char *shared, *shared_end;
};
const std::vector<Copy>& copies() {
  static const std::vector<Copy> linked = [] {
    std::vector<Copy> all = {
#define X(k) \
  {emulated_launch_##k, emulated_prepare_##k, emulated_error_##k, &__start_emulated_shared_##k, \
   &__stop_emulated_shared_##k},
        EMULATION_COPIES(X)
#undef X
    };
    while (!all.empty() && all.back().launch == nullptr) all.pop_back();
    return all;
  }();
  return linked;
}

constexpr int kExitCode = 70;      // of fail()
constexpr std::size_t kStackBytes = 256 * 1024;

void tsan_release(void* address) {
  if (__tsan_release != nullptr) __tsan_release(address);
}
void tsan_acquire(void* address) {
  if (__tsan_acquire != nullptr) __tsan_acquire(address);
}

// ---- fibers --------------------------------------------------------------------------------------------------------
struct Context {
  void* place[5];  // for __builtin_setjmp
  ucontext_t begin;  // where it begins
  bool begun = true;
  unsigned char* stack = nullptr;  // its lowest byte; of main's, AddressSanitizer knows it
  std::size_t stack_bytes = 0;
  void* tsan = nullptr;
  void* asan = nullptr;
};
Context program;  // main
Context* current = &program;

// Not setjmp, longjmp and swapcontext: sanitizers have their own, which take it that frames are left for good.
__attribute__((noinline)) void jump(Context& to) { __builtin_longjmp(to.place, 1); }

__attribute__((noinline)) void jump(Context& from, Context& to) {
  if (__builtin_setjmp(from.place) != 0) return;
  if (to.begun) jump(to);
  to.begun = true;
  setcontext(&to.begin);
  fail("a thread can't begin");
}

void arrive() {
  if (__sanitizer_finish_switch_fiber == nullptr) return;
  const void* stack = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(current->asan, &stack, &bytes);
  if (program.stack == nullptr) {  // the first switch of all comes from there
    program.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
    program.stack_bytes = bytes;
  }
}

void switch_to(Context& to) {
  Context& from = *current;
  if (&from == &to) return;
  if (__sanitizer_start_switch_fiber != nullptr) __sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to.tsan, 1);  // 1: which orders nothing
  current = &to;
  jump(from, to);
  arrive();
}

struct Fiber {
  unsigned char* stack;
  void* tsan;
};

// Fibers are used again by the next launch, which comes after all that they did in this one. Not by the same launch: to
// ThreadSanitizer the two threads would be one.
const Fiber& fiber(std::size_t number) {
  static std::vector<Fiber> fibers;
  while (number >= fibers.size()) {
    // Below the stack is a page that nobody may touch.
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* at = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at == MAP_FAILED || mprotect(at, page, PROT_NONE) != 0) fail("no memory for a thread");
    void* tsan = __tsan_create_fiber != nullptr ? __tsan_create_fiber(0) : nullptr;
    fibers.push_back({static_cast<unsigned char*>(at) + page, tsan});
  }
  return fibers[number];
}

// ---- a block and its threads ---------------------------------------------------------------------------------------
// Lanes that meet under one mask. Two turns of values: nobody can be two turns ahead, as every turn needs all lanes.
struct Meeting {
  const char* operation = nullptr;
  int line = 0;
  unsigned arrived = 0;
  unsigned turn = 0;
  Lanes lanes[2] = {};
  char order[2] = {};  // addresses to tell ThreadSanitizer about, one a turn for the same reason
};

struct Warp {
  unsigned gone = 0;  // lanes that left the kernel, or never were
  std::map<unsigned, Meeting> meetings;  // by mask
};

struct Grid;
struct Block;

struct Thread {
  Context context;
  Block* block;
  unsigned index;
  const char* waits = nullptr;  // where
  int line = 0;
};

struct Block {
  Grid* grid;
  unsigned copy;
  const Launch* launch;
  unsigned index;
  unsigned count;  // threads
  unsigned arrived = 0;  // at the barrier
  unsigned waiting = 0;  // at the barrier or for other lanes
  unsigned gone = 0;
  int line = 0;  // of the barrier
  bool votes[2] = {};  // whether any thread voted yes, at this turn's barrier and at the last one's
  unsigned turn = 0;
  char order[2] = {};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

struct Grid {
  std::mt19937_64* random;
  std::vector<Thread*> ready;  // threads that can go on; as large from the start as it gets, see run_grid
  std::size_t threads = 0;  // of the blocks that were started
  unsigned finished = 0;  // blocks
  struct Use {
    unsigned blocks = 0;  // that ran on a copy so far
    bool busy = false;
    char ends[2] = {0, 0};  // addresses to tell ThreadSanitizer that they follow each other, in turn
  };
  std::vector<Use> uses;  // of the copies
  char begin = 0, end = 0;  // addresses to tell ThreadSanitizer about
};

Thread* self = nullptr;
std::string context = "before the first launch";

std::string waiting_threads(const Block& block) {
  std::map<std::string, std::vector<unsigned>> places;
  for (const Thread& thread : block.threads) {
    if (thread.waits != nullptr) {
      places[std::string(thread.waits) + ", line " + std::to_string(thread.line)].push_back(thread.index);
    }
  }
  std::string text;
  for (const auto& [place, threads] : places) {
    text += "\n  " + std::to_string(threads.size()) + " threads at " + place + " (the first is thread " +
            std::to_string(threads.front()) + ")";
  }
  return text + "\n  " + std::to_string(block.gone) + " threads left the kernel";
}

// Everyone who is left waits for someone else: nobody will ever come.
void check_progress(const Block& block) {
  if (block.waiting > 0 && block.waiting + block.gone == block.count) {
    fail("the threads wait for one another:%s", waiting_threads(block).c_str());
  }
}

// Runs one of the threads that can go on, whichever the seed draws; main if none can.
void run_any(Grid& grid) {
  if (grid.ready.empty()) return switch_to(program);
  std::swap(grid.ready[(*grid.random)() % grid.ready.size()], grid.ready.back());
  self = grid.ready.back();
  grid.ready.pop_back();
  threadIdx = {self->index, 0, 0};
  blockIdx = {self->block->index, 0, 0};
  blockDim = {self->block->count, 1, 1};
  gridDim = {self->block->launch->grid.x, 1, 1};
  switch_to(self->context);
}

// The calling thread waits.
void wait(Block& block) {
  ++block.waiting;
  check_progress(block);
  run_any(*block.grid);
}

// The calling thread came last: `count` threads from `first` on, or those of them in `mask` if there is one, can go on,
// in any order.
void wake(Block& block, unsigned first, unsigned count, unsigned mask = 0) {
  for (unsigned i = 0; i < count; ++i) {
    if (mask != 0 && (mask >> i & 1u) == 0) continue;
    Thread& thread = block.threads[first + i];
    thread.waits = nullptr;
    block.grid->ready.push_back(&thread);
    --block.waiting;
  }
  ++block.waiting;  // the caller wasn't counted
  run_any(*block.grid);
}

void leave(Block& block) {
  if (block.arrived > 0) {
    fail("thread %u leaves the kernel while others wait at a barrier:%s", self->index, waiting_threads(block).c_str());
  }
  Warp& warp = block.warps[self->index / kWarp];
  warp.gone |= 1u << self->index % kWarp;
  for (const auto& [mask, meeting] : warp.meetings) {
    if (meeting.arrived != 0 && (mask & warp.gone) != 0) {
      fail("thread %u leaves the kernel while other lanes wait for it:%s", self->index, waiting_threads(block).c_str());
    }
  }
  ++block.gone;
  check_progress(block);
  Grid& grid = *block.grid;
  tsan_release(&grid.end);
  Grid::Use& use = grid.uses[block.copy];
  tsan_release(&use.ends[use.blocks % 2]);
  if (block.gone < block.count) run_any(grid);
  ++grid.finished;
  use.busy = false;
  switch_to(program);  // which may have another block to start
}

void enter() {
  arrive();
  Block& block = *self->block;
  tsan_acquire(&block.grid->begin);
  Grid::Use& use = block.grid->uses[block.copy];
  tsan_acquire(&use.ends[(use.blocks + 1) % 2]);
  block.launch->thread();
  leave(block);
}

void start(Block& block) {
  Grid& grid = *block.grid;
  block.threads.resize(block.count);
  block.warps.resize((block.count + kWarp - 1) / kWarp);
  if (block.count % kWarp != 0) block.warps.back().gone = ~0u << block.count % kWarp;
  for (unsigned i = 0; i < block.count; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    Context& own = thread.context;
    const Fiber& use = fiber(grid.threads++);
    own.stack = use.stack;
    own.tsan = use.tsan;
    own.stack_bytes = kStackBytes;
    own.begun = false;
    getcontext(&own.begin);
    own.begin.uc_stack.ss_sp = own.stack;
    own.begin.uc_stack.ss_size = own.stack_bytes;
    own.begin.uc_link = nullptr;
    makecontext(&own.begin, enter, 0);
    grid.ready.push_back(&thread);
  }
}

// ---- one launch ----------------------------------------------------------------------------------------------------
struct Recorded {
  Launch launch;
  int device;
};
std::vector<Recorded> recorded;
int current_device = 0;
constexpr int kDevices = 8;

// Runs the blocks in random order, up to `together` at once, each on a copy of its own while there are any. A block on
// a copy that another was done with follows it, so that no race between these two is seen.
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

// ---- jobs ----------------------------------------------------------------------------------------------------------
// All numbers are little-endian int64. A job is the number of cases, then the cases one after the other:
//   name, words, word values, launches, (seed, blocks together) of each launch, buffers, the buffers
// and a buffer is
//   name, bytes, phase, written, sparse, word patches, (word, byte offset) of each, segments, (offset, bytes, data)
// A buffer lies `phase` bytes past a 16-byte boundary; `written` ones may be written by the kernel. A sparse one
// has only the pages of its segments. The results are the segments' data of each written buffer after each launch.
class Reader {
 public:
  explicit Reader(std::FILE* file) : file_(file) {}
  std::int64_t number() {
    std::int64_t value;
    bytes(&value, sizeof value);
    return value;
  }
  std::string text() {
    std::string value(static_cast<std::size_t>(number()), '\0');
    bytes(value.data(), value.size());
    return value;
  }
  void bytes(void* to, std::size_t count) {
    if (std::fread(to, 1, count, file_) != count) fail("the job is cut short");
  }

 private:
  std::FILE* file_;
};

struct Buffer {
  std::string name;
  std::size_t bytes = 0, phase = 0;
  bool written = false, sparse = false;
  std::vector<std::pair<std::size_t, std::int64_t>> patches;
  std::vector<std::pair<std::size_t, std::string>> segments;
  unsigned char* base = nullptr;  // of the allocation
  unsigned char* data = nullptr;
  std::size_t allocated = 0;
};

struct Case {
  std::string name;
  std::vector<std::int64_t> words;
  std::vector<std::pair<std::uint64_t, unsigned>> launches;
  std::vector<Buffer> buffers;
};

Case read_case(Reader& job) {
  Case c;
  c.name = job.text();
  c.words.resize(static_cast<std::size_t>(job.number()));
  job.bytes(c.words.data(), 8 * c.words.size());
  c.launches.resize(static_cast<std::size_t>(job.number()));
  for (auto& [seed, together] : c.launches) {
    seed = static_cast<std::uint64_t>(job.number());
    together = static_cast<unsigned>(job.number());
  }
  c.buffers.resize(static_cast<std::size_t>(job.number()));
  for (Buffer& b : c.buffers) {
    b.name = job.text();
    b.bytes = static_cast<std::size_t>(job.number());
    b.phase = static_cast<std::size_t>(job.number());
    b.written = job.number() != 0;
    b.sparse = job.number() != 0;
    b.patches.resize(static_cast<std::size_t>(job.number()));
    for (auto& [word, offset] : b.patches) {
      word = static_cast<std::size_t>(job.number());
      offset = job.number();
    }
    b.segments.resize(static_cast<std::size_t>(job.number()));
    for (auto& [offset, data] : b.segments) {
      offset = static_cast<std::size_t>(job.number());
      data = job.text();
    }
  }
  return c;
}

constexpr unsigned char kCanary = 0xc3;
constexpr std::size_t kGuardBytes = 64;

// Guards of canaries around the buffer, except where AddressSanitizer guards it to the byte, reads too.
void allocate(Buffer& b) {
  const bool asan = __asan_poison_memory_region != nullptr;
  if (b.sparse) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    b.allocated = (b.bytes + b.phase + page - 1) / page * page;
    void* at = mmap(nullptr, b.allocated, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail("no address space for %s", b.name.c_str());
    b.base = static_cast<unsigned char*>(at);
    b.data = b.base + b.phase;
    for (const auto& [offset, data] : b.segments) {
      const std::size_t first = (offset + b.phase) / page * page;
      const std::size_t last = (offset + b.phase + data.size() + page - 1) / page * page;
      if (mprotect(b.base + first, last - first, PROT_READ | PROT_WRITE) != 0) fail("no memory for %s", b.name.c_str());
      std::memset(b.base + first, kCanary, last - first);
    }
  } else {
    const std::size_t guard = asan ? 0 : kGuardBytes;
    b.allocated = guard + b.phase + b.bytes + guard;
    b.base = static_cast<unsigned char*>(std::malloc(b.allocated));
    if (b.base == nullptr) fail("no memory for %s", b.name.c_str());
    if (reinterpret_cast<std::uintptr_t>(b.base) % 16 != 0) fail("malloc doesn't align to 16 bytes");
    std::memset(b.base, kCanary, b.allocated);
    b.data = b.base + guard + b.phase;
    if (asan) __asan_poison_memory_region(b.base, b.phase);
  }
  for (const auto& [offset, data] : b.segments) std::memcpy(b.data + offset, data.data(), data.size());
}

// What the kernel may not have touched, it hasn't.
void check_guards(const Buffer& b) {
  if (__asan_unpoison_memory_region != nullptr && !b.sparse) __asan_unpoison_memory_region(b.base, b.phase);
  const auto check = [&](const unsigned char* from, const unsigned char* to) {
    for (const unsigned char* at = from; at < to; ++at) {
      if (*at != kCanary) fail("a write outside %s, at byte %td of %zu", b.name.c_str(), at - b.data, b.bytes);
    }
  };
  if (b.sparse) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    for (const auto& [offset, data] : b.segments) {
      const std::size_t begin = offset + b.phase;
      check(b.base + begin / page * page, b.base + begin);
      check(b.base + begin + data.size(), b.base + (begin + data.size() + page - 1) / page * page);
    }
  } else {
    check(b.base, b.data);
    check(b.data + b.bytes, b.base + b.allocated);
  }
  if (!b.written) {
    for (const auto& [offset, data] : b.segments) {
      if (std::memcmp(b.data + offset, data.data(), data.size()) != 0) {
        fail("%s is an input and was written", b.name.c_str());
      }
    }
  }
}

void release(Buffer& b) {
  if (b.sparse) {
    munmap(b.base, b.allocated);
  } else {
    std::free(b.base);
  }
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
