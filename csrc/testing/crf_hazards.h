// Problems in which a scaled float32 domain could lose what matters, or meets infinities. Each function calls
// check(problem, type, layout, what) for every one of its own.
#pragma once
#include <algorithm>
#include <random>
#include <string>

#include "testing/crf_compare.h"

namespace fastseq::testing {

// Two groups of tags, the first and the rest, with no way from one to the other.
inline void part(Problem& p) {
  for (int64_t k = 1; k < p.K; ++k) p.transitions[k] = p.transitions[k * p.K] = kNever;
}

// The first tag is `lead` nats ahead of all others, in one step or over all of them, and then it is
// forbidden: at the last position, or by the end. What is left are paths that had fallen behind.
template <class Check>
void lost_paths(int64_t K, const Check& check) {
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
template <class Check>
void lost_at_both_ends(int64_t K, const Check& check) {
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

template <class Check>
void constraints(int64_t K, const Check& check) {
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

template <class Check>
void extreme_emissions(int64_t K, const Check& check) {
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

}  // namespace fastseq::testing
