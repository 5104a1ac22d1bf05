// The rows' part of the negative log-likelihood: which rows need the vocabulary, what each row can copy, and
// how the two are mixed. In float64, O(S) a row; the vocabulary's part, which is all of the cost, is
// nll_tiles.cpp.
#include "nll.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "nll_smoothing.h"
#include "nll_tiles.h"

namespace fastseq::pointer {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

struct Row {
  int64_t b, t, y;
  double weight;
  double mass = kNothing;        // log of what can be copied of the target; for CopyNet, of its exponentials
  double everything = kNothing;  // for CopyNet: of all exponentials
  double value = 0;
};

struct LogSum {
  double top = kNothing, sum = 0;
  void add(double x) {
    if (x == kNothing) return;
    if (x > top) sum *= std::exp(top - x), top = x;
    sum += std::exp(x - top);
  }
  // Of +inf or NaN: NaN.
  double log() const { return top == kNothing && sum == 0 ? kNothing : top + std::log(sum); }
};

template <class R>
class Loss {
 public:
  Loss(const Nll<R>& problem, const NllGradients<R>* gradients, const ParallelFor& parallel)
      : p(problem), g(gradients), parallel(parallel), smoothing_(p.smoothing != 0 && p.V > 0) {}

  // Values (B,T), or null.
  void run(R* values) {
    clear();
    find_rows();
    run_tasks(parallel, tasks(int64_t(rows_.size())), [&](int64_t task) {
      for_task(task, int64_t(rows_.size()), [&](int64_t i) {
        copy_part(rows_[i]);
        if (through_[i] < 0) finish(rows_[i], -1);
      });
    });
    go_through_vocabulary();
    double total = 0;
    for (const Row& row : rows_) {
      total += row.weight * row.value;
      if (values) values[row.b * p.T + row.t] = R(row.value);
    }
    if (g) *g->total = R(total);
  }

 private:
  static constexpr int64_t kTask = 8;  // rows
  static int64_t tasks(int64_t n) { return (n + kTask - 1) / kTask; }
  template <class F>
  static void for_task(int64_t task, int64_t n, const F& f) {
    for (int64_t i = task * kTask; i < std::min(n, (task + 1) * kTask); ++i) f(i);
  }

  void clear() const {
    if (!g) return;
    if (p.B * p.T * p.H > 0) std::memset(g->hidden, 0, p.B * p.T * p.H * bytes(p.hidden_type));
    std::fill_n(g->copy, p.B * p.T * p.S, R(0));
    if (p.gate) std::fill_n(g->gate, p.B * p.T, R(0));
  }

  bool needs_vocabulary(const Row& row) const {
    return !p.gate || row.y < p.V || smoothing_ || p.z_loss != 0;
  }

  void find_rows() {
    for (int64_t b = 0; b < p.B; ++b) {
      first_.push_back(int64_t(needed_.size()));
      for (int64_t t = 0; t < p.T; ++t) {
        const int64_t y = p.target[b * p.target_b + t * p.target_t];
        const double weight = g && g->weights ? double(g->weights[b * p.T + t]) : 1;
        if (y == p.ignore_index || weight == 0) continue;
        rows_.push_back({b, t, y, weight});
        const bool through = needs_vocabulary(rows_.back());
        through_.push_back(through ? int64_t(needed_.size()) : -1);
        if (through) needed_.push_back(int64_t(rows_.size()) - 1);
      }
    }
    first_.push_back(int64_t(needed_.size()));
  }

  const R* copy_of(const Row& row) const { return p.copy + row.b * p.copy_b + row.t * p.copy_t; }

  void copy_part(Row& row) const {
    const R* copy = copy_of(row);
    const int64_t* source = p.source + row.b * p.source_b;
    if (p.gate) {
      double mass = 0;
      for (int64_t s = 0; s < p.S; ++s)
        if (source[s * p.source_s] == row.y) mass += copy[s];
      row.mass = std::isinf(mass) ? NAN : std::log(mass);
      return;
    }
    LogSum target, all;
    for (int64_t s = 0; s < p.S; ++s) {
      if (source[s * p.source_s] >= 0) all.add(copy[s]);
      if (source[s * p.source_s] == row.y) target.add(copy[s]);
    }
    row.mass = target.log(), row.everything = all.log();
  }

  // ---- the vocabulary ------------------------------------------------------------------------------------

