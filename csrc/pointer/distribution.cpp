// The mixture, its gradient, and the best words of it, a row (b, t) at a time; rows are dealt to threads.
//
// Cost of a row, for s bytes a logit and r a result. Memory beyond the last-level cache: the mixture reads
// the logits once and writes the output once, (s + r) V bytes; the gradient reads logits and grad once, and
// writes once, (2 s + r) V bytes; the search reads the logits once. A row is gone through twice, but from the
// cache the second time (V = 50k floats are 200 KB). Arithmetic: two exponentials a word, of about 20
// operations each, which is less than the memory takes; and O(S) for the copies. The source words are sorted
// once for all T rows of b.
#include "distribution.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../common/half.h"
#include "../common/simd.h"
#include "../crf/log_domain.h"
#include "distribution_row.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

using pointer::Candidates;
using pointer::Mixture;
using pointer::MixtureGradients;
using pointer::SourceWords;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

double log_add(double a, double b) {
  const double top = std::max(a, b), low = std::min(a, b);
  return low == -INFINITY ? top : top + std::log1p(std::exp(low - top));
}

// The copy mass of each word of one row, and its poison: 0, or NaN if a position that is there has NaN or an
// infinity.
template <class R>
class Mass {
 public:
  Mass(const SourceWords& source, int64_t b, const R* attention)
      : count_(source.count(b)), words_(source.words.data() + source.first[b]) {
    mass_.resize(count_);
    const int64_t* begin = source.begin.data() + source.first[b];
    for (int64_t w = 0; w < count_; ++w) {
      double sum = 0;
      for (int64_t i = begin[w]; i < begin[w + 1]; ++i) sum += double(attention[source.order[i]]);
      mass_[w] = sum;
      poison_ += sum * 0;
    }
  }
  int64_t count() const { return count_; }
  int64_t word(int64_t w) const { return words_[w]; }
  double operator[](int64_t w) const { return mass_[w]; }
  double poison() const { return poison_; }
  bool has(int64_t word) const { return std::binary_search(words_, words_ + count_, word); }

 private:
  int64_t count_;
  const int64_t* words_;
  std::vector<double> mass_;
  double poison_ = 0;
};

template <class R>
void mixture_row(const Mixture<R>& m, const SourceWords& source, int64_t b, int64_t t, R* final) {
  const int64_t V = m.logits.K, words = V + m.num_oov;
  const Mass<R> mass(source, b, m.attention + b * m.attention_b + t * m.attention_t);
  const LogitRow<R> z(m.logits, b, t);
  const Softmax<R> softmax = sum_up(z, [](int64_t, int64_t, const R*) {});
  const double g = double(m.gate[b * m.logits.T + t]);
  const double generate = sigmoid(g) / (softmax.total + mass.poison()), copy = sigmoid(-g);
  const R poison = R((generate + copy) * 0);  // 0, or NaN

  R piece[kPiece];
  for (int64_t begin = 0, w = 0; begin < words; begin += kPiece) {
    const int64_t end = std::min(begin + kPiece, words),
                  in_vocabulary = std::clamp<int64_t>(V - begin, 0, end - begin);
    z.powers(begin, in_vocabulary, softmax.shift, piece);
    const R scale = R(generate);
    for (int64_t i = 0; i < in_vocabulary; ++i) piece[i] *= scale;
    std::fill(piece + in_vocabulary, piece + (end - begin), poison);
    for (; w < mass.count() && mass.word(w) < end; ++w) piece[mass.word(w) - begin] += R(copy * mass[w]);
    std::copy_n(piece, end - begin, final + begin);
  }
}

template <class R>
void gradient_row(const Mixture<R>& m, const R* grad, const MixtureGradients<R>& to, int64_t b, int64_t t) {
  const int64_t V = m.logits.K, n = b * m.logits.T + t;
  const R* attention = m.attention + b * m.attention_b + t * m.attention_t;
  const int64_t* ids = m.source_ids + b * m.S;
  const LogitRow<R> z(m.logits, b, t);
  Softmax<R> softmax = sum_up(z, [](int64_t, int64_t, const R*) {}, grad);
  double copied = 0;
  for (int64_t i = 0; i < m.S; ++i)
    if (ids[i] >= 0) copied += double(attention[i]) * double(grad[ids[i]]);
  const double g = double(m.gate[n]), generate = sigmoid(g), copy = sigmoid(-g);
  const double mean = softmax.dot / softmax.total, rest = mean - copied;
  const R poison = R(rest * generate * 0);  // 0, or NaN

  R piece[kPiece];
  const R scale = R(generate / softmax.total), middle = R(mean);
  for (int64_t begin = 0; begin < V; begin += kPiece) {
    const int64_t size = std::min(kPiece, V - begin);
    z.powers(begin, size, softmax.shift, piece);
    for (int64_t i = 0; i < size; ++i) piece[i] = scale * piece[i] * (grad[begin + i] - middle) + poison;
    crf::store_row(m.logits.type, to.logits, n * V + begin, size, piece);
  }
  for (int64_t i = 0; i < m.S; ++i)
    to.attention[n * m.S + i] = ids[i] >= 0 ? R(copy * double(grad[ids[i]])) + poison : R(0);
  to.gate[n] = R(generate * copy * rest) + poison;
}

