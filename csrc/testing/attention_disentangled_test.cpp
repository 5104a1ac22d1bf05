// Disentangled attention: every type against the definition in float64, in plain loops over pairs of
// positions; slots of every kind, ragged and packed sequences, what is not to be read; and the same bits from
// any number of threads. Run once per instruction set. Every buffer ends where memory ends.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/disentangled.h"
#include "testing/check.h"
#include "testing/numbers.h"
#include "testing/threads.h"

namespace {

using namespace fastseq;
using namespace fastseq::testing;
using namespace fastseq::attention;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Slots { any, clamped, logarithmic, steep, one };
const char* const kSlotNames[] = {"any", "clamped", "logarithmic", "steep", "one"};

struct Case {
  int64_t B, S, H, D, P;
  Slots kind;
  std::vector<Sequence> sequences;
  bool key = true, query = true, grad_out = true, grad_lse = true;
  double dropout = 0, scale = 0.4;
  std::vector<double> q, k, v, pos_key, pos_query, g, g_lse;
  std::vector<int32_t> slots;
  int64_t reach;

  Case(int64_t B, int64_t S, int64_t H, int64_t D, int64_t P, Slots kind, unsigned seed)
      : B(B), S(S), H(H), D(D), P(P), kind(kind), reach(S + int64_t(seed % 3)) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>& x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) x.push_back(bf16_to_float(float_to_bf16(float(normal(random)))));
    };
    fill(q, B * S * H * D), fill(k, B * S * H * D), fill(v, B * S * H * D), fill(g, B * S * H * D);
    fill(g_lse, B * H * S), fill(pos_key, P * H * D), fill(pos_query, P * H * D);
    for (int64_t b = 0; b < B; ++b) sequences.push_back({b, 0, S});
    for (int64_t d = -reach; d <= reach; ++d) {
      const int64_t sign = d < 0 ? -1 : 1, far = d < 0 ? -d : d;
      int64_t slot = 0;
      if (kind == Slots::any) slot = int64_t(random() % P);
      if (kind == Slots::clamped) slot = d + P / 2;
      if (kind == Slots::steep) slot = 3 * d + P / 2;
      if (kind == Slots::logarithmic)
        slot = P / 2 + sign * (far < 9 ? far : 8 + int64_t(9 * std::log(double(far) / 8)));
      slots.push_back(int32_t(std::clamp<int64_t>(slot, 0, P - 1)));
    }
    std::sort(slots.begin(), slots.end());
  }

  int64_t at(int64_t b, int64_t s, int64_t h) const { return ((b * S + s) * H + h) * D; }
};

// ---- the definition --------------------------------------------------------------------------------------

struct Numbers {
  std::vector<double> out, lse, q, k, v, pos_key, pos_query;
  explicit Numbers(const Case& c)
      : out(c.q.size()),
        lse(c.g_lse.size(), -kInfinity),
        q(c.q.size()),
        k(c.q.size()),
        v(c.q.size()),
        pos_key(c.pos_key.size()),
        pos_query(c.pos_key.size()) {}
};

uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}

constexpr uint64_t kSeed = 0x123456789ABCDEF;

// 0, or the inverse of what is kept.
double multiplier(const Case& c, int64_t head, int64_t i, int64_t j) {
  const uint32_t threshold = uint32_t(std::floor(c.dropout * 65536 + 0.5));
  const uint32_t a = mixed(mixed(mixed(uint32_t(kSeed)) + uint32_t(head)) + uint32_t(i));
  const uint32_t b = mixed(mixed(mixed(uint32_t(kSeed >> 32) ^ 0x9E3779B9) + uint32_t(head)) ^ uint32_t(i));
  uint32_t x = a + uint32_t((j >> 5) * 16 + (j & 15)) * 0x9E3779B9;
  x = (x ^ x >> 16) * 0x7feb352d;
  x = ((x ^ x >> 15) + b) * 0x846ca68b;
  x ^= x >> 16;
  return (x >> (j & 16) & 0xFFFF) >= threshold ? 65536. / (65536. - threshold) : 0;
}

double dot(const Case& c, const double* a, const double* b) {
  double sum = 0;
  for (int64_t d = 0; d < c.D; ++d) sum += a[d] * b[d];
  return sum;
}

void add(const Case& c, double* to, double factor, const double* from) {
  for (int64_t d = 0; d < c.D; ++d) to[d] += factor * from[d];
}

