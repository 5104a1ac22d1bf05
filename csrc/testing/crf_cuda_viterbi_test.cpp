// The CUDA Viterbi, run by the emulator under several schedules, against viterbi.cpp: the same paths to the
// last tie, and the same scores, in every regime, type and layout; with holes, -inf, NaN, and rows longer
// than a window. With the argument "quick" it runs fewer of the cases, for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "crf/cuda/viterbi.cuh"
#include "testing/check.h"
#include "testing/crf_cuda_batch.h"
#include "testing/crf_problem.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

bool quick = false;

constexpr float kNever = -std::numeric_limits<float>::infinity();

// ---- one problem, by the kernel and by the CPU ------------------------------------------------------------

template <class R>
struct Decoded {
  Memory<int64_t> paths;
  Memory<R> scores;
  explicit Decoded(const Problem& p) : paths(p.B * p.T), scores(p.B) {}
};

// (T,B) or (B,T) in memory, or none at all.
struct MaskMemory {
  Memory<bool> memory;
  device::Plane<bool> plane;

  MaskMemory(const Problem& p, bool transposed, bool is_none) : memory(p.B * p.T) {
    plane = {is_none ? nullptr : memory.data(), transposed ? 1 : p.T, transposed ? p.B : 1};
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t t = 0; t < p.T; ++t)
        memory[b * plane.stride_b + t * plane.stride_t] = p.tags[b * p.T + t] != -100;
  }
};

bool all_on(const Problem& p) { return int64_t(p.rows.positions.size()) == p.B * p.T; }

template <class S, class R>
Decoded<R> decode(const Problem& p, const View& view, const Parameters<R>& parameters,
                  const MaskMemory& mask) {
  Decoded<R> out(p);
  device::Batch<S, R> batch = device_batch<S>(p, view, parameters);
  batch.mask = mask.plane;
  Memory<R> workspace(device::viterbi_workspace(batch));
  device::viterbi(batch, out.paths.data(), out.scores.data(), workspace.data(), cudaStream_t{});
  return out;
}

// Where a row is NaN any path in range will do.
template <class R>
void compare(const Problem& p, const Decoded<R>& got, const Decoded<R>& want) {
  for (int64_t b = 0; b < p.B; ++b) {
    const bool is_nan = std::isnan(want.scores[b]);
    if (!(is_nan ? std::isnan(got.scores[b]) : got.scores[b] == want.scores[b]) && report(__FILE__, __LINE__))
      std::printf("score[%d] is %.17g, wanted %.17g\n", int(b), double(got.scores[b]),
                  double(want.scores[b]));
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t tag = got.paths[b * p.T + t], wanted = want.paths[b * p.T + t];
      if (is_nan && wanted != -100 ? tag >= 0 && tag < p.K : tag == wanted) continue;
      if (report(__FILE__, __LINE__))
        std::printf("path[%d,%d] is %d, wanted %d\n", int(b), int(t), int(tag), int(wanted));
    }
  }
}

template <class S, class R>
void check_as(const Problem& p, Type type, Layout layout, int seeds) {
  const View view(p, type, layout);
  const Parameters<R> parameters(p);
  Decoded<R> want(p);
  FASTSEQ_SELECT(viterbi_exact<R>)(parameters.model(p, view), want.paths.data(), want.scores.data(),
                                   serial_for);
  const MaskMemory mask(p, seeds % 2, all_on(p));
  for (int seed = 0; seed < seeds; ++seed) {
    emulator::settings().seed = uint64_t(seed);
    emulator::reset_counters();
    compare(p, decode<S>(p, view, parameters, mask), want);
    CHECK(emulator::counters().launches == (p.B > 0));
  }
}

void check(const Problem& p, Type type, Layout layout, const std::string& what, int seeds = quick ? 1 : 2) {
  context() = what + ": B " + std::to_string(p.B) + ", T " + std::to_string(p.T) + ", K " +
              std::to_string(p.K) + ", type " + std::to_string(int(type)) + ", layout " +
              std::to_string(int(layout));
  switch (type) {
    case Type::f64:
      return check_as<double, double>(p, type, layout, seeds);
    case Type::f32:
      return check_as<float, float>(p, type, layout, seeds);
    case Type::bf16:
      return check_as<device::bf16, float>(p, type, layout, seeds);
    case Type::f16:
      return check_as<device::f16, float>(p, type, layout, seeds);
  }
}

