// Fibers: contexts of execution that a thread switches between. Each switch is reported to the sanitizers.
#pragma once

#include <cuda_runtime.h>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <vector>

#include "sanitizers.h"

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;

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

// Not setjmp, longjmp and swapcontext: the sanitizers intercept them and assume that the abandoned frames are dead.
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
  if (program.stack == nullptr) {  // the very first switch comes from main
    program.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
    program.stack_bytes = bytes;
  }
}

void switch_to(Context& to) {
  Context& from = *current;
  if (&from == &to) return;
  if (__sanitizer_start_switch_fiber != nullptr) __sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch orders no memory accesses
  current = &to;
  jump(from, to);
  arrive();
}

struct Fiber {
  unsigned char* stack;
  void* tsan;
};

// The next launch reuses the fibers, since it follows everything they did in this one. The same launch must not: to
// ThreadSanitizer the two threads would be one.
const Fiber& fiber(std::size_t number) {
  static std::vector<Fiber> fibers;
  while (number >= fibers.size()) {
    // Below the stack is a guard page.
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* at = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at == MAP_FAILED || mprotect(at, page, PROT_NONE) != 0) fail("no memory for a thread");
    void* tsan = __tsan_create_fiber != nullptr ? __tsan_create_fiber(0) : nullptr;
    fibers.push_back({static_cast<unsigned char*>(at) + page, tsan});
  }
  return fibers[number];
}

}  // namespace
}  // namespace emulation
