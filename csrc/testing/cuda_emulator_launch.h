// How the CUDA emulator runs a grid: its settings, its counters, and the launch, block by block.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "testing/cuda_emulator_sync.h"

namespace fastseq::emulator {

struct Settings {
  uint64_t seed = 0;
  Schedule schedule = Schedule::mixed;
  // Of a block: what compute capability 7.5 has, the least of those supported.
  size_t shared_limit = 64 << 10;
};

// To be changed while nothing runs.
inline Settings& settings() {
  static Settings settings = [] {
    const char* seed = std::getenv("FASTSEQ_EMULATOR_SEED");
    return Settings{.seed = seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0};
  }();
  return settings;
}

// What was launched, and what cuda::load and cuda::store moved, since the last reset.
struct Counters {
  uint64_t launches, bytes_read, bytes_written;
};

struct AtomicCounters {
  std::atomic<uint64_t> launches{0}, bytes_read{0}, bytes_written{0};
};
inline AtomicCounters totals;
inline constinit thread_local uint64_t bytes_read = 0, bytes_written = 0;  // by the block that runs

inline Counters counters() { return {totals.launches, totals.bytes_read, totals.bytes_written}; }
inline void reset_counters() { totals.launches = totals.bytes_read = totals.bytes_written = 0; }
FASTSEQ_UNTRACKED inline void count_read(uint64_t bytes) { bytes_read += bytes; }
FASTSEQ_UNTRACKED inline void count_write(uint64_t bytes) { bytes_written += bytes; }

inline void run_block(const Launch& launch, uint64_t index) {
  Untracked untracked;
  bytes_read = bytes_written = 0;
  Block::mine().run(launch, index);
  totals.bytes_read += bytes_read;
  totals.bytes_written += bytes_written;
}

// An OS thread that does one thing at a time, while the caller waits.
class Worker {
 public:
  Worker() : thread_([this] { loop(); }) {}
  ~Worker() {
    hand(nullptr);
    thread_.join();
  }
  Worker(const Worker&) = delete;

  void run_block(const Launch& launch, uint64_t index) {
    index_ = index;
    hand(&launch);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void hand(const Launch* launch) {
    std::unique_lock lock(mutex_);
    launch_ = launch;
    busy_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !busy_; });
  }
  void loop() {
    for (bool more = true; more;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return busy_; });
      more = launch_ != nullptr;
      try {
        if (more) emulator::run_block(*launch_, index_);
      } catch (...) {
        error_ = std::current_exception();
      }
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const Launch* launch_ = nullptr;
  uint64_t index_ = 0;
  bool busy_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // the last member, as it uses the others
};

// The thread sanitizer sees the blocks of one OS thread in order, so two take turns. The order of the
// blocks is random: any two of a grid are unordered under some seed.
inline void run_blocks(const Launch& launch, const std::vector<uint64_t>& order) {
  if constexpr (kThreadSanitizer) {
    static thread_local std::array<Worker, 2> workers;
    for (size_t i = 0; i < order.size(); ++i) workers[i % 2].run_block(launch, order[i]);
  } else {
    for (uint64_t index : order) run_block(launch, index);
  }
}

inline void check(const Launch& launch) {
  const auto invalid = [&](const std::string& what) {
    throw std::runtime_error("CUDA emulator: kernel " + std::string(launch.kernel) + ": " + what);
  };
  const dim3 &grid = launch.grid, &block = launch.block;
  if (Block::mine().running()) invalid("launched by a kernel");
  if (grid.count() == 0 || block.count() == 0) invalid("a grid or a block of nothing");
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) invalid("the grid is too large");
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || block.count() > kMaxThreads)
    invalid("a block of " + std::to_string(block.count()) + " threads");
  if (launch.shared_bytes > settings().shared_limit)
    invalid(std::to_string(launch.shared_bytes) + " bytes of shared memory, and there are " +
            std::to_string(settings().shared_limit));
}

inline void run(Launch launch) {
  check(launch);
  Untracked untracked;
  ++totals.launches;
  launch.seed = settings().seed;
  launch.schedule = settings().schedule;
  const auto orders = std::make_unique<char[]>(3);  // on the heap, so that the sanitizer forgets them
  launch.begin = &orders[0];
  launch.end = &orders[1];
  launch.fence = &orders[2];
  release(launch.begin);
  std::vector<uint64_t> order(launch.grid.count());
  std::iota(order.begin(), order.end(), 0);
  if (launch.schedule != Schedule::in_order) Random(launch.seed).shuffle(order.data(), order.size());
  try {
    run_blocks(launch, order);
  } catch (...) {
    acquire(launch.end);
    throw;
  }
  acquire(launch.end);
}

}  // namespace fastseq::emulator
