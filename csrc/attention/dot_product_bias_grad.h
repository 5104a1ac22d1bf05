// The gradient of a bias that may be broadcast over sequences, heads, queries or keys. Tasks (a sequence and
// a head of keys each) that share a part of it are dealt to a few copies, which are added up in the end, in
// order; how many is a matter of sizes alone, so that the sum does not depend on the threads. Memory: a
// copy less than there are where the bias is of R.
#pragma once
#include "dot_product_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class R>
class BiasGradient {
  static constexpr int64_t kTasks = 16;  // as many as copies must make possible
  static constexpr int64_t kReduced = 4096;

 public:
  BiasGradient(const Problem& problem, const fastseq::attention::Backward& gradients)
      : p(problem),
        out(gradients),
        wanted(out.dbias != nullptr),
        n_parts(wanted ? out.bias_n : p.N),
        h_parts(wanted && out.bias_h == 1 ? 1 : p.key_heads),
        sharing(n_parts * h_parts == 0 ? 0 : p.N * p.key_heads / (n_parts * h_parts)),
        copies(std::clamp<int64_t>((kTasks + n_parts * h_parts - 1) / std::max<int64_t>(1, n_parts * h_parts),
                                   1, std::max<int64_t>(1, sharing))),
        part_size(wanted && h_parts ? out.bias_h / h_parts * out.bias_i * out.bias_j : 0),
        size(n_parts * h_parts * part_size),
        in_place(wanted && (p.bias.type == Type::f64) == std::is_same_v<R, double> &&
                 (p.bias.type == Type::f32 || p.bias.type == Type::f64)),
        memory((copies - in_place) * size),
        first(in_place ? static_cast<R*>(out.dbias) : static_cast<R*>(memory)),
        rest(in_place ? static_cast<R*>(memory) : memory + size) {}

  int64_t tasks() const { return n_parts * h_parts * copies; }

  // f(sequence, head of keys, where its part of the gradient begins or null)
  template <class F>
  void for_heads(int64_t task, const F& f) const {
    const int64_t part = task / copies;
    R* at = wanted ? place(task) : nullptr;
    if (at) std::fill_n(at, part_size, R(0));
    for (int64_t m = task % copies; m < sharing; m += copies) {
      const int64_t heads = p.key_heads / h_parts;  // in a part
      const int64_t n = n_parts == p.N ? part / h_parts : m / heads;
      f(n, h_parts == 1 ? m % p.key_heads : part % h_parts, at);
    }
  }

  // Adds what the scores of query i of the part's query head g, keys `columns`, have as gradient.
  void add(R* part, int64_t g, int64_t i, Range columns, const R* d) const {
    R* at = part + ((out.bias_h > 1 ? g : 0) * out.bias_i + (out.bias_i > 1 ? i : 0)) * out.bias_j;
    if (out.bias_j == 1) {
      R sum = 0;
      for (int64_t c = 0; c < columns.size(); ++c) sum += d[c];
      at[0] += sum;
    } else {
      at += columns.begin;
      for (int64_t c = 0; c < columns.size(); ++c) at[c] += d[c];
    }
  }

  void finish(const ParallelFor& parallel) const {
    if (!wanted || (in_place && copies == 1)) return;
    run_tasks(parallel, (size + kReduced - 1) / kReduced, [&](int64_t task) {
      const int64_t begin = task * kReduced, count = std::min(kReduced, size - begin);
      R* sums = first + begin;
      for (int64_t c = 1; c < copies; ++c) add_scaled(sums, R(1), rest + (c - 1) * size + begin, count);
      if (!in_place) crf::store_row(p.bias.type, out.dbias, begin, count, sums);
    });
  }

 private:
  R* place(int64_t task) const {
    const int64_t copy = task % copies;
    return (copy ? rest + (copy - 1) * size : first) + task / copies * part_size;
  }

  const Problem& p;
  const fastseq::attention::Backward& out;
  const bool wanted;
  const int64_t n_parts, h_parts;  // of the gradient, between which nothing is shared
  const int64_t sharing, copies;   // tasks that share a part; copies of the gradient
  const int64_t part_size, size;
  const bool in_place;  // the first copy is the gradient itself
  const Buffer<R> memory;
  R *const first, *const rest;
};

}  // namespace fastseq::FASTSEQ_ISA::attention
