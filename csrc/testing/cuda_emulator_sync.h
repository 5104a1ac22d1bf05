// What the threads of an emulated block wait for: barriers of the block, and operations of a warp. All that
// is forbidden there is found here.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <utility>

#include "testing/cuda_emulator_block.h"

namespace fastseq::emulator {

// ---- barriers --------------------------------------------------------------------------------------------

inline int Block::barrier(const char* what, bool predicate, const Location& where) {
  Untracked untracked;
  Barrier& barrier = state_->barriers[0];
  if (exited_ > 0)
    fail(std::string("at ") + what + " (" + text(where) + "), while " + std::to_string(exited_) +
         " threads have exited");
  if (barrier.arrived == 0) barrier.where = where;
  if (!same(barrier.where, where))
    fail(std::string("at ") + what + " (" + text(where) + "), while others wait at another (" +
         text(barrier.where) + ")");
  const unsigned turn = barrier.generation % 2;
  release(&barrier.order[turn]);
  barrier.holds += predicate;
  if (++barrier.arrived == count_) {
    for (int w = 0; w < warps(); ++w) make_ready(w, state_->warps[w].alive);
    barrier.result[turn] = std::exchange(barrier.holds, 0);
    barrier.arrived = 0;
    ++barrier.generation;
  }
  wait(what, where);
  acquire(&barrier.order[turn]);
  return barrier.result[turn];
}

// A warp arrives once all its lanes have, and then counts as 32 threads.
inline void Block::named_barrier(int id, int count, const Location& where) {
  Untracked untracked;
  if (id < 1 || id >= kBarriers || count <= 0 || count % 32 != 0 || count > 32 * warps())
    fail("bar_sync(" + std::to_string(id) + ", " + std::to_string(count) + ") (" + text(where) +
         "): the barrier must be 1 to 15, the count full warps of the block");
  Barrier& barrier = state_->barriers[id];
  const bool first =
      std::all_of(barrier.lanes.begin(), barrier.lanes.end(), [](unsigned l) { return l == 0; });
  if (first) barrier.expected = count, barrier.where = where;
  if (barrier.expected != count)
    fail("bar_sync(" + std::to_string(id) + ") for " + std::to_string(count) + " threads (" + text(where) +
         "), while others wait for " + std::to_string(barrier.expected) + " (" + text(barrier.where) + ")");
  const unsigned turn = barrier.generation % 2;
  const int w = current_ / 32;
  release(&barrier.order[turn]);
  barrier.lanes[w] |= 1u << current_ % 32;
  if (barrier.lanes[w] == state_->warps[w].lanes) barrier.arrived += 32;
  if (barrier.arrived == count) {
    for (int v = 0; v < warps(); ++v)
      if (barrier.lanes[v] == state_->warps[v].lanes) make_ready(v, std::exchange(barrier.lanes[v], 0));
    barrier.arrived = 0;
    ++barrier.generation;
  }
  wait("bar_sync", where);
  acquire(&barrier.order[turn]);
}

// ---- warps -----------------------------------------------------------------------------------------------

inline Block::Group& Block::group(Warp& warp, unsigned mask) {
  for (Group& group : warp.groups)
    if (group.mask == mask) return group;
  warp.groups.emplace_back().mask = mask;
  return warp.groups.back();
}

inline uint64_t Block::warp_op(WarpOp op, const char* what, unsigned mask, uint64_t value, int source,
                               const Location& where) {
  Untracked untracked;
  const int w = current_ / 32, lane = current_ % 32;
  Warp& warp = state_->warps[w];
  const auto here = [&] { return std::string(what) + " (" + text(where) + ")"; };
  if ((mask >> lane & 1) == 0) fail(here() + ": the calling lane is not in its own mask");
  Group& group = this->group(warp, mask);
  if (group.arrived == 0) group.op = op, group.what = what, group.where = where;
  if (!same(group.where, where))
    fail(here() + ", while other lanes of its mask wait at " + group.what + " (" + text(group.where) + ")");
  for (const Group& other : warp.groups)
    if (&other != &group && (other.arrived & mask) != 0 && (other.mask >> lane & 1) != 0)
      fail(here() + ": its mask differs from that of a lane that waits for it at " + other.what + " (" +
           text(other.where) + ")");
  Thread& me = threads_[current_];
  me.value = value;
  me.source = source;
  const unsigned turn = group.generation % 2;
  if (op == WarpOp::sync) release(&group.order[turn]);
  group.arrived |= 1u << lane;
  if (group.arrived == (mask & warp.alive)) complete(w, group);
  wait(what, where);
  if (op == WarpOp::sync) acquire(&group.order[turn]);
  return me.result;
}

// All lanes are there: each gets its result.
inline void Block::complete(int w, Group& group) {
  const unsigned lanes = group.arrived;
  Thread* warp = &threads_[w * 32];
  uint64_t ballot = 0;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    ballot |= uint64_t{warp[lane].value != 0} << lane;
  }
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    Thread& me = warp[std::countr_zero(rest)];
    me.result = ballot;
    if (group.op == WarpOp::shuffle) {
      if ((lanes >> me.source & 1) == 0)
        fail(std::string(group.what) + " (" + text(group.where) + "): lane " +
             std::to_string(std::countr_zero(rest)) + " reads lane " + std::to_string(me.source) +
             ", which is not in its mask or has exited");
      me.result = warp[me.source].value;
    } else if (group.op == WarpOp::match) {
      me.result = 0;
      for (unsigned others = lanes; others != 0; others &= others - 1)
        if (warp[std::countr_zero(others)].value == me.value) me.result |= others & -others;
    }
  }
  group.arrived = 0;
  ++group.generation;
  make_ready(w, lanes);
}

}  // namespace fastseq::emulator
