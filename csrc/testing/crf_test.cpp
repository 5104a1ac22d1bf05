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
#include "testing/crf_problem.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;

constexpr double kScale = 0.5;

// ---- running ----------------------------------------------------------------------------------------------

template <class R>
struct Result {
  Memory<R> nll, transitions, start, end;
  Memory<char> emissions;
};

template <class R>
Result<R> run_nll(const Problem& p, const View& view, const ParallelFor& parallel_for, bool gradient = true) {
  const int64_t K = p.K;
  Result<R> out{Memory<R>(p.B), Memory<R>(K * K), Memory<R>(K), Memory<R>(K),
                Memory<char>(view.extent(p) * bytes(view.type))};
  const Parameters<R> parameters(p);
  const Gradients<R> to{out.emissions.data(),   view.stride_b,    view.stride_t,
                        out.transitions.data(), out.start.data(), out.end.data()};
  const Memory<R> weights(p.weights);
  nll<R>(parameters.model(p, view), p.tagged ? p.gold() : Tags{}, p.weighted ? weights.data() : nullptr,
         kScale, out.nll.data(), gradient ? &to : nullptr, parallel_for);
  return out;
}

template <class T>
bool same_bits(const Memory<T>& a, const Memory<T>& b) {
  return a.size() == b.size() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class R>
bool same_bits(const Result<R>& a, const Result<R>& b) {
  return same_bits(a.nll, b.nll) && same_bits(a.transitions, b.transitions) && same_bits(a.start, b.start) &&
         same_bits(a.end, b.end) && same_bits(a.emissions, b.emissions);
}

// ---- likelihood and gradients -----------------------------------------------------------------------------

// How far a value of the type may be from the number that was rounded to it, relative.
double rounding(Type type) { return type == Type::bf16 ? 0x1p-8 : type == Type::f16 ? 0x1p-11 : 0x1p-24; }

bool near(double got, double want, double tolerance) {
  if (std::isnan(want) || std::isinf(want)) return std::isnan(want) ? std::isnan(got) : got == want;
  return std::abs(got - want) <= tolerance;
}

// `count` is how many marginals were added up, weighted: what the sums' rounding is relative to, not what is
// left of them once the gold path is taken away.
void check_parameter(const char* what, const Memory<float>& got, const Memory<double>& want, double count) {
  for (int64_t i = 0; i < want.size(); ++i) {
    if (near(got[i], want[i], 2e-5 * count)) continue;
    if (report(__FILE__, __LINE__))
      std::printf("gradient of %s[%d] is %.9g, wanted %.9g\n", what, int(i), got[i], want[i]);
  }
}

void check_emissions(const Problem& p, const View& view, const Result<float>& got, const View& exact_view,
                     const Result<double>& want) {
  std::vector<double> g(p.K), w(p.K);
  std::vector<bool> written(got.emissions.size());
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = 0; t < p.T; ++t) {
      load_row(view.emissions(p, got.emissions.data()), b, t, g.data());
      load_row(exact_view.emissions(p, want.emissions.data()), b, t, w.data());
      const int64_t at = (b * view.stride_b + t * view.stride_t) * bytes(view.type);
      std::fill_n(written.begin() + at, p.K * bytes(view.type), true);
      for (int64_t k = 0; k < p.K; ++k) {
        if (near(g[k], w[k], 1e-5 + rounding(view.type) * std::abs(w[k]))) continue;
        if (report(__FILE__, __LINE__))
          std::printf("gradient of emissions[%d,%d,%d] is %.9g, wanted %.9g\n", int(b), int(t), int(k), g[k],
                      w[k]);
      }
    }
  }
  for (int64_t i = 0; i < got.emissions.size(); ++i) CHECK(written[i] || got.emissions[i] == kUntouched);
}