void define_row(const Case& c, int64_t number, int64_t h, int64_t i, Numbers& want) {
  const Sequence& s = c.sequences[number];
  const int64_t n = s.length, row = c.at(s.b, s.first + i, h), one = (s.b * c.H + h) * c.S + s.first + i;
  const auto key = [&](int64_t j) { return c.at(s.b, s.first + j, h); };
  const auto slot = [&](int64_t j) { return (c.slots[i - j + c.reach] * c.H + h) * c.D; };
  std::vector<double> t(n), m(n, 1.);
  double top = -kInfinity, sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    t[j] = dot(c, &c.q[row], &c.k[key(j)]);
    if (c.key) t[j] += dot(c, &c.q[row], &c.pos_key[slot(j)]);
    if (c.query) t[j] += dot(c, &c.k[key(j)], &c.pos_query[slot(j)]);
    t[j] *= c.scale;
    top = std::max(top, t[j]);
    if (c.dropout > 0) m[j] = multiplier(c, number * c.H + h, i, j);
  }
  for (const double x : t) sum += std::exp(x - top);
  const double lse = want.lse[one] = top + std::log(sum);
  for (int64_t j = 0; j < n; ++j) add(c, &want.out[row], m[j] * std::exp(t[j] - lse), &c.v[key(j)]);
  const double from_out = c.grad_out ? 1 : 0;
  double delta = from_out * dot(c, &c.g[row], &want.out[row]);
  if (c.grad_lse) delta -= c.g_lse[one];
  for (int64_t j = 0; j < n; ++j) {
    const double p = std::exp(t[j] - lse), to_p = from_out * m[j] * dot(c, &c.g[row], &c.v[key(j)]);
    const double to_t = c.scale * p * (to_p - delta);
    add(c, &want.v[key(j)], from_out * m[j] * p, &c.g[row]);
    add(c, &want.q[row], to_t, &c.k[key(j)]), add(c, &want.k[key(j)], to_t, &c.q[row]);
    if (c.key) add(c, &want.q[row], to_t, &c.pos_key[slot(j)]);
    if (c.key) add(c, &want.pos_key[slot(j)], to_t, &c.q[row]);
    if (c.query) add(c, &want.k[key(j)], to_t, &c.pos_query[slot(j)]);
    if (c.query) add(c, &want.pos_query[slot(j)], to_t, &c.k[key(j)]);
  }
}

Numbers define(const Case& c) {
  Numbers want(c);
  for (int64_t number = 0; number < int64_t(c.sequences.size()); ++number)
    for (int64_t h = 0; h < c.H; ++h)
      for (int64_t i = 0; i < c.sequences[number].length; ++i) define_row(c, number, h, i, want);
  return want;
}

// ---- running the kernels ---------------------------------------------------------------------------------

template <class R>
struct Results {
  Memory<char> out, q, k, v, pos_key, pos_query;
  Memory<R> lse;
  Results(const Case& c, Type type)
      : out(int64_t(c.q.size()) * bytes(type)),
        q(out.size()),
        k(out.size()),
        v(out.size()),
        pos_key(c.key ? int64_t(c.pos_key.size()) * bytes(type) : 0),
        pos_query(c.query ? int64_t(c.pos_query.size()) * bytes(type) : 0),
        lse(int64_t(c.g_lse.size())) {}
};

template <class R>
Results<R> run(const Case& c, Type type, const ParallelFor& parallel) {
  const Memory<char> q = stored(c.q, type), k = stored(c.k, type), v = stored(c.v, type);
  const Memory<char> pos_key = stored(c.pos_key, type), pos_query = stored(c.pos_query, type);
  const Memory<char> g = stored(c.g, type);
  const Memory<R> g_lse(c.g_lse);
  const Memory<int32_t> slots(c.slots);
  const auto heads = [&](const Memory<char>& x) { return Heads{x.data(), c.S * c.H * c.D, c.H * c.D, c.D}; };
  const auto table = [&](const Memory<char>& x, bool there) {
    return Table{there ? x.data() : nullptr, c.H * c.D, c.D};
  };
  const Disentangled problem{c.B,
                             c.S,
                             c.H,
                             c.D,
                             c.P,
                             type,
                             heads(q),
                             heads(k),
                             heads(v),
                             table(pos_key, c.key),
                             table(pos_query, c.query),
                             slots.data() + c.reach,
                             c.sequences,
                             c.scale,
                             c.dropout,
                             int64_t(kSeed)};
  Results<R> out(c, type);
  disentangled<R>(problem, {out.out.data(), out.lse.data()}, parallel);
  disentangled_grad<R>(
      problem,
      {c.grad_out ? heads(g) : Heads{nullptr, 0, 0, 0}, heads(out.out), c.grad_lse ? g_lse.data() : nullptr,
       out.lse.data(), out.q.data(), out.k.data(), out.v.data(), out.pos_key.data(), out.pos_query.data()},
      parallel);
  return out;
}

