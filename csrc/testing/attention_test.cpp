// Attention with dot products against its definition in plain loops of float64: every option alone and
// together, sizes around blocks and panels, all types; numbers that are not finite and must not spread; and
// the same bits from any number of threads. Run once per instruction set. Every buffer ends where memory
// ends.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/dot_product.h"
#include "testing/check.h"
#include "testing/numbers.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;
using attention::Problem;
using attention::Type;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  int64_t N, queries, keys, query_heads, key_heads, D;
  bool causal = false, grad_lse = true, grad_out = true;
  int64_t left = -1, right = -1, seed = -0x123456789ABCDEF;
  double scale, softcap = 0, dropout = 0;
  int64_t bias_sizes[4] = {0, 0, 0, 0};  // none
  std::vector<int32_t> cu_q, cu_k, lengths;
  std::vector<double> q, k, v, bias, slopes, d_out, d_lse;

  Case(int64_t N, int64_t queries, int64_t keys, int64_t query_heads, int64_t key_heads, int64_t D,
       unsigned seed)
      : N(N), queries(queries), keys(keys), query_heads(query_heads), key_heads(key_heads), D(D) {
    random.seed(seed), scale = 1 / std::sqrt(double(D));
    q = normal(N * queries * query_heads * D), k = normal(N * keys * key_heads * D);
    v = normal(int64_t(k.size())), d_out = normal(int64_t(q.size())),
    d_lse = normal(N * query_heads * queries);
  }

  std::vector<double> normal(int64_t n) {
    std::normal_distribution<double> distribution;
    std::vector<double> x(n);
    for (double& each : x) each = bf16_to_float(float_to_bf16(float(distribution(random))));
    return x;
  }
  void set_bias(int64_t n, int64_t h, int64_t i, int64_t j) {
    bias_sizes[0] = n, bias_sizes[1] = h, bias_sizes[2] = i, bias_sizes[3] = j;
    bias = normal(n * h * i * j);
  }
  void set_slopes() {
    slopes = normal(query_heads);
    for (double& s : slopes) s = std::fabs(s) / 16;
  }
  // The rows together are one, of these sequences (and tokens before and behind that are in none).
  void pack(const std::vector<int32_t>& of_q, const std::vector<int32_t>& of_k) {
    queries *= N, keys *= N, cu_q = of_q, cu_k = of_k, N = 1;
  }
  int64_t sequences() const { return cu_q.empty() ? N : int64_t(cu_q.size()) - 1; }
  std::mt19937 random;
};

struct Answer {
  std::vector<double> out, lse, dq, dk, dv, dbias;
};

bool keeps(const Case& c, int64_t nh, int64_t i, int64_t j) {
  const auto mix = [](uint32_t x) {
    x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x *= 0x846ca68b;
    return x ^ x >> 16;
  };
  const uint32_t low = uint32_t(c.seed), high = uint32_t(uint64_t(c.seed) >> 32);
  const uint32_t k1 = mix(mix(low) + uint32_t(nh)), k2 = mix(mix(high ^ 0x9E3779B9) + uint32_t(nh));
  const uint32_t a = mix(k1 + uint32_t(i)), b = mix(k2 ^ uint32_t(i));
  uint32_t x = a + uint32_t((j >> 5) * 16 + (j & 15)) * 0x9E3779B9;
  x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x += b, x *= 0x846ca68b, x ^= x >> 16;
  return (x >> (j & 16) & 0xFFFF) >= uint32_t(c.dropout * 65536 + 0.5);
}

