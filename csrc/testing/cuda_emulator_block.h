// How the CUDA emulator runs one block: its threads as fibers, which of them goes on next, and what is said
// of a failure. cuda_emulator_sync.h has what they wait for, cuda_emulator.h says what it is all for.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "testing/cuda_emulator_fibers.h"
#include "testing/cuda_emulator_parts.h"

namespace fastseq::emulator {

class Block {
 public:
  Block() = default;
  Block(const Block&) = delete;

  // The one of this OS thread.
  static Block& mine() {
    static thread_local Block block;
    return block;
  }

  bool running() const { return launch_ != nullptr; }
  unsigned char* dynamic_shared() const { return shared_; }

  // Runs block `index` of the launch; throws what was wrong with it.
  void run(const Launch& launch, uint64_t index);

  // ---- what threads call --------------------------------------------------------------------------------

  // Returns for how many threads the predicate holds. `what` is the function's name.
  int barrier(const char* what, bool predicate, const Location& where);
  void named_barrier(int id, int count, const Location& where);
  // Meets the other lanes of the mask. shuffle: the value that lane `source` brought; ballot: a bit for
  // every lane whose value is not 0; match: a bit for every lane whose value is this one's.
  uint64_t warp_op(WarpOp op, const char* what, unsigned mask, uint64_t value, int source,
                   const Location& where);
  // Lets others go first, if the schedule likes.
  void pause();
  void fence(bool of_block);

 private:
  struct Cancelled {};  // thrown in each thread of a block that failed, to unwind its stack

  // The block is over, however that came.
  struct Reset {
    Block& block;
    explicit Reset(Block& of) : block(of) {}
    ~Reset() {
      block.state_.reset();
      block.launch_ = nullptr;
      block.turn_ = 1 - block.turn_;
    }
  };

  struct Thread {
    std::unique_ptr<Stack> stack;
    Fiber fiber;
    uint3 index{};
    bool started = false;
    const char* what = "";  // it waits for, or waited for last
    Location where;
    uint64_t value = 0, result = 0;
    int source = 0;
  };

  // The lanes of a warp that use one mask.
  struct Group {
    unsigned mask = 0, arrived = 0, generation = 0;
    WarpOp op{};
    const char* what = "";
    Location where;
    // One for odd and one for even generations: no lane is two ahead, so no lane acquires what comes
    // later.
    std::array<char, 2> order{};
  };

  struct Warp {
    unsigned lanes = 0, alive = 0, ready = 0;  // that there are, that have not exited, that can go on
    std::deque<Group> groups;                  // a deque, since the sanitizer knows `order` by its address
  };

  struct Barrier {
    int arrived = 0, expected = 0, holds = 0;
    unsigned generation = 0;
    Location where;
    std::array<unsigned, kMaxWarps> lanes{};
    std::array<int, 2> result{};
    std::array<char, 2> order{};
  };

  // What lives as long as a block does. On the heap, so that the sanitizer forgets it with the block.
  struct State {
    std::array<Warp, kMaxWarps> warps;
    std::array<Barrier, kBarriers> barriers;
    char fence = 0;
  };

  static void entry();
  void start(int threads);
  void run_thread();
  Thread& begin();
  Fiber* end();
  void leave();
  int choose();
  void make_ready(int warp, unsigned lanes);
  Fiber* next_fiber();
  void wait(const char* what, const Location& where);
  void complete(int warp, Group& group);
  Group& group(Warp& warp, unsigned mask);
  [[noreturn]] void fail(const std::string& message);
  void unwind();
  std::string deadlock() const;
  int warps() const { return (count_ + 31) / 32; }