template <class R>
bool same(const Results<R>& a, const Results<R>& b) {
  return same_bits(a.out, b.out) && same_bits(a.lse, b.lse) && same_bits(a.q, b.q) && same_bits(a.k, b.k) &&
         same_bits(a.v, b.v) && same_bits(a.pos_key, b.pos_key) && same_bits(a.pos_query, b.pos_query);
}

// ---- checks ----------------------------------------------------------------------------------------------

template <class R>
void check_type(const Case& c, const Numbers& want, Type type, double exact, double rounded) {
  const Results<R> got = run<R>(c, type, serial_for);
  check_near("lse", {got.lse.data(), got.lse.data() + got.lse.size()}, want.lse, exact);
  check_near("out", loaded(got.out, type), want.out, rounded);
  check_near("q", loaded(got.q, type), want.q, rounded);
  check_near("k", loaded(got.k, type), want.k, rounded);
  check_near("v", loaded(got.v, type), want.v, rounded);
  if (c.key) check_near("pos_key", loaded(got.pos_key, type), want.pos_key, rounded);
  if (c.query) check_near("pos_query", loaded(got.pos_query, type), want.pos_query, rounded);
  for (int count : {2, 5}) CHECK(same(got, run<R>(c, type, threads(count))));
}

void check(const Case& c) {
  const Numbers want = define(c);
  context() = "B " + std::to_string(c.B) + ", S " + std::to_string(c.S) + ", H " + std::to_string(c.H) +
              ", D " + std::to_string(c.D) + ", P " + std::to_string(c.P) + ", slots " +
              kSlotNames[int(c.kind)] + (c.key ? "" : ", no pos_key") + (c.query ? "" : ", no pos_query") +
              (c.dropout > 0 ? ", dropout" : "");
  const std::string name = context();
  context() = name + ", float64";
  check_type<double>(c, want, Type::f64, 1e-12, 1e-12);
  context() = name + ", float32";
  check_type<float>(c, want, Type::f32, 3e-6, 5e-6);
  context() = name + ", bfloat16";
  check_type<float>(c, want, Type::bf16, 3e-6, 1.5e-2);
  context() = name + ", float16";
  check_type<float>(c, want, Type::f16, 3e-6, 2e-3);
}

// NaN wherever no position is.
void poison(Case& c) {
  std::vector<bool> there(c.B * c.S);
  for (const Sequence& s : c.sequences)
    for (int64_t i = 0; i < s.length; ++i) there[s.b * c.S + s.first + i] = true;
  for (int64_t i = 0; i < c.B * c.S; ++i) {
    if (there[i]) continue;
    for (std::vector<double>* x : {&c.q, &c.k, &c.v, &c.g})
      std::fill_n(x->begin() + i * c.H * c.D, c.H * c.D, double(NAN));
    for (int64_t h = 0; h < c.H; ++h) c.g_lse[(i / c.S * c.H + h) * c.S + i % c.S] = NAN;
  }
}

}  // namespace

int main() {
  SKIP_UNLESS_ISA_IS_AS_ASKED();
  // Around the sizes of vectors, strips, blocks and panels; and with nothing in one of them.
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},     {2, 5, 2, 3, 6},     {1, 16, 1, 8, 40},
                               {2, 17, 3, 17, 2},   {1, 47, 2, 33, 70},  {1, 49, 1, 64, 30},
                               {2, 97, 1, 16, 130}, {1, 131, 1, 5, 300}, {0, 3, 2, 4, 5},
                               {2, 0, 2, 4, 5},     {2, 3, 0, 4, 5}};
  unsigned seed = 0;
  for (const auto& s : shapes) {
    for (const Slots kind : {Slots::any, Slots::clamped, Slots::logarithmic, Slots::steep, Slots::one}) {
      Case c(s[0], s[1], s[2], s[3], s[4], kind, ++seed);
      if (seed % 3 == 1) c.dropout = 0.3;
      if (seed % 7 == 2) c.key = false;
      if (seed % 7 == 4) c.query = false;
      if (seed % 14 == 6) c.key = c.query = false;
      if (seed % 5 == 1) c.grad_out = false;
      if (seed % 5 == 2) c.grad_lse = false;
      check(c);
    }
  }
  for (const Slots kind : {Slots::any, Slots::logarithmic}) {
    Case ragged(6, 70, 2, 9, 33, kind, ++seed);
    ragged.sequences = {{0, 0, 70}, {1, 0, 0}, {2, 0, 1}, {3, 0, 33}, {4, 0, 2}, {5, 0, 48}};
    Case packed(1, 100, 2, 16, 21, kind, ++seed);
    packed.sequences = {{0, 3, 20}, {0, 23, 0}, {0, 23, 1}, {0, 24, 50}};
    for (Case* c : {&ragged, &packed}) {
      poison(*c);
      check(*c);
      c->dropout = 0.1;
      check(*c);
    }
  }
  return summary("disentangled attention");
}