// ---- the best words --------------------------------------------------------------------------------------

struct Word {
  double score;
  int64_t id;
};

// Whether a comes before b: the better first, and of equal ones the smaller.
bool before(const Word& a, const Word& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

// The k best of what is offered in the order of ids.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { heap_.reserve(k); }

  template <class R>
  void offer(int64_t begin, int64_t size, const R* z) {
    for (int64_t i = 0; i < size; ++i) {
      if (full() && !(z[i] > worst_)) continue;  // an equal one came earlier, and has the smaller id
      if (full()) std::pop_heap(heap_.begin(), heap_.end(), before), heap_.pop_back();
      heap_.push_back({z[i] == z[i] ? double(z[i]) : -INFINITY, begin + i});
      std::push_heap(heap_.begin(), heap_.end(), before);
      worst_ = heap_.front().score;
    }
  }
  // Whether a piece with this greatest element can have one of the best.
  bool wants(double greatest) const { return !full() || greatest > worst_; }
  const std::vector<Word>& words() const { return heap_; }

 private:
  bool full() const { return int64_t(heap_.size()) == k_; }
  int64_t k_;
  double worst_ = -INFINITY;
  std::vector<Word> heap_;  // the last of the order on top
};

template <class R>
void best_words(const Candidates<R>& c, const SourceWords& source, int64_t row, int64_t k, R* values,
                int64_t* ids) {
  const int64_t n = c.begin + row, b = n / c.T;
  const Mass<R> mass(source, b, c.attention + n * c.S);
  const LogitRow<R> z({c.logits, c.type, 1, c.N, c.V, 0, c.V}, 0, row, c.bias);
  Best best(k);
  const Softmax<R> softmax = sum_up(z, [&](int64_t begin, int64_t size, const R* piece) {
    if (best.wants(double(greatest(piece, size)))) best.offer(begin, size, piece);
  });
  const double g = double(c.gate[n]), lse = double(softmax.shift) + std::log(softmax.total);
  if (!std::isfinite(lse + mass.poison()) || g != g) {
    for (int64_t i = 0; i < k; ++i) values[i] = std::numeric_limits<R>::quiet_NaN(), ids[i] = i;
    return;
  }
  const double generate = log_sigmoid(g), copy = log_sigmoid(-g);
  std::vector<Word> found;
  for (const Word& word : best.words())
    if (!mass.has(word.id)) found.push_back({generate + (word.score - lse), word.id});
  for (int64_t w = 0; w < mass.count(); ++w) {
    const int64_t id = mass.word(w);
    const double generated = id < c.V ? generate + (double(z[id]) - lse) : -INFINITY;
    found.push_back({log_add(generated, copy + std::log(mass[w])), id});
  }
  std::partial_sort(found.begin(), found.begin() + k, found.end(), before);
  for (int64_t i = 0; i < k; ++i) values[i] = R(found[i].score), ids[i] = found[i].id;
}

}  // namespace

template <class R>
void pointer_distribution(const Mixture<R>& m, R* final, const ParallelFor& parallel) {
  const int64_t T = m.logits.T, words = m.logits.K + m.num_oov;
  const SourceWords source(m.source_ids, m.logits.B, m.S);
  run_tasks(parallel, m.logits.B * T,
            [&](int64_t n) { mixture_row(m, source, n / T, n % T, final + n * words); });
}

template <class R>
void pointer_distribution_grad(const Mixture<R>& m, const R* grad, int64_t grad_b, int64_t grad_t,
                               const MixtureGradients<R>& to, const ParallelFor& parallel) {
  const int64_t T = m.logits.T;
  run_tasks(parallel, m.logits.B * T,
            [&](int64_t n) { gradient_row(m, grad + n / T * grad_b + n % T * grad_t, to, n / T, n % T); });
}

template <class R>
void pointer_topk(const Candidates<R>& c, int64_t k, R* values, int64_t* ids, const ParallelFor& parallel) {
  const SourceWords source(c.source_ids, c.B, c.S);
  run_tasks(parallel, c.N,
            [&](int64_t row) { best_words(c, source, row, k, values + row * k, ids + row * k); });
}

template void pointer_distribution(const Mixture<float>&, float*, const ParallelFor&);
template void pointer_distribution(const Mixture<double>&, double*, const ParallelFor&);
template void pointer_distribution_grad(const Mixture<float>&, const float*, int64_t, int64_t,
                                        const MixtureGradients<float>&, const ParallelFor&);
template void pointer_distribution_grad(const Mixture<double>&, const double*, int64_t, int64_t,
                                        const MixtureGradients<double>&, const ParallelFor&);
template void pointer_topk(const Candidates<float>&, int64_t, float*, int64_t*, const ParallelFor&);
template void pointer_topk(const Candidates<double>&, int64_t, double*, int64_t*, const ParallelFor&);

}  // namespace fastseq::FASTSEQ_ISA