  const Launch* launch_ = nullptr;
  unsigned char* shared_ = nullptr;
  std::unique_ptr<State> state_;
  const std::unique_ptr<Thread[]> threads_ = std::make_unique<Thread[]>(kMaxThreads);
  Fiber host_;
  Random random_;
  Schedule schedule_ = Schedule::in_order;
  std::array<int, kMaxWarps> warp_at_{}, rank_{};  // the order of the warps, and its inverse
  uint32_t ready_ = 0;                             // bit r: the warp of rank r has a thread that can go on
  int current_ = 0, count_ = 0, exited_ = 0;
  std::string error_;
  // One block of this OS thread before the next, which has the same stacks and the same static shared
  // memory. Two that take turns, so that a thread which ends does not come before one of its own block
  // which only begins.
  std::array<char, 2> order_{};
  int turn_ = 0;
};

// ---- one block -------------------------------------------------------------------------------------------

inline void Block::run(const Launch& launch, uint64_t index) {
  Untracked untracked;
  const SharedMemory shared(launch.shared_bytes);
  const Reset reset(*this);
  launch_ = &launch;
  shared_ = shared.data();
  error_.clear();
  random_ = Random(launch.seed ^ (index + 1) * 0xD1342543DE82EF95u);
  blockIdx = launch.grid.at(index);
  blockDim = launch.block;
  gridDim = launch.grid;
  start(static_cast<int>(launch.block.count()));
  current_ = choose();
  threadIdx = threads_[current_].index;
  host_.switch_to(threads_[current_].fiber);
  if (error_.empty() && exited_ < count_) error_ = deadlock();
  if (!error_.empty()) unwind();
  if (error_.empty() && !shared.intact())
    error_ = "wrote outside its dynamic shared memory of " + std::to_string(launch.shared_bytes) + " bytes";
  if (!error_.empty())
    throw std::runtime_error("CUDA emulator: kernel " + std::string(launch.kernel) + ", block " +
                             text(blockIdx) + " of " + std::to_string(count_) + " threads: " + error_);
}

inline void Block::start(int threads) {
  count_ = threads;
  exited_ = 0;
  ready_ = 0;
  state_ = std::make_unique<State>();
  schedule_ = launch_->schedule;
  if (schedule_ == Schedule::mixed) schedule_ = random_() % 2 ? Schedule::random : Schedule::warp_first;
  std::iota(warp_at_.begin(), warp_at_.end(), 0);
  if (schedule_ == Schedule::warp_first) random_.shuffle(warp_at_.data(), warps());
  for (int r = 0; r < kMaxWarps; ++r) rank_[warp_at_[r]] = r;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = threads_[i];
    if (thread.stack == nullptr) {
      thread.stack = std::make_unique<Stack>();
      thread.fiber.prepare(*thread.stack, entry);
    }
    thread.index = launch_->block.at(i);
    state_->warps[i / 32].lanes |= 1u << i % 32;
    state_->warps[i / 32].alive |= 1u << i % 32;
    make_ready(i / 32, 1u << i % 32);
  }
}

// A fiber runs the same thread of block after block.
inline void Block::entry() {
  Block& block = mine();
  block.threads_[block.current_].fiber.arrived();
  for (;;) block.run_thread();
}

inline void Block::run_thread() {
  Thread& me = begin();
  try {
    launch_->call(launch_->arguments);
    leave();
  } catch (const Cancelled&) {
  } catch (const std::exception& e) {
    Untracked untracked;
    error_ = "thread " + text(me.index) + " threw: " + e.what();
  }
  // Outside any Untracked: the sanitizer wants none alive when it loses the fiber.
  if (Fiber* next = end()) me.fiber.switch_to(*next);
}

inline Block::Thread& Block::begin() {
  Untracked untracked;
  acquire(launch_->begin);
  acquire(&order_[turn_]);
  threads_[current_].started = true;
  return threads_[current_];
}

inline Fiber* Block::end() {
  Untracked untracked;
  release(launch_->end);
  release(&order_[1 - turn_]);
  threads_[current_].started = false;
  return next_fiber();
}

