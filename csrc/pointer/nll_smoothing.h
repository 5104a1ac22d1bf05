// Label smoothing over the mixture: only the words of a sentence's source differ from the vocabulary's share,
// so sum_v log p(v) is a sum of logits and a correction at each of those words.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "nll.h"

namespace fastseq::pointer {

inline double log_sigmoid(double x) {
  return x >= 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x));
}

inline double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  if (std::isnan(a) || std::isnan(b)) return a + b;
  return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// The words of one sentence's source that are in the vocabulary, each once, ascending; of each its positions.
struct SourceWords {
  std::vector<int64_t> ids, begin,
      positions;          // word k is at positions[begin[k]] ... positions[begin[k + 1] - 1]
  int64_t forbidden = 0;  // of the words, those with a bias of -inf

  template <class R>
  SourceWords(const Nll<R>& p, int64_t b) {
    const auto id = [&](int64_t s) { return p.source[b * p.source_b + s * p.source_s]; };
    for (int64_t s = 0; s < p.S; ++s)
      if (id(s) >= 0 && id(s) < p.V) positions.push_back(s);
    std::stable_sort(positions.begin(), positions.end(), [&](int64_t i, int64_t j) { return id(i) < id(j); });
    for (int64_t i = 0; i < int64_t(positions.size()); ++i)
      if (i == 0 || id(positions[i]) != ids.back()) ids.push_back(id(positions[i])), begin.push_back(i);
    begin.push_back(int64_t(positions.size()));
    if (p.bias)
      for (const int64_t word : ids) forbidden += p.bias[word] == -INFINITY;
  }

  int64_t count() const { return int64_t(ids.size()); }
};

// What a row knows of its gate and its softmax.
struct Mixing {
  double log_gate, log_not_gate, lse;
};

// The smoothing term of one row: value = -(1/V) sum_v log p(v); generated, the mean over all words of the
// probability that the word was generated and not copied.
class SmoothedRow {
 public:
  // `logits`: of the source's words, `stride` apart; `logit_sum`: of all words that are not forbidden, of
  // which there are `forbidden`.
  template <class R>
  SmoothedRow(const Nll<R>& p, const SourceWords& words, const R* copy, const R* logits, int64_t stride,
              double logit_sum, int64_t forbidden, const Mixing& mixing)
      : words_(words), log_p_(words.count()), copied_(words.count()) {
    double rest = logit_sum, sum = 0, copied = 0;
    for (int64_t k = 0; k < words.count(); ++k) {
      double mass = 0;
      for (int64_t i = words.begin[k]; i < words.begin[k + 1]; ++i) mass += copy[words.positions[i]];
      const double z = logits[k * stride], own = mixing.log_gate + (z - mixing.lse);
      if (!p.bias || p.bias[words.ids[k]] != -INFINITY) rest -= z;
      log_p_[k] = log_add(own, mixing.log_not_gate + std::log(mass));
      copied_[k] = 1 - std::exp(own - log_p_[k]);
      sum += log_p_[k], copied += copied_[k];
    }
    const double V = double(p.V), others = V - double(words.count());
    if (forbidden > words.forbidden) rest = -INFINITY;
    value = -(others * (mixing.log_gate - mixing.lse) + rest + sum) / V;
    generated = 1 - copied / V;
  }

  // Adds the term's gradient to that of the attention, and turns the logits of the source's words into what
  // must be added to the gradient of theirs; `each` is the row's weight times the share of one word, 0 for no
  // gradient.
  template <class R>
  void differentiate(double each, double log_not_gate, R* grad_copy, R* logits, int64_t stride) const {
    for (int64_t k = 0; k < words_.count(); ++k) {
      logits[k * stride] = each != 0 ? R(each * copied_[k]) : 0;
      if (each == 0) continue;
      const R pull = R(each * std::exp(log_not_gate - log_p_[k]));
      for (int64_t i = words_.begin[k]; i < words_.begin[k + 1]; ++i) grad_copy[words_.positions[i]] -= pull;
    }
  }

  double value, generated;

 private:
  const SourceWords& words_;
  std::vector<double> log_p_, copied_;
};

}  // namespace fastseq::pointer