void check_nll(const Problem& p, const View& view) {
  const Result<float> got = run_nll<float>(p, view, serial_for);
  const View exact_view = view.exactly(p);
  const Result<double> want = run_nll<double>(p, exact_view, serial_for);
  for (int64_t b = 0; b < p.B; ++b) {
    if (near(got.nll[b], want.nll[b], 1e-5 + 1e-6 * std::abs(want.nll[b]))) continue;
    if (report(__FILE__, __LINE__))
      std::printf("nll[%d] is %.9g, wanted %.9g\n", int(b), got.nll[b], want.nll[b]);
  }
  check_emissions(p, view, got, exact_view, want);
  double rows = 1, steps = 1;
  for (int64_t b = 0; b < p.B; ++b) {
    const double weight = kScale * (p.weighted ? std::abs(p.weights[b]) : 1);
    rows += weight, steps += weight * double(p.rows.length(b));
  }
  check_parameter("transitions", got.transitions, want.transitions, steps);
  check_parameter("start", got.start, want.start, rows);
  check_parameter("end", got.end, want.end, rows);
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

// ---- what a scaled domain can lose ------------------------------------------------------------------------

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Two groups of tags, the first and the rest, with no way from one to the other.
void part(Problem& p) {
  for (int64_t k = 1; k < p.K; ++k) p.transitions[k] = p.transitions[k * p.K] = kNever;
}

// The first tag is `lead` nats ahead of all others, in one step or over all of them, and then it is
// forbidden: at the last position, or by the end. What is left are paths that had fallen behind.
void test_lost_paths(int64_t K) {
  for (float lead : {20.f, 61.f, 64.f, 86.f, 100.f, 1000.f}) {
    for (int way = 0; way < 8; ++way) {
      Problem p(9, 40, K, Mask(way % 3), unsigned(K + way));
      part(p);
      for (int64_t b = 0; b < p.B; b += 2) {
        const int64_t L = p.rows.length(b);
        for (int64_t l = 0; l < L; ++l)
          if (way % 2 == 0 || l == L / 2) p.at(b, l, 0) += way % 2 ? lead : lead / float(L);
        if (L > 1 && way / 2 % 2) p.at(b, L - 1, 0) = kNever;
      }
      if (way / 2 % 2 == 0) p.end[0] = kNever;
      if (way >= 4) p.start[0] = 0;
      check(p, Type::f32, Layout::dense,
            "lost path, lead " + std::to_string(lead) + ", way " + std::to_string(way));
    }
  }
}

// The other tags are far behind at the start, and again at the end, and make up for it in the middle:
// forwards they are lost at the start, backwards at the end, and they hold about half of the probability.
void test_lost_at_both_ends(int64_t K) {
  for (float lead : {10.f, 30.f, 63.f, 100.f, 1000.f}) {
    for (int64_t spread : {1, 5, 10}) {
      Problem p(9, 30, K, Mask::none, unsigned(K + spread));
      part(p);
      for (int64_t b = 0; b < p.B; ++b) {
        for (int64_t t = 0; t < spread; ++t) {
          const float step = (b % 2 ? lead : -lead) / float(spread);
          p.at(b, t, 0) += step;
          p.at(b, 14 - spread / 2 + t, 0) -= 2 * step;
          p.at(b, 29 - t, 0) += step;
        }
        p.at(b, 12, 0) += 1.5f * float(p.T);  // about what the others have for being many
      }
      check(p, Type::f32, Layout::dense,
            "lost at both ends, lead " + std::to_string(lead) + ", over " + std::to_string(spread));
    }
  }
}

void test_constraints(int64_t K) {
  for (float never : {kNever, -1e4f, -100.f, -50.f}) {
    const std::string what = "constraints " + std::to_string(never);
    for (Mask mask : {Mask::none, Mask::right, Mask::holes}) {
      Problem bio(17, 12, K, mask, unsigned(K));  // O, then B I B I ...: only B or I of a kind lead to its I
      for (int64_t to = 2; to < K; to += 2) {
        bio.start[to] = never;
        for (int64_t from = 0; from < K; ++from)
          if (from != to && from != to - 1) bio.transitions[from * K + to] = never;
      }
      check(bio, Type::f32, Layout::dense, "BIO " + what);
      for (int64_t& y : bio.tags) y = y > 0 && y % 2 == 0 ? 0 : y;  // gold that is possible
      check(bio, Type::f16, Layout::dense, "BIO, possible, " + what);

      Problem ends(17, 12, K, mask,
                   unsigned(K));  // nothing leads to START = K-1, nothing goes on from STOP = K-2
      for (int64_t k = 0; K > 2 && k < K; ++k) {
        ends.transitions[k * K + K - 1] = ends.transitions[(K - 2) * K + k] = never;
        ends.start[k] = k == K - 1 ? 0 : never;
        ends.end[k] = k == K - 2 ? 0 : never;
      }
      check(ends, Type::f32, Layout::padded, "START and STOP, " + what);

      Problem chain(17, 12, K, mask, unsigned(K));  // one successor each
      for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < K; ++j)
          if (j != (i + 1) % K) chain.transitions[i * K + j] = never;
      check(chain, Type::f32, Layout::transposed, "chain, " + what);
    }
  }
}

void test_extreme_emissions(int64_t K) {
  for (int way = 0; way < 6; ++way) {
    Problem p(17, 12, K, Mask(way % 4), unsigned(K + way));
    std::mt19937 random{unsigned(way)};
    for (float& x : p.x) {
      const unsigned dice = random() % 4;
      if (way == 0 || way == 5) x = dice < 2 ? x : dice == 2 ? 1e4f : -1e4f;
      if (way == 1) x = dice ? x : kNever;
      if (way == 2) x = dice ? kNever : x;  // some positions have nothing left: their rows are dead
      if (way == 3) x = x * 100;
      if (way == 4) x = dice < 2 ? kNever : dice == 2 ? 1e4f : -1e4f;
    }
    if (way == 5) p.forbid_some_edges();
    check(p, Type::f32, Layout::dense, "extreme emissions " + std::to_string(way));
    if (way < 2) check(p, Type::bf16, Layout::padded, "extreme emissions " + std::to_string(way));
  }
  Problem dead(9, 6, K, Mask::none, 3);
  std::fill(dead.start.begin(), dead.start.end(), kNever);
  check(dead, Type::f32, Layout::dense, "no start");
  Problem edgeless(9, 6, K, Mask::right, 4);
  std::fill(edgeless.transitions.begin(), edgeless.transitions.end(), kNever);
  check(edgeless, Type::f32, Layout::dense, "no transitions");
  Problem far(9, 6, K, Mask::right, 5);
  for (auto* parameter : {&far.transitions, &far.start, &far.end})
    for (float& value : *parameter) value = value * 10 - 1e4f;
  check(far, Type::f32, Layout::dense, "far parameters");
}

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
    test_lost_paths(K);
    test_lost_at_both_ends(K);
  }
  for (int64_t K : {1, 2, 3, 9, 17, 32, 33, 65}) {
    test_constraints(K);
    test_extreme_emissions(K);
    test_ties(K);
    test_ruling_out(K);
    test_poison(K);
  }
  test_concurrent_calls();
  return summary("crf");
}