// The definition, with all of the gradients, for one query.
void define_row(const Case& c, int64_t n, int64_t h, int64_t i, int64_t lq, int64_t lk, int64_t row_q,
                int64_t row_k, Answer& answer, int64_t lse_at, const double* out, const double* lse) {
  const int64_t kv = h / (c.query_heads / c.key_heads), offset = lk - lq;
  const auto* s = c.bias_sizes;
  const double kept = 1 / (1 - std::floor(c.dropout * 65536 + 0.5) / 65536);
  const double* q = &c.q[(row_q * c.query_heads + h) * c.D];
  std::vector<double> t(lk), cap(lk, 1);
  std::vector<int64_t> seen, bias_at(lk);
  double top = -kInfinity, sum = 0;
  for (int64_t j = 0; j < lk; ++j) {
    if ((c.causal && j > i + offset) || (c.left >= 0 && j < i + offset - c.left) ||
        (c.right >= 0 && j > i + offset + c.right))
      continue;
    for (int64_t d = 0; d < c.D; ++d) t[j] += q[d] * c.k[((row_k + j) * c.key_heads + kv) * c.D + d];
    t[j] *= c.scale;
    if (c.softcap > 0) {
      const double tanh = std::tanh(t[j] / c.softcap);
      t[j] = c.softcap * tanh, cap[j] = 1 - tanh * tanh;
    }
    if (s[0]) {
      bias_at[j] = (((s[0] > 1 ? n : 0) * s[1] + (s[1] > 1 ? h : 0)) * s[2] + (s[2] > 1 ? i : 0)) * s[3] +
                   (s[3] > 1 ? j : 0);
      if (c.bias[bias_at[j]] == -kInfinity) continue;
      t[j] += c.bias[bias_at[j]];
    }
    if (!c.slopes.empty()) t[j] -= c.slopes[h] * std::fabs(double(i + offset - j));
    seen.push_back(j), top = std::max(top, t[j]);
  }
  for (const int64_t j : seen) sum += std::exp(t[j] - top);
  answer.lse[lse_at] = seen.empty() ? -kInfinity : top + std::log(sum);
  const int64_t at = (row_q * c.query_heads + h) * c.D;
  if (!out) {
    for (const int64_t j : seen)
      for (int64_t d = 0; d < c.D; ++d)
        if (c.dropout == 0 || keeps(c, n * c.query_heads + h, i, j))
          answer.out[at + d] +=
              std::exp(t[j] - answer.lse[lse_at]) * kept * c.v[((row_k + j) * c.key_heads + kv) * c.D + d];
    return;
  }
  double delta = c.grad_lse ? -c.d_lse[lse_at] : 0;
  for (int64_t d = 0; d < c.D && c.grad_out; ++d) delta += c.d_out[at + d] * out[at + d];
  for (const int64_t j : seen) {
    const int64_t kv_at = ((row_k + j) * c.key_heads + kv) * c.D;
    const double m = c.dropout == 0 ? 1 : keeps(c, n * c.query_heads + h, i, j) ? kept : 0;
    const double p = std::exp(t[j] - lse[lse_at]);
    double dp = 0;
    for (int64_t d = 0; d < c.D && c.grad_out; ++d) dp += c.d_out[at + d] * c.v[kv_at + d];
    const double dt = p * (m * dp - delta), ds = dt * cap[j] * c.scale;
    if (s[0]) answer.dbias[bias_at[j]] += dt;
    for (int64_t d = 0; d < c.D; ++d) {
      if (c.grad_out) answer.dv[kv_at + d] += m * p * c.d_out[at + d];
      answer.dq[at + d] += ds * c.k[kv_at + d], answer.dk[kv_at + d] += ds * q[d];
    }
  }
}

Answer define(const Case& c) {
  Answer a;
  a.out.resize(c.q.size()), a.dq.resize(c.q.size()), a.dk.resize(c.k.size()), a.dv.resize(c.k.size());
  a.lse.assign(c.d_lse.size(), -kInfinity), a.dbias.resize(c.bias.size());
  for (const bool backward : {false, true}) {
    for (int64_t n = 0; n < c.sequences(); ++n) {
      const bool packed = !c.cu_q.empty();
      const int64_t row_q = packed ? c.cu_q[n] : n * c.queries, row_k = packed ? c.cu_k[n] : n * c.keys;
      const int64_t lq = packed ? c.cu_q[n + 1] - row_q : c.queries;
      const int64_t lk = !c.lengths.empty() ? c.lengths[n] : packed ? c.cu_k[n + 1] - row_k : c.keys;
      for (int64_t h = 0; h < c.query_heads; ++h)
        for (int64_t i = 0; i < lq; ++i) {
          const int64_t lse_at = packed ? h * c.queries + row_q + i : (n * c.query_heads + h) * c.queries + i;
          define_row(c, n, h, i, lq, lk, row_q + i, row_k, a, lse_at, backward ? a.out.data() : nullptr,
                     a.lse.data());
        }
    }
  }
  return a;
}

