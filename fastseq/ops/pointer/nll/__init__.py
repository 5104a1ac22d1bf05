r"""The pointer-generator's loss, -log p(target): the contract of its two ops, and the mathematics.

Letters: B batch, T target steps, S source positions, V vocabulary, H hidden, N = B*T rows. A row is a target y with its
hidden state h, attention a over the source and gate g. A word is generated with probability sigmoid(g), else copied:

    z = W h + bias      lse = logsumexp(z)
    A = logsig(g) + z_y - lse                              -inf if y >= V: it is not in the vocabulary
    C = logsig(-g) + log sum_{i: source_i = y} a_i         -inf if y is not in the source
    log p(y) = logaddexp(A, C)                             (See et al. 2017, section 2.2)
    value = -(1 - s) log p(y) - (s / V) sum_{v < V} log p(v) + k lse^2

with s = label_smoothing and k = z_loss. No epsilon: all in log space, so that p(y) may be e^-1000. The extended
distribution, (B,T,V + what is out of vocabulary), does not exist. With r = exp(A - log p(y)), the posterior probability
that y was generated, and w the weight of the row (s = k = 0 here):

    d/dz_j = w r (softmax_j - [j = y])         dh = W^T dz, dW = dz h^T: cross-entropy, with a row weight from the data
    d/dg   = w (sigmoid(g) - r)
    d/da_i = -w exp(logsig(-g) - log p(y)) [source_i = y]

Label smoothing needs log p(v) of each v, which is A_v except for the source's words; `smoothing` has the closed form. A
row whose y is out of vocabulary (r = 0), with s = k = 0, needs no logits.

**CopyNet** (Gu et al. 2016), where gate is None: copy holds scores e, and p is one softmax over words and positions,

    p(y) = [exp z_y + sum_{i: source_i = y} exp e_i] / [sum_v exp z_v + sum_i exp e_i]

which is the same with a = softmax(e), g = lse(z) - lse(e). An e of -inf is a position that is padding. s = k = 0.

    pointer_nll        (B,T) the values
    pointer_nll_grad   sum weights * value, (), and its gradients to hidden, weight, bias, copy and gate, in one pass

**Conventions**, the same in every backend:

- hidden (B,T,H) float64, float32, bfloat16 or float16: its dtype is that of the matrix products. R, the dtype of the
  results, is float64 for float64, else float32. copy (B,T,S), gate (B,T), bias (V,) and weights (B,T) are R; weight
  (V,H) has hidden's dtype or R, and R is rounded to hidden's. A gradient has the dtype of its argument, is contiguous,
  and is empty (0,) for an argument that is None.
- Ids are int64. A target of ignore_index has value 0 and no part in any gradient, whatever its row holds; nor has a
  target of weight 0 in the sum and its gradient. Any other negative target raises ValueError on a CPU; a GPU kernel,
  which nobody waits for, makes its row NaN; eager on a GPU does not look. A target >= V is out of the vocabulary.
- A negative source id is a position that does not exist: its attention is not read, and its gradient is 0.
- -inf in bias forbids a word. p(y) = 0 gives the value +inf, and a row of value +inf has no gradient.
- NaN or +inf in a row makes its results NaN, and no other row's; weight and bias, which all rows share, get NaN. What
  is not read does not count: attention where the source is not the target is read for label smoothing and for CopyNet
  alone, and the hidden state of a row that needs no logits is not.
- B, T and S may be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastseq.ops.derivatives import is_one
from fastseq.ops.pointer.nll import eager, reference, samples
from fastseq.reasons import needs, no_triton
from fastseq.registry import Op, is_plain, opaque

__all__ = ["loss", "nll", "nll_grad"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROWS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor copy, Tensor? gate, Tensor source_ids, Tensor target_ids, "
    "int ignore_index, float label_smoothing, float z_loss"
)
_GRADS = "(Tensor, Tensor, Tensor, Tensor, Tensor"


def _like(tensors: Sequence[Tensor | None], lead: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, empty gradients: (0,) for None, of the dtype of results."""
    result = torch.float64 if lead.dtype == torch.float64 else torch.float32
    return tuple(lead.new_empty(0, dtype=result) if x is None else x.new_empty(x.shape) for x in tensors)


def _limits(*args: Any) -> str | None:
    """What the Triton kernels lack, and that they count in 31 bits."""
    (batch, steps, size), positions, vocabulary = args[0].shape, args[3].shape[2], len(args[1])
    if args[8]:
        return "label smoothing has no Triton kernel"
    most = max(batch * steps * max(size, positions), vocabulary * size)
    return None if most < 2**31 else "needs fewer than 2^31 elements in each tensor"


def _compiled(op: Op) -> None:
    """Add the kernels of `op` for CPUs and for GPUs: those are for tensor cores that take bfloat16 and TF32."""
    op.compiled("cpu", needs(device="cpu", dtype=FLOATS))
    op.lacks("cuda", "Triton has this op on a GPU")
    triton = needs(device="cuda", dtype=FLOATS[1:], capability=(8, 0), limits=_limits)
    op.lazy("triton", f"{__name__}.triton:{op.name.removeprefix('pointer_')}", triton, no_triton)


