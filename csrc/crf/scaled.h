// What the scaled kernels share: the exponentiated parameters, the job, and the rule that says when not to
// trust a row. The mathematics and the rule are in fastseq/ops/crf/__init__.py. Compiled once per instruction
// set.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../common/half.h"
#include "../common/simd.h"
#include "crf.h"

namespace fastseq::FASTSEQ_ISA {

using namespace fastseq::crf;

// Memory that a thread keeps between calls, since fresh pages cost more than what is computed in them.
class Scratch {
 public:
  float* floats(int64_t n) {
    if (n > size_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, round_up(n * 4, 64))));
      if (!data_) throw std::bad_alloc();
      size_ = n;
    }
    return data_.get();
  }
  // Returns what is large to the system: an unusually long batch must not stay resident in every thread.
  void trim() {
    if (size_ > (int64_t(64) << 18)) {
      data_.reset();
      size_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// exp(parameter - its maximum), padded to `ld` columns with zeros, and the transpose. Entries that underflow
// are 0, as those that are -inf; `gap` is how far below the maximum the nearest of the former was.
struct Tables {
  int64_t K, ld;
  float max_transition, max_start, max_end;
  float gap = INFINITY;
  float *edges, *edges_t, *start, *end;

  static int64_t floats(int64_t K, int64_t ld) { return 2 * K * ld + 2 * ld; }

  Tables(const Model<float>& model, int64_t ld_, float* memory) : K(model.x.K), ld(ld_) {
    std::fill(memory, memory + floats(K, ld), 0.f);
    edges = memory;
    edges_t = edges + K * ld;
    start = edges_t + K * ld;
    end = start + ld;
    max_transition = exponentials(model.transitions, K, edges);
    max_start = exponentials(model.start, 1, start);
    max_end = exponentials(model.end, 1, end);
    constexpr int64_t kBlock = 16;  // a blocked transpose: one cache line each way
    for (int64_t i0 = 0; i0 < K; i0 += kBlock)
      for (int64_t j0 = 0; j0 < K; j0 += kBlock)
        for (int64_t i = i0; i < std::min(i0 + kBlock, K); ++i)
          for (int64_t j = j0; j < std::min(j0 + kBlock, K); ++j) edges_t[j * ld + i] = edges[i * ld + j];
  }

 private:
  float exponentials(const float* from, int64_t n_rows, float* to) {
    float top = -FLT_MAX;
    for (int64_t i = 0; i < n_rows * K; ++i) top = from[i] > top ? from[i] : top;
    float nearest = -FLT_MAX;
    for (int64_t r = 0; r < n_rows; ++r) {
      const float* f = from + r * K;
      float* e = to + r * ld;
      int64_t k = 0;
      for (; k + Wide::W <= K; k += Wide::W)
        Wide::exp_or_zero(Wide::load(f + k) - Wide::set(top)).store(e + k);
      float tail[Wide::W] = {};
      for (int64_t i = k; i < K; ++i) tail[i - k] = f[i] - top;
      Wide::exp_or_zero(Wide::load(tail)).store(tail);
      for (int64_t i = k; i < K; ++i) e[i] = tail[i - k];
      for (int64_t i = 0; i < K; ++i) {
        const float shifted = f[i] - top;
        if (shifted < kLogTiny && shifted > nearest) nearest = shifted;
      }
    }
    if (nearest > -FLT_MAX) gap = std::min(gap, -nearest);
    return top;
  }
};

struct Job {
  const Model<float>& model;
  const Tables& tables;
  Tags tags;
  const float* weights;  // (B,) or null
  double scale;
  float* nll;                        // (B,)
  const Gradients<float>* gradient;  // null: values only
  uint8_t* marks;                    // (B,): 1 where a row must be done again, exactly

  float row_weight(int64_t b) const { return float(scale * (weights ? weights[b] : 1.f)); }
};

// log of a product of many positive floats: exponents are summed, mantissas multiplied, and no log is taken
// until the end.
struct LogProduct {
  double mantissa = 1;
  int64_t exponent = 0;
  int pending = 0;
  FASTSEQ_INLINE void multiply(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    exponent += int64_t(u >> 23) - 127;
    u = (u & 0x7fffffu) | 0x3f800000u;
    float m;
    std::memcpy(&m, &u, 4);
    mantissa *= m;
    if (++pending == 512) {
      int e;
      mantissa = std::frexp(mantissa, &e);
      exponent += e;
      pending = 0;
    }
  }
  double log() const { return std::log(mantissa) + double(exponent) * 0.693147180559945309417; }
};

// Row b's K emissions at position t, as floats: where they lie if they are floats, else converted into
// `staging`.
FASTSEQ_INLINE const float* emission_row(const Emissions& x, int64_t b, int64_t t, float* staging) {
  if (x.type == Type::f32) return static_cast<const float*>(x.data) + b * x.stride_b + t * x.stride_t;
  load_row(x, b, t, staging);
  return staging;
}

// The score of the row's tags: emissions, transitions, start and end, in double.
inline double gold_score(const Job& job, int64_t b) {
  const Model<float>& m = job.model;
  const int32_t* at = m.rows.of(b);
  const int64_t L = m.rows.length(b), K = m.x.K;
  const int64_t* tags = job.tags.data + b * job.tags.stride_b;
  const int64_t step = job.tags.stride_t;
  const auto sum = [&](const auto* x, auto convert) {
    int64_t previous = tags[at[0] * step];
    double score = m.start[previous];
    double emissions = convert(x[at[0] * m.x.stride_t + previous]);
    for (int64_t i = 1; i < L; ++i) {
      const int64_t y = tags[at[i] * step];
      emissions += convert(x[at[i] * m.x.stride_t + y]);
      score += m.transitions[previous * K + y];
      previous = y;
    }
    return score + emissions + m.end[previous];
  };
  const int64_t row = b * m.x.stride_b;
  if (m.x.type == Type::f32) return sum(static_cast<const float*>(m.x.data) + row, [](float v) { return v; });
  const uint16_t* half = static_cast<const uint16_t*>(m.x.data) + row;
  return m.x.type == Type::bf16 ? sum(half, bf16_to_float) : sum(half, half_to_float);
}

// The last word on a row: its log Z, and whether an edge that underflowed could have mattered. `regret` is
// how far log Z lies below the best that any path could conceivably have; a pruned edge costs a path at least
// `gap`.
inline void finish_row(const Job& job, int64_t b, double maxima, double log_scales, float z, float gap) {
  const Tables& t = job.tables;
  const int64_t L = job.model.rows.length(b);
  const double bound = maxima + double(L - 1) * t.max_transition + t.max_start + t.max_end;
  const double log_z = bound + log_scales + std::log(double(z));
  const double regret = bound + double(L) * std::log(double(t.K)) - log_z;
  if (!(z >= kTiny) || !(regret + 30 < std::min(gap, t.gap))) job.marks[b] = 1;
  job.nll[b] = float(job.tags.data ? log_z - gold_score(job, b) : log_z);
}

// Ask for the lines of n elements, ahead of their use: rows are gone through side by side, and backwards,
// which no hardware prefetcher follows.
template <int Write>
FASTSEQ_INLINE void prefetch(const void* data, Type type, int64_t at, int64_t n) {
  const int64_t size = type == Type::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(data) + at * size;
  for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(from + i, Write);
}

FASTSEQ_INLINE void prefetch_gradient(const Job& job, int64_t b, int64_t t) {
  const Gradients<float>& g = *job.gradient;
  prefetch<1>(g.emissions, job.model.x.type, b * g.stride_b + t * g.stride_t, job.model.x.K);
}

// weight * posterior of one position, in `p`, becomes weight * (posterior - onehot(tag)) in the gradient.
// Nothing is read back from the gradient: its lines come from far away, and a load behind a store that waits
// for one would wait as well.
FASTSEQ_INLINE void store_gradient(const Job& job, int64_t b, int64_t t, float* p, float weight) {
  const Gradients<float>& g = *job.gradient;
  const int64_t at = b * g.stride_b + t * g.stride_t, K = job.model.x.K;
  const int64_t y = job.tags.data ? job.tags.at(b, t) : -1;
  if (job.model.x.type == Type::f32) {
    float* __restrict out = static_cast<float*>(g.emissions) + at;
    int64_t k = 0;
    for (; k + Narrow::W <= K; k += Narrow::W) Narrow::load(p + k).store(out + k);
    for (; k < K; ++k) out[k] = p[k];
    if (y >= 0) out[y] = p[y] - weight;
  } else {
    if (y >= 0) p[y] -= weight;
    store_row(job.model.x.type, g.emissions, at, K, p);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
