// The threads of a block, each on a fiber: how they wait for one another and resume, in an order that the seed draws.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"
#include "sanitizers.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

// Lanes that meet under one mask. Values of two turns: no lane can be two turns ahead, as every turn needs all lanes.
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
  std::vector<Thread*> ready;  // threads that can resume; reserved at full size, see run_grid
  std::size_t threads = 0;  // of the blocks that were started
  unsigned finished = 0;  // blocks
  struct Use {
    unsigned blocks = 0;  // that ran on a copy so far
    bool busy = false;
    char ends[2] = {0, 0};  // addresses that order successive blocks for ThreadSanitizer, in turn
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

// Deadlock: every remaining thread waits for another.
void check_progress(const Block& block) {
  if (block.waiting > 0 && block.waiting + block.gone == block.count) {
    fail("the threads wait for one another:%s", waiting_threads(block).c_str());
  }
}

// Runs one of the threads that can resume, whichever the seed draws; main if none can.
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

// The calling thread came last: `count` threads from `first` on, or those of them in `mask` if there is one, can resume
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

}  // namespace
}  // namespace emulation
