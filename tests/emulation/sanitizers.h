// What the sanitizers' runtimes offer: the functions are null where the program has no sanitizer.
#pragma once

#include <cstddef>

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

namespace emulation {
namespace {

void tsan_release(void* address) {
  if (__tsan_release != nullptr) __tsan_release(address);
}
void tsan_acquire(void* address) {
  if (__tsan_acquire != nullptr) __tsan_acquire(address);
}

}  // namespace
}  // namespace emulation