  void go_through_vocabulary() {
    if (g && needed_.empty()) {
      if (p.V * p.H > 0) std::memset(g->weight, 0, p.V * p.H * bytes(p.weight_type));
      if (p.bias) std::fill_n(g->bias, p.V, R(0));
    }
    if (needed_.empty()) return;
    hand_over_rows();
    if (smoothing_) hand_over_sources();
    FASTSEQ_SELECT(run_tiles<R>)(tiles_, [&] { finish_rows(); }, parallel);
  }

  void hand_over_rows() {
    tiles_.N = int64_t(needed_.size()), tiles_.H = p.H, tiles_.V = p.V;
    tiles_.hidden = p.hidden, tiles_.hidden_type = p.hidden_type;
    tiles_.weight = p.weight, tiles_.weight_type = p.weight_type, tiles_.bias = p.bias;
    tiles_.sum_logits = smoothing_, tiles_.gradient = g != nullptr;
    for (int64_t n = 0; n < tiles_.N; ++n) {
      const Row& row = rows_[needed_[n]];
      tiles_.hidden_at.push_back(row.b * p.hidden_b + row.t * p.hidden_t);
      tiles_.flat.push_back(row.b * p.T + row.t);
      if (row.y < p.V) tiles_.targets.push_back({row.y, n});
    }
    std::sort(tiles_.targets.begin(), tiles_.targets.end(), [](const TargetWord& a, const TargetWord& b) {
      return a.word != b.word ? a.word < b.word : a.row < b.row;
    });
    tiles_.largest.resize(tiles_.N), tiles_.target_logit.resize(tiles_.N), tiles_.sum.resize(tiles_.N);
    tiles_.logit_sum.resize(smoothing_ ? tiles_.N : 0);
    if (!g) return;
    tiles_.scale.resize(tiles_.N), tiles_.shift.resize(tiles_.N), tiles_.at_target.resize(tiles_.N);
    tiles_.grad_hidden = g->hidden, tiles_.grad_weight = g->weight;
    tiles_.grad_bias = p.bias ? g->bias : nullptr;
  }

  // The logits of sentence b's words: word k of its row i at logits_[begin_[b] + k * (rows of b) + i].
  void hand_over_sources() {
    int64_t size = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      words_.emplace_back(p, b);
      begin_.push_back(size);
      size += words_[b].count() * rows_of(b);
    }
    logits_.resize(size);
    for (int64_t b = 0; b < p.B; ++b)
      for (int64_t k = 0; k < words_[b].count(); ++k)
        tiles_.sources.push_back(
            {words_[b].ids[k], first_[b], rows_of(b), logits_.data() + begin_[b] + k * rows_of(b)});
    std::stable_sort(tiles_.sources.begin(), tiles_.sources.end(),
                     [](const SourceWord<R>& a, const SourceWord<R>& b) { return a.word < b.word; });
    if (p.bias)
      for (int64_t v = 0; v < p.V; ++v) forbidden_ += p.bias[v] == -INFINITY;
  }

  int64_t rows_of(int64_t b) const { return first_[b + 1] - first_[b]; }

  // ---- mixing --------------------------------------------------------------------------------------------

  void finish_rows() {
    run_tasks(parallel, tasks(tiles_.N), [&](int64_t task) {
      for_task(task, tiles_.N, [&](int64_t n) { finish(rows_[needed_[n]], n); });
    });
  }

  // The value of a row and the gradients that are its own; n: its place in the tiles, or -1.
  void finish(Row& row, int64_t n) {
    Mixing mixing{0, 0, 0};
    if (n >= 0) mixing.lse = tiles_.sum[n] == 0 ? NAN : double(tiles_.largest[n]) + std::log(tiles_.sum[n]);
    double gate, mass = row.mass;
    if (p.gate) {
      gate = p.gate[row.b * p.gate_b + row.t * p.gate_t];
    } else {  // the gate that the joint softmax comes to, and the mass as a share of all that can be copied
      gate = mixing.lse - row.everything;
      if (mass != kNothing) mass -= row.everything;
    }
    mixing.log_gate = log_sigmoid(gate), mixing.log_not_gate = log_sigmoid(-gate);
    const bool known = n >= 0 && row.y < p.V;
    double own = kNothing;
    if (known) own = mixing.log_gate + (tiles_.target_logit[n] - mixing.lse);
    const double log_p = log_add(own, mixing.log_not_gate + mass);
    own = known ? std::exp(own - log_p) : 0;
    row.value = -log_p;
    if (!smoothing_) {
      if (p.z_loss != 0) row.value += p.z_loss * mixing.lse * mixing.lse;
      return differentiate(row, n, mixing, log_p, own, own, gate);
    }
    R* logits = logits_.data() + begin_[row.b] + (n - first_[row.b]);
    const SmoothedRow smoothed(p, words_[row.b], copy_of(row), logits, rows_of(row.b), tiles_.logit_sum[n],
                               forbidden_, mixing);
    row.value = (1 - p.smoothing) * row.value + p.smoothing * smoothed.value;
    if (p.z_loss != 0) row.value += p.z_loss * mixing.lse * mixing.lse;
    differentiate(row, n, mixing, log_p, own, (1 - p.smoothing) * own + p.smoothing * smoothed.generated,
                  gate);
    if (g) smoothed.differentiate(share(row), mixing.log_not_gate, grad_copy(row), logits, rows_of(row.b));
  }

