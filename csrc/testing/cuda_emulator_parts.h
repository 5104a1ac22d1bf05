// The small parts of the CUDA emulator: indices, schedules, random numbers, shared memory.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <source_location>
#include <string>
#include <utility>

#include "testing/cuda_emulator_fibers.h"

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr uint64_t count() const { return uint64_t{x} * y * z; }
  // Where the i-th is.
  constexpr uint3 at(uint64_t i) const { return {unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)}; }
};

// Of the thread that runs.
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};

namespace fastseq::emulator {

using Location = std::source_location;

// in_order: the first thread that can go on, the first block first. random: any of them, any block.
// warp_first: one warp as far as it gets before the others do, in an order drawn for the block, with a few
// exceptions. mixed: every block draws one of the last two.
enum class Schedule { in_order, random, warp_first, mixed };

enum class WarpOp { sync, shuffle, ballot, match };

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32, kBarriers = 16;

inline bool same(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline std::string text(const Location& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line());
}

inline std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// splitmix64: few instructions, and any seed will do.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t operator()() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  template <class T>
  void shuffle(T* items, size_t count) {
    for (size_t i = count; i > 1; --i) std::swap(items[i - 1], items[(*this)() % i]);
  }
  // One of the set bits.
  int bit(uint32_t bits) {
    const int by = static_cast<int>((*this)() >> 59);
    return (std::countr_zero(std::rotr(bits, by)) + by) & 31;
  }

 private:
  uint64_t state_;
};

// What a block needs to know of its launch.
struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  Schedule schedule;
  uint64_t seed;
  void (*call)(const void* arguments);
  const void* arguments;
  // Addresses that the thread sanitizer takes for orders of memory: the launch before its threads, these
  // before what follows the launch, and one __threadfence before a later one.
  char *begin, *end, *fence;
};

// Dynamic shared memory of exactly the size asked for, all NaN. The address sanitizer guards its ends;
// without it, bytes before and behind are looked at when the block is done.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : bytes_(bytes), memory_(static_cast<unsigned char*>(std::malloc(bytes + 2 * kGuard))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_, kPattern, bytes + 2 * kGuard);
    std::memset(data(), 0xFF, bytes);
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;
  unsigned char* data() const { return memory_ + kGuard; }
  bool intact() const {
    const auto guard = [](const unsigned char* p) {
      return std::all_of(p, p + kGuard, [](auto c) { return c == kPattern; });
    };
    return guard(memory_) && guard(data() + bytes_);
  }

 private:
  static constexpr size_t kGuard = kAddressSanitizer ? 0 : 64;
  static constexpr unsigned char kPattern = 0xA5;
  size_t bytes_;
  unsigned char* memory_;
};

}  // namespace fastseq::emulator
