// The float32 kernels against the float64 log domain on the same numbers: likelihoods, all gradients, best
// paths; every layout, type and mask, what may be lost in a scaled domain, and the same bits from any number
// of threads. Run once per instruction set. Every buffer ends where memory ends, so that reading past it is a
// crash.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>

#include "testing/check.h"
#include "testing/crf_compare.h"
#include "testing/crf_hazards.h"
#include "testing/crf_problem.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

// ---- likelihood and gradients -----------------------------------------------------------------------------

void check_nll(const Problem& p, const View& view) {
  const Result<float> got = run_nll<float>(p, view, serial_for);
  check_result(p, view, got);
  for (int count : {2, 5}) CHECK(same_bits(got, run_nll<float>(p, view, threads(count))));
  CHECK(same_bits(got.nll, run_nll<float>(p, view, threads(2), false).nll));
}

// ---- viterbi ----------------------------------------------------------------------------------------------

struct Decoded {
  Memory<int64_t> paths;
  Memory<float> scores;
  explicit Decoded(const Problem& p) : paths(p.B * p.T), scores(p.B) {}
};

void check_viterbi(const Problem& p, const View& view) {
  const Parameters<float> parameters(p);
  const Model<float> model = parameters.model(p, view);
  Decoded got(p), again(p), want(p);
  FASTSEQ_SELECT(viterbi)(model, got.paths.data(), got.scores.data(), serial_for);
  FASTSEQ_SELECT(viterbi)(model, again.paths.data(), again.scores.data(), threads(5));
  CHECK(same_bits(got.paths, again.paths) && same_bits(got.scores, again.scores));
  FASTSEQ_SELECT(viterbi_exact<float>)(model, want.paths.data(), want.scores.data(), serial_for);
  for (int64_t b = 0; b < p.B; ++b) {
    if (!near(got.scores[b], want.scores[b], 0) && report(__FILE__, __LINE__))
      std::printf("score[%d] is %.9g, wanted %.9g\n", int(b), got.scores[b], want.scores[b]);
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t tag = got.paths[b * p.T + t], wanted = want.paths[b * p.T + t];
      const bool in_range = wanted == -100 ? tag == -100 : tag >= 0 && tag < p.K;
      if (std::isnan(want.scores[b]) ? in_range : tag == wanted) continue;
      if (report(__FILE__, __LINE__))
        std::printf("path[%d,%d] is %d, wanted %d\n", int(b), int(t), int(tag), int(wanted));
    }
  }
}

void check(const Problem& p, Type type, Layout layout, const std::string& what) {
  const View view(p, type, layout);
  context() = what + ": B " + std::to_string(p.B) + ", T " + std::to_string(p.T) + ", K " +
              std::to_string(p.K) + ", type " + std::to_string(int(type)) + ", layout " +
              std::to_string(int(layout));
  check_nll(p, view);
  check_viterbi(p, view);
}

// ---- every size -------------------------------------------------------------------------------------------

constexpr Type kTypes[] = {Type::f32, Type::bf16, Type::f16};

void test_sizes() {
  int turn = 0;  // types, layouts and masks take turns: their periods have no common factor
  for (int64_t K :
       {1, 2, 3, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 31, 32, 33, 40, 47, 48, 63, 64, 65, 100, 128, 130}) {
    for (int64_t B : {1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 40}) {
      Problem p(B, 1 + turn % 7, K, Mask(turn % 4), unsigned(turn));
      p.tagged = turn % 5 != 0;
      p.weighted = turn % 6 != 0;
      if (turn % 8 == 3) p.forbid_some_edges();
      check(p, turn % 2 ? Type::f32 : kTypes[turn / 2 % 3], Layout(turn / 3 % 4), "sizes");
      ++turn;
    }
  }
  // Enough rows for full vectors, whatever the number of processors (see layout_for in kernels.cpp).
  const int64_t many = 32 * int64_t(std::max(1u, std::thread::hardware_concurrency())) + 19;
  for (int64_t K : {1, 2, 7, 9, 16, 17, 31, 32})
    check(Problem(many, 5, K, Mask::holes, unsigned(K)), kTypes[K % 3], Layout(K % 4), "many rows");
  for (int64_t K : {1, 2, 3, 9, 17, 33})
    for (Mask mask : {Mask::none, Mask::right})
      check(Problem(3, 3000, K, mask, unsigned(K)), Type::f32, Layout::dense, "long");
  for (int64_t K : {1, 9, 40}) {
    check(Problem(0, 4, K, Mask::none, 1), Type::f32, Layout::dense, "no rows");
    check(Problem(3, 0, K, Mask::none, 1), Type::f32, Layout::dense, "no positions");
    Problem off(9, 4, K, Mask::none, 1);
    off.keep([](int64_t, int64_t) { return false; });
    check(off, Type::f32, Layout::padded, "all empty");
  }
}

// ---- what a search can lose -------------------------------------------------------------------------------

