// The torch ops fastseq_cpu::disentangled_attention and disentangled_attention_grad: tensors to raw pointers
// and back, nothing else.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/torch_cpu.h"
#include "disentangled.h"

namespace {

using namespace fastseq;
using namespace fastseq::attention;
using Optional = std::optional<Tensor>;

// Keeps the tensors that had to be made contiguous for as long as the pointers are in use.
class Arguments {
 public:
  Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& pos_key,
            const Optional& pos_query, const Tensor& slots, const Optional& cu_seqlens,
            const Optional& lengths, const Optional& seed, int64_t max_length, double scale, double dropout) {
    check(q.dim() == 4, "q: wanted (B,S,H,D), got " + std::to_string(q.dim()) + " dimensions");
    type_ = q.scalar_type();
    Disentangled& p = problem;
    p.B = q.size(0), p.S = q.size(1), p.H = q.size(2), p.D = q.size(3), p.P = 0;
    check(p.D >= 1, "q: wanted a head size D of 1 or more");
    p.type = type_of(q, "q");
    p.q = heads(q, "q"), p.k = heads(k, "k"), p.v = heads(v, "v");
    if (pos_key || pos_query) p.P = (pos_key ? *pos_key : *pos_query).size(0);
    p.pos_key = table(pos_key, "pos_key"), p.pos_query = table(pos_query, "pos_query");
    p.scale = scale, p.dropout = dropout, p.seed = 0;
    check(dropout >= 0 && dropout < 1, "dropout: wanted a number in [0,1)");
    if (dropout > 0) {
      check(seed && seed->scalar_type() == ScalarType::Long && seed->dim() == 1 && seed->size(0) == 1,
            "seed: wanted int64 (1,), which dropout needs");
      p.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
    }
    check(!cu_seqlens || (p.B == 1 && !lengths),
          "cu_seqlens: wanted B = 1 and no lengths, as sequences are packed");
    if (cu_seqlens)
      add_packed(numbers(*cu_seqlens, "cu_seqlens"), cu_seqlens->size(0), max_length);
    else
      add_rows(lengths, max_length);
    set_slots(slots, max_length);
  }

  // A tensor (B,S,H,D) of the type of q, of which the last dimension is dense.
  Heads heads(const Tensor& t, const char* name) {
    check(t.dim() == 4 && t.size(0) == problem.B && t.size(1) == problem.S && t.size(2) == problem.H &&
              t.size(3) == problem.D && t.scalar_type() == type_,
          std::string(name) + ": wanted (B,S,H,D) and the dtype as q has them");
    const Tensor& kept = keep(t, t.size(3) <= 1 || t.stride(3) == 1);
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(1), kept.stride(2)};
  }

  template <class R>
  const R* rows(const Tensor& t, const char* name) {
    check(t.dim() == 3 && t.size(0) == problem.B && t.size(1) == problem.H && t.size(2) == problem.S &&
              t.scalar_type() == result_type(),
          std::string(name) + ": wanted (B,H,S) of float64 for float64, else of float32");
    return static_cast<const R*>(keep(t, t.is_contiguous()).const_data_ptr());
  }

  ScalarType result_type() const {
    return type_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  Disentangled problem;

 private:
  const Tensor& keep(const Tensor& t, bool as_it_is) {
    kept_.push_back(as_it_is ? t : torch::stable::contiguous(t));
    return kept_.back();
  }

  Table table(const Optional& t, const char* name) {
    if (!t) return {nullptr, 0, 0};
    check(
        t->dim() == 3 && t->size(0) == problem.P && t->size(1) == problem.H && t->size(2) == problem.D &&
            t->scalar_type() == type_,
        std::string(name) + ": wanted (P,H,D), H, D and the dtype as q has them, P the same in both tables");
    const Tensor& kept = keep(*t, t->size(2) <= 1 || t->stride(2) == 1);
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(1)};
  }

  const int32_t* numbers(const Tensor& t, const char* name) {
    check(t.dim() == 1 && t.scalar_type() == ScalarType::Int,
          std::string(name) + ": wanted int32 with one dimension");
    return static_cast<const int32_t*>(keep(t, t.is_contiguous()).const_data_ptr());
  }

  void add_packed(const int32_t* bounds, int64_t count, int64_t max_length) {
    check(count >= 1, "cu_seqlens: wanted (N+1,), N 0 or more");
    for (int64_t n = 0; n < count; ++n)
      check(bounds[n] >= (n ? bounds[n - 1] : 0) && bounds[n] <= problem.S,
            "cu_seqlens: got " + std::to_string(bounds[n]) + " in place " + std::to_string(n) +
                ", wanted rising boundaries from 0 to the " + std::to_string(problem.S) +
                " positions at most");
    for (int64_t n = 0; n + 1 < count; ++n) add(0, bounds[n], bounds[n + 1] - bounds[n], max_length);
  }

  void add_rows(const Optional& lengths, int64_t max_length) {
    const int32_t* ends = lengths ? numbers(*lengths, "lengths") : nullptr;
    check(!lengths || lengths->size(0) == problem.B, "lengths: wanted (B,)");
    for (int64_t b = 0; b < problem.B; ++b) {
      check(!ends || (ends[b] >= 0 && ends[b] <= problem.S),
            "lengths: got " + std::to_string(ends ? ends[b] : 0) +
                ", wanted lengths from 0 to S = " + std::to_string(problem.S));
      add(b, 0, ends ? ends[b] : problem.S, max_length);
    }
  }

  void add(int64_t b, int64_t first, int64_t length, int64_t max_length) {
    check(length <= max_length, "cu_seqlens: got a sequence of " + std::to_string(length) +
                                    " tokens, wanted max_length = " + std::to_string(max_length) +
                                    " at most");
    longest_ = length > longest_ ? length : longest_;
    problem.sequences.push_back({b, first, length});
  }

  // Checks the slots that are read: without a table none is, and nobody knows how many there are.
  void set_slots(const Tensor& slots, int64_t max_length) {
    const int32_t* all = numbers(slots, "slots");
    const int64_t reach = (slots.size(0) - 1) / 2;
    check(slots.size(0) % 2 == 1 && reach + 1 >= max_length,
          "slots: wanted (2M-1,) with M at least max_length = " + std::to_string(max_length) + ", got (" +
              std::to_string(slots.size(0)) + ",)");
    problem.slots = all + reach;
    if (problem.P == 0 && !problem.pos_key.data && !problem.pos_query.data) return;
    for (int64_t d = 1 - longest_; d < longest_; ++d) {
      const int32_t slot = problem.slots[d];
      check(slot >= 0 && slot < problem.P && (d == 1 - longest_ || slot >= problem.slots[d - 1]),
            "slots: got " + std::to_string(slot) + " for distance " + std::to_string(d) +
                ", wanted numbers in [0," + std::to_string(problem.P) + ") that never fall");
    }
  }

  ScalarType type_;
  int64_t longest_ = 0;
  std::vector<Tensor> kept_;
};