// ---- running the kernels ---------------------------------------------------------------------------------

Answer run(const Case& c, Type type, const ParallelFor& parallel) {
  const Type result = type == Type::f64 ? Type::f64 : Type::f32;
  const Memory<char> q = stored(c.q, type), k = stored(c.k, type), v = stored(c.v, type);
  const Memory<char> bias = stored(c.bias, type), slopes = stored(c.slopes, result);
  const Memory<char> d_out = stored(c.d_out, type), d_lse = stored(c.d_lse, result);
  const Memory<int32_t> cu_q(c.cu_q), cu_k(c.cu_k), lengths(c.lengths);
  const auto tokens = [&](const Memory<char>& x, int64_t count, int64_t heads) {
    return attention::Tokens{x.data(), count * heads * c.D, heads * c.D, c.D};
  };
  Problem p{};
  p.type = type, p.N = c.sequences(), p.query_heads = c.query_heads, p.key_heads = c.key_heads, p.D = c.D;
  p.queries = c.queries, p.keys = c.keys;
  p.q = tokens(q, c.queries, c.query_heads), p.k = tokens(k, c.keys, c.key_heads);
  p.v = tokens(v, c.keys, c.key_heads);
  const auto* s = c.bias_sizes;
  if (s[0])
    p.bias = {bias.data(),         type,    s[0] > 1 ? s[1] * s[2] * s[3] : 0, s[1] > 1 ? s[2] * s[3] : 0,
              s[2] > 1 ? s[3] : 0, s[3] > 1};
  if (!c.slopes.empty()) p.slopes = slopes.data(), p.slopes_type = result, p.slopes_h = 1;
  if (!c.cu_q.empty()) p.cu_q = cu_q.data(), p.cu_k = cu_k.data();
  if (!c.lengths.empty()) p.lengths = lengths.data();
  p.seed = c.seed, p.dropout = c.dropout, p.scale = c.scale, p.softcap = c.softcap;
  p.causal = c.causal, p.left = c.left, p.right = c.right;
  const auto like = [&](const std::vector<double>& x, Type t) {
    return Memory<char>(int64_t(x.size()) * bytes(t));
  };
  Memory<char> out = like(c.q, type), lse = like(c.d_lse, result);
  FASTSEQ_SELECT(attention::forward)(p, {out.data(), lse.data()}, parallel);
  Memory<char> dq = like(c.q, type), dk = like(c.k, type), dv = like(c.v, type), dbias = like(c.bias, type);
  attention::Backward b{};
  b.out = tokens(out, c.queries, c.query_heads), b.lse = lse.data();
  if (c.grad_out) b.grad_out = tokens(d_out, c.queries, c.query_heads);
  if (c.grad_lse) b.grad_lse = d_lse.data();
  b.dq = dq.data(), b.dk = dk.data(), b.dv = dv.data(), b.dbias = s[0] ? dbias.data() : nullptr;
  b.bias_n = s[0], b.bias_h = s[1], b.bias_i = s[2], b.bias_j = s[3];
  FASTSEQ_SELECT(attention::backward)(p, b, parallel);
  return {loaded(out, type), loaded(lse, result), loaded(dq, type),
          loaded(dk, type),  loaded(dv, type),    loaded(dbias, type)};
}

