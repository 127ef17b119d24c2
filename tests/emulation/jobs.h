// Jobs: the cases that the harness writes to a file, and their buffers in memory.
//
// All numbers are little-endian int64. A job is the number of cases, then the cases one after the other:
//   name, words, word values, launches, (seed, blocks together) of each launch, buffers, the buffers
// and a buffer is
//   name, bytes, phase, written, sparse, word patches, (word, byte offset) of each, segments, (offset, bytes, data)
// A buffer lies `phase` bytes past a 16-byte boundary; `written` ones may be written by the kernel. A sparse one
// has only the pages of its segments. The results are the segments' data of each written buffer after each launch.
#pragma once

#include <cuda_runtime.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "sanitizers.h"

namespace emulation {
namespace {

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

// Canaries around the buffer, unless AddressSanitizer guards it: to the byte, and against reads too.
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

// Checks that the kernel left read-only buffers and guards untouched.
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

}  // namespace
}  // namespace emulation