// ---- values -----------------------------------------------------------------------------------------------

template <class F>
void change_all(Problem& p, const F& f) {
  for (auto* values : {&p.x, &p.transitions, &p.start, &p.end})
    for (float& v : *values) v = f(v);
}

// -1, 0 or 1: ties everywhere.
void make_ties(Problem& p) {
  change_all(p, [](float v) { return v < -0.5f ? -1.f : v > 0.5f ? 1.f : 0.f; });
}

// Sums that differ before an emission is added, and no longer after it.
void make_coarse(Problem& p) {
  for (float& v : p.x) v = 4096 * std::round(v);
  for (float& v : p.transitions) v = 0x1p-12f * std::round(4 * v);
}

void make_forbidden(Problem& p, float below) {
  change_all(p, [&](float v) { return v < below ? kNever : v; });
}

void give_values(Problem& p, int turn) {
  if (turn % 5 == 1) make_ties(p);
  if (turn % 5 == 2) make_coarse(p);
  if (turn % 5 == 3) make_forbidden(p, -0.5f);
  if (turn % 5 == 4) make_ties(p), make_forbidden(p, 0.f);  // dead rows among them
}

// ---- cases ------------------------------------------------------------------------------------------------

constexpr Type kTypes[] = {Type::f32, Type::f64, Type::bf16, Type::f16};

// The number of rows for K tags: more than the teams of a block, where blocks have several.
int64_t rows_for(int64_t K, int turn) {
  return K <= 16 ? 1 + turn % 11 : K <= 32 ? 1 + turn % 6 : 1 + turn % 3;
}

void test_sizes() {
  int turn = 0;  // types, layouts, masks and values take turns: their periods have no common factor but 2
  for (int64_t K : {1, 2, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200, 257, 300}) {
    for (int64_t T : {1, 2, 9, 31, 32, 33, 70}) {
      if (quick && T != (K <= 32 ? 70 : 9) && T != 1) continue;
      for (int repeat = 0; repeat < (quick ? 1 : K <= 64 ? 9 : 3); ++repeat) {
        Problem p(rows_for(K, turn), T, K, Mask(turn % 4), unsigned(turn));
        give_values(p, turn);
        check(p, kTypes[turn / 4 % 4], Layout(turn / 3 % 4), "sizes", quick ? 1 : 2 + turn % 2);
        ++turn;
      }
    }
  }
}

// Rows longer than a window, of all positions or of few, which leave windows without any.
void test_windows() {
  struct Size {
    int64_t K, T;
  };
  std::vector<Size> sizes{{5, 257},   {9, 900},   {27, 600},  {50, 600},
                          {100, 330}, {200, 210}, {300, 120}, {1000, 40}};
  if (quick) sizes = {{9, 300}, {50, 600}, {200, 210}};
  int turn = 0;
  for (const Size& size : sizes) {
    device::Batch<float, float> batch{};
    batch.B = 1, batch.T = int(size.T), batch.K = int(size.K);
    CHECK(device::viterbi_workspace(batch) > 0);
    for (Mask mask : {Mask::none, Mask::right, Mask::holes}) {
      if (++turn % 3 != 0 && quick) continue;
      Problem p(size.K <= 32 ? 5 : 1, size.T, size.K, mask, unsigned(turn));
      give_values(p, turn);
      check(p, kTypes[turn % 4], Layout::dense, "windows");
    }
  }
  for (int64_t first : {0, 300, 899}) {
    Problem p(9, 900, 9, Mask::none, unsigned(first));
    p.keep([&](int64_t b, int64_t t) { return t == first || t == first + b * 70; });
    check(p, Type::f32, Layout::dense, "few positions, from " + std::to_string(first));
  }
}

void test_nothing() {
  for (int64_t K : {3, 20, 40, 100, 200, 300}) {
    if (quick && K > 40) continue;
    check(Problem(0, 4, K, Mask::none, 1), Type::f32, Layout::dense, "no rows");
    check(Problem(3, 0, K, Mask::none, 1), Type::f32, Layout::dense, "no positions");
    Problem off(9, 300, K, Mask::none, 1);
    off.keep([](int64_t, int64_t) { return false; });
    check(off, Type::f32, Layout::dense, "all off");
  }
}