void check_answer(const Answer& got, const Answer& want, double tolerance, double lse_tolerance) {
  check_near("out", got.out, want.out, tolerance), check_near("lse", got.lse, want.lse, lse_tolerance);
  check_near("dq", got.dq, want.dq, tolerance), check_near("dk", got.dk, want.dk, tolerance);
  check_near("dv", got.dv, want.dv, tolerance), check_near("dbias", got.dbias, want.dbias, tolerance);
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

void check(const std::string& what, const Case& c) {
  const Answer want = define(c);
  const std::pair<Type, double> types[] = {
      {Type::f64, 1e-12}, {Type::f32, 1e-5}, {Type::bf16, 1.5e-2}, {Type::f16, 2e-3}};
  for (const auto& [type, tolerance] : types) {
    context() = what + ", type " + std::to_string(int(type));
    const Answer got = run(c, type, serial_for), again = run(c, type, threads(3));
    check_answer(got, want, tolerance, type == Type::f64 ? 1e-12 : 1e-5);
    CHECK(same(got.out, again.out) && same(got.lse, again.lse) && same(got.dq, again.dq) &&
          same(got.dk, again.dk) && same(got.dv, again.dv) && same(got.dbias, again.dbias));
  }
}

// ---- cases -----------------------------------------------------------------------------------------------

void check_sizes() {
  const int64_t sizes[][6] = {{1, 1, 1, 1, 1, 1},     {2, 5, 7, 2, 1, 3},     {0, 3, 4, 2, 2, 8},
                              {2, 0, 4, 2, 2, 8},     {2, 3, 0, 2, 1, 8},     {1, 65, 31, 2, 2, 16},
                              {1, 64, 129, 4, 2, 33}, {1, 3, 1100, 1, 1, 65}, {1, 70, 1300, 2, 1, 8}};
  unsigned seed = 0;
  for (const auto& s : sizes) {
    for (const bool causal : {false, true}) {
      Case c(s[0], s[1], s[2], s[3], s[4], s[5], ++seed);
      c.causal = causal, c.dropout = seed % 3 ? 0 : 0.25;
      check("size " + std::to_string(s[1]) + " x " + std::to_string(s[2]) + (causal ? ", causal" : ""), c);
    }
  }
}

void check_options() {
  unsigned seed = 100;
  for (const int64_t keys : {20, 90}) {
    for (int option = 0; option < 12; ++option) {
      Case c(3, 70, keys, 4, 2, 20, ++seed);
      if (option == 0) c.left = 7;
      if (option == 1) c.right = 3, c.left = 0;
      if (option == 2) c.causal = true, c.left = 40, c.right = 2;
      if (option == 3) c.softcap = 1.5;
      if (option == 4) c.set_slopes();
      if (option == 5) c.lengths = {5, 0, int32_t(keys)};
      if (option == 6) c.dropout = 0.5, c.grad_lse = false;
      if (option == 7) c.scale = -0.3, c.grad_out = false;
      if (option == 8) c.causal = true, c.scale = 0;
      if (option == 9) c.pack({3, 3, 90, 200}, {0, 11, 11, int32_t(2 * keys)});
      if (option >= 10) c.causal = option == 10, c.softcap = 2, c.dropout = 0.1, c.set_slopes();
      if (option >= 10) c.lengths = {int32_t(keys), 3, 17}, c.left = 30, c.set_bias(3, 4, 70, keys);
      check("option " + std::to_string(option), c);
    }
    const int64_t shapes[][4] = {
        {3, 4, 70, keys}, {1, 4, 70, keys}, {3, 1, 1, keys}, {1, 1, 70, 1}, {1, 1, 1, 1}};
    for (const auto& s : shapes) {
      Case c(3, 70, keys, 4, 2, 20, ++seed);
      c.set_bias(s[0], s[1], s[2], s[3]);
      if (s[3] > 1) c.bias[1] = -kInfinity, c.bias.back() = -kInfinity;
      check("bias of " + std::to_string(s[0] * s[1] * s[2]) + " rows", c);
    }
  }
}

// What a query does not see is not even multiplied by 0.
void check_poison() {
  for (const int where : {0, 1, 2, 3}) {
    for (const bool causal : {true, false}) {
      Case c(1, 70, 70, 2, 2, 8, 7);
      c.causal = causal, c.left = causal ? -1 : 5;
      c.set_bias(1, 1, 1, 70), c.bias[33] = -kInfinity;
      const Answer clean = define(c);
      std::vector<double>& x = where == 0 ? c.q : where == 1 ? c.k : where == 2 ? c.v : c.d_out;
      x[(where % 3 ? 33 : 40) * 2 * 8 + 3] = NAN;  // key 33, which nobody sees, or query 40, head 0
      context() = "poison " + std::to_string(where);
      for (const Type type : {Type::f64, Type::f32, Type::bf16}) {
        const Answer got = run(c, type, serial_for), want = define(c);
        check_answer(got, want, 1.5e-2, 1e-5);
        if (where == 1 || where == 2) check_answer(got, clean, 1.5e-2, 1e-5);
      }
    }
  }
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  check_sizes();
  check_options();
  check_poison();
  return summary("attention");
}
