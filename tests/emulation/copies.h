// The copies of the kernel's object file, renamed by the harness; one for each block that runs at the same time.
#pragma once

#include <cstdint>
#include <vector>

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

}  // namespace
}  // namespace emulation