template <class F>
auto with_results(const Tensor& q, const F& f) {
  return q.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& pos_key,
                                  const Optional& pos_query, const Tensor& slots, const Optional& cu_seqlens,
                                  const Optional& lengths, const Optional& seed, int64_t max_length,
                                  double scale, double dropout) {
  const Arguments in(q, k, v, pos_key, pos_query, slots, cu_seqlens, lengths, seed, max_length, scale,
                     dropout);
  const Disentangled& p = in.problem;
  Tensor out = empty(q, {p.B, p.S, p.H, p.D}, q.scalar_type());
  Tensor lse = empty(q, {p.B, p.H, p.S}, in.result_type());
  with_results(q, [&](auto zero) {
    using R = decltype(zero);
    disentangled<R>(p, {out.mutable_data_ptr(), data<R>(lse)}, torch_threads);
  });
  return {out, lse};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results attend_grad(const Optional& grad_out, const Optional& grad_lse, const Tensor& out, const Tensor& lse,
                    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& pos_key,
                    const Optional& pos_query, const Tensor& slots, const Optional& cu_seqlens,
                    const Optional& lengths, const Optional& seed, int64_t max_length, double scale,
                    double dropout) {
  Arguments in(q, k, v, pos_key, pos_query, slots, cu_seqlens, lengths, seed, max_length, scale, dropout);
  const Disentangled& p = in.problem;
  const auto like = [&](bool given, std::initializer_list<int64_t> sizes) {
    return given ? empty(q, sizes, q.scalar_type()) : empty(q, {0}, q.scalar_type());
  };
  Tensor dq = like(true, {p.B, p.S, p.H, p.D}), dk = like(true, {p.B, p.S, p.H, p.D});
  Tensor dv = like(true, {p.B, p.S, p.H, p.D});
  Tensor dpos_key = like(bool(pos_key), {p.P, p.H, p.D}), dpos_query = like(bool(pos_query), {p.P, p.H, p.D});
  with_results(q, [&](auto zero) {
    using R = decltype(zero);
    disentangled_grad<R>(p,
                         {grad_out ? in.heads(*grad_out, "grad_out") : Heads{nullptr, 0, 0, 0},
                          in.heads(out, "out"), grad_lse ? in.rows<R>(*grad_lse, "grad_lse") : nullptr,
                          in.rows<R>(lse, "lse"), dq.mutable_data_ptr(), dk.mutable_data_ptr(),
                          dv.mutable_data_ptr(), dpos_key.mutable_data_ptr(), dpos_query.mutable_data_ptr()},
                         torch_threads);
  });
  return {dq, dk, dv, dpos_key, dpos_query};
}

}  // namespace

#define DISENTANGLED                                                                                     \
  "Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor slots, Tensor? cu_seqlens, " \
  "Tensor? lengths, Tensor? seed, int max_length, float scale, float dropout"

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq_cpu, m) {
  m.def("disentangled_attention(" DISENTANGLED ") -> (Tensor, Tensor)");
  m.def(
      "disentangled_attention_grad(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " DISENTANGLED
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_cpu, CPU, m) {
  m.impl("disentangled_attention", TORCH_BOX(&attend));
  m.impl("disentangled_attention_grad", TORCH_BOX(&attend_grad));
}