// Scores on a coarse grid, so that many paths are equal; and scores so far from 0 that sums which differ
// round to one.
void test_ties(int64_t K) {
  for (float offset : {0.f, 1000.f, -1e6f, 1e7f}) {
    for (float spread : {0.f, 0.25f, 4.f}) {  // of the transitions: small, and most tags cannot win
      Problem p(17, 9, K, Mask::right, unsigned(K));
      for (float& a : p.transitions) a = std::round(a) * spread;
      for (float& x : p.x) x = std::round(x) * 0.5f;
      for (int64_t k = 0; k < K; ++k) p.start[k] = offset, p.end[k] = std::round(p.end[k]);
      if (spread == 4.f) p.forbid_some_edges();
      const View view(p, Type::f32, Layout::dense);
      context() = "ties at " + std::to_string(offset) + ", K " + std::to_string(K);
      check_viterbi(p, view);
      for (float& a : p.transitions) a = a * 0.1f - offset;  // as far the other way, each step
      check_viterbi(p, view);
    }
  }
}

// Transitions differ much into the first half of the tags, little into the others, and one in the middle is
// never entered: what bounds how far a tag may be behind and still win (viterbi.h) must look at all columns.
void test_ruling_out(int64_t K) {
  Problem p(17, 9, K, Mask::right, unsigned(K));
  for (int64_t i = 0; i < K * K; ++i) p.transitions[i] *= i % K < K / 2 ? 10 : 0.1f;
  for (float& x : p.x) x *= 3;
  context() = "ruling out, K " + std::to_string(K);
  check_viterbi(p, View(p, Type::f32, Layout::dense));
  for (int64_t i = 0; i < K; ++i) p.transitions[i * K + K / 2] = kNever;
  check_viterbi(p, View(p, Type::f32, Layout::dense));
  p.transitions[K / 2] = 0;
  p.transitions[K * K - 1] = kNever;
  check_viterbi(p, View(p, Type::f32, Layout::dense));
}

// NaN or +inf in a row: its own results are NaN, and the other rows' have the same bits as without it.
void test_poison(int64_t K) {
  for (float poison : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (int way = 0; way < 4; ++way) {
      Problem p(17, 6, K, Mask::holes, unsigned(K));
      const View view(p, Type::f32, Layout::dense);
      const Result<float> clean = run_nll<float>(p, view, serial_for);
      std::vector<bool> poisoned(p.B);
      for (int64_t b = way; b < p.B; b += 4)
        if (p.rows.length(b) > 0) poisoned[b] = true, p.at(b, p.rows.length(b) * way / 4, way % K) = poison;
      check(p, Type::f32, Layout::dense, "poison");
      const View poisoned_view(p, Type::f32, Layout::dense);
      const Result<float> got = run_nll<float>(p, poisoned_view, serial_for);
      for (int64_t b = 0; b < p.B; ++b) {
        const int64_t row = p.T * K * 4;
        CHECK(std::isnan(got.nll[b]) == poisoned[b]);
        if (poisoned[b]) continue;
        CHECK(std::memcmp(&got.nll[b], &clean.nll[b], 4) == 0);
        CHECK(std::memcmp(got.emissions.data() + b * row, clean.emissions.data() + b * row, row) == 0);
      }
    }
    for (int which = 0; which < 3; ++which) {
      Problem p(17, 6, K, Mask::right, unsigned(K));
      std::vector<float>& parameter = *std::array{&p.transitions, &p.start, &p.end}[which];
      parameter[parameter.size() / 2] = poison;
      check(p, Type::f32, Layout::dense, "poisoned parameter " + std::to_string(which));
    }
  }
}

// Calls from several threads at once share nothing but what they read.
void test_concurrent_calls() {
  context() = "concurrent calls";
  const Problem p(17, 9, 9, Mask::right, 1), q(9, 9, 40, Mask::right, 1);
  const View view(p, Type::f32, Layout::dense), view_q(q, Type::f32, Layout::dense);
  const Result<float> want = run_nll<float>(p, view, serial_for),
                      want_q = run_nll<float>(q, view_q, serial_for);
  bool same[4] = {};
  std::vector<std::thread> pool;
  for (int i = 0; i < 4; ++i)
    pool.emplace_back([&, i] {
      same[i] = i % 2 ? same_bits(want, run_nll<float>(p, view, threads(2)))
                      : same_bits(want_q, run_nll<float>(q, view_q, threads(2)));
    });
  for (std::thread& thread : pool) thread.join();
  CHECK(same[0] && same[1] && same[2] && same[3]);
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  test_sizes();
  for (int64_t K : {2, 3, 9, 16, 17, 33, 50}) {
    lost_paths(K, check);
    lost_at_both_ends(K, check);
  }
  for (int64_t K : {1, 2, 3, 9, 17, 32, 33, 65}) {
    constraints(K, check);
    extreme_emissions(K, check);
    test_ties(K);
    test_ruling_out(K);
    test_poison(K);
  }
  test_concurrent_calls();
  return summary("crf");
}
