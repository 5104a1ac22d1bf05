r"""The output distribution of a pointer-generator, with its gradient and its best words: contract and mathematics.

Letters: B batch, T target steps, S source positions, V vocabulary, H hidden. For row n = (b, t) with logits z, gate g
(the logit of generating), attention a over the source, and the source words src of b in the extended vocabulary:

    final(v) = sigmoid(g) softmax(z)_v [v < V] + sigmoid(-g) c_v        c_v = sum_{i: src_i = v} a_i
                                                                        (See, Liu, Manning 2017, equation 9)

    pointer_distribution        final, (B,T,V+num_oov)
    pointer_distribution_grad   of <G, final>, with m = sum_v softmax(z)_v G_v, k = sum_i a_i G[src_i]:
                                    d/dz_v = sigmoid(g) softmax(z)_v (G_v - m)      d/da_i = sigmoid(-g) G[src_i]
                                    d/dg = sigmoid(g) sigmoid(-g) (m - k)
    pointer_topk                the k best words of that with z = hidden weight^T + bias, and their log-probabilities

**The copy mass is a segment sum.** The source words of b are sorted once, stably, for all of its T rows: the mass of a
word is then a sum over neighbours, in the order of the source, with no atomics and the same bits in every run.

**The best words** are among the k best logits and the source words: copying only ever adds, so a word that is not
copied has k words before it if k logits are greater. Log-probabilities are logaddexp(A, C), with A = logsigmoid(g) +
z_v - logsumexp(z) and C = logsigmoid(-g) + log c_v, and hold where probabilities underflow.

**Conventions**, the same in every op and backend:

- `logits` (B,T,V) and `hidden` (B,T,H) are float64, float32, bfloat16 or float16. R, the type of `attention` (B,T,S),
  `gate` (B,T), `bias` (V,), `grad` and all results, is float64 if these are, else float32; half types are read as they
  are. A gradient has the type of what it is the gradient of. V is at least 1; B, T, S and num_oov may be 0.
- `weight` (V,H) has the type of hidden, whose products then have that type too; or it is R, and hidden is widened.
- `source_ids` (B,S) int64: words below V + num_oov; a negative id is a position that does not exist, whose attention is
  not read, with gradient 0. A larger id raises ValueError, on a CPU; a GPU kernel makes the rows of its b NaN instead;
  eager on a GPU does not look. The best words have no upper limit of ids.
- -inf as a logit forbids a word. A gate of +inf or -inf generates, or copies, with certainty.
- NaN or +inf in a row's logits, logits of -inf alone, a gate of NaN, and NaN or an infinity in its attention make all
  of that row NaN, and no other row; so do they, and NaN in the words of `grad` that are read, for the row's gradients.
- The best words are sorted by falling probability; of equal ones the smaller id is first. `attention` must not be
  negative there. The ids of a row of NaN are 0 to k-1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import library
from fastseq.ops.pointer.distribution import compiled, eager, reference, samples
from fastseq.reasons import needs
from fastseq.registry import Backend, Op, is_plain, opaque

__all__ = ["distribution", "distribution_grad", "topk"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROWS = "Tensor logits, Tensor attention, Tensor gate, Tensor source_ids, int num_oov"
NO_TRITON = "no Triton kernel in this version: the CUDA library or eager runs it on the GPU"


def countable(*args: Any) -> str | None:
    """The limit of the GPU kernels: rows, words and positions are counted in 31 bits."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    most = max(max(t.shape[0] * t.shape[1], *t.shape) for t in tensors if t.dim() > 1) + args[-1]
    return None if most < 2**31 - 4096 else "needs fewer than 2^31 - 4096 rows, words and source positions"


def _on_gpus(op: Op) -> None:
    op.compiled("cuda", needs(device="cuda", dtype=FLOATS, limits=countable))
    op.lacks("triton", NO_TRITON)


# ---- the distribution ------------------------------------------------------------------------------------------------

distribution = Op(
    f"pointer_distribution({_ROWS}) -> Tensor",
    reference=reference.distribution,
    eager=eager.distribution,
    fake=lambda logits, attention, gate, source_ids, num_oov: attention.new_empty(
        (*logits.shape[:2], logits.shape[2] + num_oov)
    ),
    samples=samples.rows,
)
distribution.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_on_gpus(distribution)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_oov = inputs[4]
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *distribution_grad(grad, *ctx.saved_tensors, ctx.num_oov), None, None


distribution.autograd(setup=_setup, backward=_backward)


# ---- its gradient, which has one too ---------------------------------------------------------------------------------

distribution_grad = Op(
    f"pointer_distribution_grad(Tensor grad, {_ROWS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.distribution_grad,
    eager=eager.distribution_grad,
    fake=lambda grad, logits, attention, gate, source_ids, num_oov: tuple(
        x.new_empty(x.shape) for x in (logits, attention, gate)
    ),
    samples=samples.rows_and_grad,
)
distribution_grad.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_on_gpus(distribution_grad)


def _grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_oov = inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])


def _double_backward(*args: Any) -> tuple[Tensor, ...]:
    """Below the op boundary: (3 grad_grads, grad, logits, attention, gate, source_ids, num_oov) -> 4 gradients."""
    found = eager.double_backward(args[:3], args[3:8])
    return tuple(torch.zeros_like(x) if f is None else f for f, x in zip(found, args[3:7], strict=True))


_opaque_double_backward = opaque(
    "pointer_distribution_grad_backward(Tensor? grad_logits, Tensor? grad_attention, Tensor? grad_gate, Tensor grad, "
    f"{_ROWS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    lambda *args: tuple(x.new_empty(x.shape) for x in args[3:7]),
)


def _grad_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    """By `eager`, in plain torch: the second derivative is rarely asked for, and any order of it exists there."""
    inputs = ctx.saved_tensors
    if all(g is None for g in grad_grads):
        return (None,) * 6
    if torch.is_grad_enabled() and is_plain((*grad_grads, *inputs)):
        return *eager.double_backward(grad_grads, inputs), None, None
    return *_opaque_double_backward(*grad_grads, *inputs, ctx.num_oov), None, None


distribution_grad.autograd(setup=_grad_setup, backward=_grad_backward)


# ---- the best words: no derivative -----------------------------------------------------------------------------------

topk = Op(
    "pointer_topk(Tensor hidden, Tensor weight, Tensor? bias, Tensor attention, Tensor gate, Tensor source_ids, int k) "
    "-> (Tensor, Tensor)",
    reference=reference.topk,
    eager=eager.topk,
    fake=lambda hidden, weight, bias, attention, gate, source_ids, k: (
        gate.new_empty((*hidden.shape[:2], k)),
        gate.new_empty((*hidden.shape[:2], k), dtype=torch.int64),
    ),
    samples=samples.heads_and_k,
)
if (_missing := library.why_not("cpu")) is None:  # the matrix product is torch's: so not Op.compiled
    topk.register(Backend("cpu", compiled.topk, needs(device="cpu", dtype=FLOATS), device="cpu"))
else:
    topk.lacks("cpu", _missing)
for _name in ("cuda", "triton"):
    topk.lacks(_name, "no GPU kernel in this version; eager runs it on the GPU")
topk.no_derivative()