  R* grad_copy(const Row& row) const { return g->copy + (row.b * p.T + row.t) * p.S; }

  static bool dead(const Row& row) { return row.value == std::numeric_limits<double>::infinity(); }

  // Of label smoothing's weight, what one word has; 0 where the row has no gradient.
  double share(const Row& row) const {
    return smoothing_ && !dead(row) ? row.weight * p.smoothing / double(p.V) : 0;
  }

  // own: the probability that the target was generated and not copied; generated: the same with label
  // smoothing.
  void differentiate(const Row& row, int64_t n, const Mixing& mixing, double log_p, double own,
                     double generated, double gate) {
    if (!g) return;
    if (dead(row)) {
      if (n >= 0) tiles_.scale[n] = tiles_.shift[n] = tiles_.at_target[n] = 0;
      return;
    }
    const double w = row.weight, target = w * (1 - p.smoothing);
    if (n >= 0) {
      double pull = p.gate ? generated : std::exp(mixing.log_gate);
      if (p.z_loss != 0) pull += 2 * p.z_loss * mixing.lse;
      const double alpha = w * pull;
      tiles_.scale[n] = R(alpha / tiles_.sum[n]), tiles_.shift[n] = R(share(row));
      // alpha * softmax - target * own, where both may be nearly the same
      tiles_.at_target[n] =
          R(alpha * std::expm1(tiles_.target_logit[n] - mixing.lse) + (alpha - target * own) - share(row));
    }
    copy_gradient(row, mixing, log_p, target);
    if (p.gate) g->gate[row.b * p.T + row.t] = R(w * (1 / (1 + std::exp(-gate)) - generated));
  }

  void copy_gradient(const Row& row, const Mixing& mixing, double log_p, double target) const {
    const int64_t* source = p.source + row.b * p.source_b;
    R* out = grad_copy(row);
    if (p.gate) {
      const R pull = R(-target * std::exp(mixing.log_not_gate - log_p));
      for (int64_t s = 0; s < p.S; ++s)
        if (source[s * p.source_s] == row.y) out[s] = pull;
      return;
    }
    const R* scores = copy_of(row);
    const double all = mixing.lse - mixing.log_gate;  // log of all that is summed, in both branches
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t word = source[s * p.source_s];
      if (word < 0) continue;
      const double score = scores[s] - all;
      double pull = std::exp(score);
      if (word == row.y) pull -= std::exp(score - log_p);
      out[s] = R(row.weight * pull);
    }
  }

  const Nll<R>& p;
  const NllGradients<R>* g;
  const ParallelFor& parallel;
  const bool smoothing_;
  std::vector<Row> rows_;                // those that have a part
  std::vector<int64_t> through_;         // of each, its place among those that need the vocabulary, or -1
  std::vector<int64_t> needed_, first_;  // those; first_[b] .. first_[b + 1] are sentence b's
  Tiles<R> tiles_;
  std::vector<SourceWords> words_;
  std::vector<int64_t> begin_;
  std::vector<R> logits_;
  int64_t forbidden_ = 0;
};

}  // namespace

template <class R>
void nll(const Nll<R>& problem, R* values, const ParallelFor& parallel_for) {
  std::fill_n(values, problem.B * problem.T, R(0));
  Loss<R>(problem, nullptr, parallel_for).run(values);
}

template <class R>
void nll_grad(const Nll<R>& problem, const NllGradients<R>& gradients, const ParallelFor& parallel_for) {
  Loss<R>(problem, &gradients, parallel_for).run(nullptr);
}

template void nll<float>(const Nll<float>&, float*, const ParallelFor&);
template void nll<double>(const Nll<double>&, double*, const ParallelFor&);
template void nll_grad<float>(const Nll<float>&, const NllGradients<float>&, const ParallelFor&);
template void nll_grad<double>(const Nll<double>&, const NllGradients<double>&, const ParallelFor&);

}  // namespace fastseq::pointer