// A row in which nothing is possible, by one position, by the edges, or throughout.
void test_dead(int64_t K) {
  Problem p(3, 9, K, Mask::right, unsigned(K));
  for (int64_t k = 0; k < K; ++k)
    for (int64_t b = 0; b < p.B; ++b)
      if (p.rows.length(b) > b) p.at(b, b, k) = kNever;
  check(p, Type::f32, Layout::dense, "dead at a position");
  Problem edges(3, 9, K, Mask::holes, unsigned(K));
  std::fill(edges.transitions.begin(), edges.transitions.end(), kNever);
  check(edges, Type::f64, Layout::dense, "no edges");
  make_forbidden(edges, 1000);
  check(edges, Type::f16, Layout::dense, "nothing at all");
}

// NaN or +inf makes the rows NaN that use it, and no other.
void test_poison(int64_t K) {
  for (float poison : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (int way = 0; way < 3; ++way) {
      Problem p(4, 7, K, Mask::holes, unsigned(K));
      for (int64_t b = 0; b < p.B; ++b)
        for (int64_t t = 0; t < p.T; ++t)
          if (p.tags[b * p.T + t] == -100) p.x[(b * p.T + t) * K + K / 2] = poison;  // nobody looks
      if (way == 2) make_forbidden(p, 0.f);
      check(p, Type::f32, Layout::dense, "poison where off");
      const int64_t length = p.rows.length(way);
      if (length > 0) p.at(way, (length - 1) * way / 2, way % K) = poison;
      check(p, kTypes[way], Layout::dense, "poison");
    }
    for (int which = 0; which < 3; ++which) {
      Problem p(4, 4, K, Mask::none, unsigned(K));
      p.keep([](int64_t b, int64_t t) { return t < b; });  // rows of 0, 1, 2 and 3 positions
      std::vector<float>& parameter = *std::vector{&p.transitions, &p.start, &p.end}[which];
      parameter[parameter.size() - 1] = poison;
      check(p, Type::f32, Layout::dense, "poisoned parameter " + std::to_string(which));
    }
  }
}

// All GPUs have 48 KiB for a block, without being asked.
void test_shared_memory() {
  context() = "shared memory";
  using device::decoding::InCache, device::decoding::Memory;
  emulator::settings().shared_limit = 48 << 10;  // for the other regimes, whose K does not matter
  for (int K = 129; K <= 1024; ++K) {
    const int bytes = K <= 256 ? Memory<InCache<double, double, uint8_t>>::bytes(10000, K)
                               : Memory<InCache<double, double, uint16_t>>::bytes(10000, K);
    CHECK(bytes <= 48 << 10);
  }
  for (int64_t K : {16, 32, 64, 128})
    check(Problem(1, 600, K, Mask::right, 7), Type::f64, Layout::dense, "shared memory", 1);
}

// What a position adds to the traffic: its emissions once, or twice if another window comes after its own.
void test_traffic() {
  const auto bytes_read = [](int64_t T) {
    check(Problem(1, T, 20, Mask::none, 1), Type::bf16, Layout::dense, "traffic", 1);
    return int64_t(emulator::counters().bytes_read);
  };
  CHECK(bytes_read(250) - bytes_read(50) == 200 * 20 * 2);
  CHECK(bytes_read(500) - bytes_read(450) == 50 * 20 * 2);
  const int64_t checkpoint = 20 * 4, start = 20 * 4;  // the first window starts over
  CHECK(bytes_read(300) - bytes_read(250) == (50 + 256) * 20 * 2 + start);
  CHECK(bytes_read(600) - bytes_read(500) == (100 + 256) * 20 * 2 + checkpoint);
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::string(argv[1]) == "quick";
  test_shared_memory();
  test_sizes();
  test_windows();
  test_nothing();
  for (int64_t K : {1, 3, 16, 20, 40, 70, 130, 260}) {
    if (quick && K != 3 && K != 40) continue;
    test_dead(K);
    test_poison(K);
  }
  test_traffic();
  return summary("crf_cuda_viterbi");
}