// The end of a thread that did its work.
inline void Block::leave() {
  Untracked untracked;
  const int w = current_ / 32;
  Warp& warp = state_->warps[w];
  ++exited_;
  warp.alive &= ~(1u << current_ % 32);
  if (state_->barriers[0].arrived > 0)
    fail("it has exited, while others wait at __syncthreads (" + text(state_->barriers[0].where) + ")");
  for (Group& group : warp.groups)
    if (group.arrived != 0 && group.arrived == (group.mask & warp.alive)) complete(w, group);
}

// ---- who goes on -----------------------------------------------------------------------------------------

inline void Block::make_ready(int warp, unsigned lanes) {
  state_->warps[warp].ready |= lanes;
  if (lanes != 0) ready_ |= 1u << rank_[warp];
}

// The next thread, which is no longer among those that could be next; -1 if there is none.
inline int Block::choose() {
  if (ready_ == 0 || !error_.empty()) return -1;
  int rank = std::countr_zero(ready_), lane;
  if (schedule_ == Schedule::random || (schedule_ == Schedule::warp_first && random_() % 64 == 0))
    rank = random_.bit(ready_);
  Warp& warp = state_->warps[warp_at_[rank]];
  lane = schedule_ == Schedule::in_order ? std::countr_zero(warp.ready) : random_.bit(warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_ &= ~(1u << rank);
  return warp_at_[rank] * 32 + lane;
}

// Makes the next thread the one that runs. Returns where to switch to: nullptr if it is this thread again.
inline Fiber* Block::next_fiber() {
  const int last = std::exchange(current_, choose());
  if (current_ == last) return nullptr;
  if (current_ < 0) return &host_;
  threadIdx = threads_[current_].index;
  return &threads_[current_].fiber;
}

// Others run until this thread is chosen again.
inline void Block::wait(const char* what, const Location& where) {
  Thread& me = threads_[current_];
  me.what = what;
  me.where = where;
  if (Fiber* next = next_fiber()) me.fiber.switch_to(*next);
  if (!error_.empty()) throw Cancelled{};
}

inline void Block::pause() {
  Untracked untracked;
  make_ready(current_ / 32, 1u << current_ % 32);
  wait("an atomic", Location::current());
}

// Orders what came before it for those who pass one later: a little more than CUDA promises, as those need
// not have read anything that was written.
inline void Block::fence(bool of_block) {
  Untracked untracked;
  char* order = of_block ? &state_->fence : launch_->fence;
  acquire(order);
  release(order);
}

// ---- errors ----------------------------------------------------------------------------------------------

inline void Block::fail(const std::string& message) {
  error_ = "thread " + text(threads_[current_].index) + ": " + message;
  throw Cancelled{};
}

// Every thread that is under way throws at the point where it waits, so that the fibers can be used again.
inline void Block::unwind() {
  for (int i = 0; i < count_; ++i) {
    if (!threads_[i].started) continue;
    current_ = i;
    host_.switch_to(threads_[i].fiber);
  }
}

// Who waits where, one line for all that wait for the same.
inline std::string Block::deadlock() const {
  std::string message = "deadlock, no thread can go on:";
  std::vector<bool> told(count_);
  for (int i = 0; i < count_; ++i) {
    const auto waits_with = [&](int j) {
      return (state_->warps[j / 32].alive >> j % 32 & 1) != 0 && same(threads_[j].where, threads_[i].where);
    };
    if (told[i] || !waits_with(i)) continue;
    message.append("\n  ")
        .append(threads_[i].what)
        .append(" (")
        .append(text(threads_[i].where))
        .append("): threads");
    for (int j = i; j < count_; ++j) {
      if (!waits_with(j)) continue;
      message.append(" ").append(std::to_string(j));
      const int first = j;
      for (; j < count_ && waits_with(j); ++j) told[j] = true;
      if (j - 1 > first) message.append("-").append(std::to_string(j - 1));
    }
  }
  return message.append("\n  exited: ").append(std::to_string(exited_)).append(" threads");
}

}  // namespace fastseq::emulator