# ---- nll: the value, a target each -----------------------------------------------------------------------------------

nll = Op(
    f"pointer_nll({_ROWS}) -> Tensor",
    reference=reference.nll,
    eager=eager.nll,
    fake=lambda hidden, weight, bias, copy, gate, source_ids, target_ids, *_: copy.new_empty(target_ids.shape),
    samples=samples.targets,
    half_products=True,
)
_compiled(nll)


def _nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _nll_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    _, *grads = nll_grad(*inputs, *ctx.numbers, grad)
    return *_where_given(grads, inputs), *(None,) * 5


def _where_given(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The five gradients, None for an argument that is None."""
    return [None if x is None else g for g, x in zip(grads, inputs[:5], strict=True)]


nll.autograd(setup=_nll_setup, backward=_nll_backward)


# ---- nll_grad: the weighted sum and its gradients, together ----------------------------------------------------------

nll_grad = Op(
    f"pointer_nll_grad({_ROWS}, Tensor? weights) -> {_GRADS}, Tensor)",
    reference=reference.nll_grad,
    eager=eager.nll_grad,
    fake=lambda *args: (args[3].new_empty(()), *_like(args[:5], args[0])),
    samples=samples.weighted_targets,
    half_products=True,
)
_compiled(nll_grad)


def _nll_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers, ctx.handed_over = inputs[7:10], False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], inputs[10], *output[1:])


def _double_backward(*args: Any) -> tuple[Tensor, ...]:
    """Below the op boundary: (grad_total, 5 grad_grads, the 11 arguments of nll_grad) -> 6 gradients."""
    found = eager.double_backward(args[6:17], args[0], args[1:6])
    wanted = _like((*args[6:11], args[16]), args[6])
    given = (*found[:5], found[10])
    return tuple(torch.zeros_like(w) if f is None else f.contiguous() for f, w in zip(given, wanted, strict=True))


_opaque_double_backward = opaque(
    "pointer_nll_grad_backward(Tensor? grad_total, Tensor? grad_hidden, Tensor? grad_weight, Tensor? grad_bias, "
    f"Tensor? grad_copy, Tensor? grad_gate, {_ROWS}, Tensor? weights) -> {_GRADS}, Tensor)",
    _double_backward,
    lambda *args: _like((*args[6:11], args[16]), args[6]),
)


def _nll_grad_backward(ctx: Any, grad_total: Tensor | None, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    """Of the total: the gradients at hand, times grad_total. Of the gradients: the double backward, by `eager`."""
    *tensors, weights = ctx.saved_tensors[:8]
    grads, inputs = ctx.saved_tensors[8:], (*tensors, *ctx.numbers, weights)
    grad_grads = tuple(_where_given(grad_grads, tensors))
    if any(g is not None for g in grad_grads):
        if torch.is_grad_enabled() and is_plain((grad_total, *grad_grads, *inputs)):
            return eager.double_backward(inputs, grad_total, grad_grads)
        *found, to_weights = _opaque_double_backward(grad_total, *grad_grads, *inputs)
        return *_where_given(found, tensors), *(None,) * 5, None if weights is None else to_weights
    if grad_total is None:
        return (None,) * 11
    if torch.is_grad_enabled():  # create_graph: what is at hand has no graph, so have it computed by an op that does
        scaled = grad_total.expand(tensors[6].shape) if weights is None else weights * grad_total
        _, *grads = nll_grad(*inputs[:10], scaled)
    elif ctx.handed_over:  # a second backward pass: what was handed over is the user's, who may have changed it
        grads = torch._foreach_mul(nll_grad.run(*inputs)[1:], grad_total)
    elif is_one(grad_total):
        ctx.handed_over = True
        grads = [g.data for g in grads]  # no longer watched for changes in place
    else:
        grads = torch._foreach_mul(grads, grad_total)
    to_weights = grad_total * nll(*inputs[:10]) if ctx.needs_input_grad[10] else None
    return *_where_given(grads, tensors), *(None,) * 5, to_weights


nll_grad.autograd(setup=_nll_grad_setup, backward=_nll_grad_backward)


class _Loss(torch.autograd.Function):
    """nll_grad(*args)[0] as one output, which spares autograd the five that a training step never asks about."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = nll_grad.run(*args)
        nll_grad.setup(ctx, args, output)
        return cast(Tensor, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return nll_grad.backward(ctx, grads[0], *(None,) * 5)


_loss: Any = super(torch.autograd.Function, _Loss).apply  # see Op.autograd


def loss(*args: Any) -> Tensor:
    """nll_grad(*args)[0]: what a training step calls."""
    return cast(Tensor, _loss(*args) if is_plain(args) else nll_grad(*args)[0])
