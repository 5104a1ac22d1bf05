r"""Disentangled attention, as in DeBERTa: the contract of its two ops, and the mathematics.

Letters: B rows, N sequences, S positions, H heads, D head size, P position slots. Self-attention, where a score has up
to three terms: content to content, content to position (what a query meets), position to content (what a key meets):

    t_ij = scale (q_i . k_j + q_i . pos_key[slot(i - j)] + k_j . pos_query[slot(i - j)])
    lse_i = logsumexp_j t_ij      p_ij = exp(t_ij - lse_i)      out_i = sum_j m_ij p_ij v_j

(He et al. 2021, section 3.1; its versions 2 and 3 have the slots grow with the logarithm of far distances.) m is 1, or
with dropout 0 or the inverse of what is kept, a hash of the seed and the place: see `fastseq.ops.attention.dropout`.
With g the gradient to out, and delta_i = g_i . out_i - (the gradient to lse)_i:

    dt_ij = p_ij (m_ij g_i . v_j - delta_i)        ds = scale dt                dv_j = sum_i m_ij p_ij g_i
    dq_i = sum_j ds_ij (k_j + pos_key[slot(i-j)])  dk_j = sum_i ds_ij (q_i + pos_query[slot(i-j)])
    dpos_key[s] = sum over (i,j) with slot(i-j) = s of ds_ij q_i            dpos_query[s] = the same of ds_ij k_j

    disentangled_attention         out (B,S,H,D) and lse (B,H,S), in nats
    disentangled_attention_grad    from the gradients to them, those to q, k, v, pos_key and pos_query

**Conventions**, the same in every backend:

- q, k, v (B,S,H,D), any strides, and the tables pos_key and pos_query (P,H,D) have one dtype: float64, float32,
  bfloat16 or float16. R is float64 for float64, else float32: lse's dtype, and that of sums. Half types are read as
  they are and multiplied into float32. A gradient has the dtype of its argument, is contiguous, and is empty (0,) for
  an argument that is None.
- A table that is None is a term that is not there.
- Dense: cu_seqlens is None, max_length = S, and each of the B rows is a sequence, of which the first lengths[b]
  positions exist (int32 (B,); None: all). Packed: B = 1, cu_seqlens int32 (N+1,) has the boundaries, lengths is None
  and max_length is at least the longest sequence. A position that does not exist is not read; its out is 0, its lse
  -inf, its gradient 0.
- slots (2M-1,) int32, M >= max_length: slot(d) = slots[d + M - 1], in [0,P), never falls as d grows. The slot of a
  distance that no two positions have is not read.
- dropout in [0,1) needs a seed, int64 (1,). The probability is rounded to a multiple of 2^-16.
- A NaN or +inf among a row's scores makes the row NaN, and what the row has a part in: dk and dv of its sequence and
  head, and the tables' gradients of its head. A NaN in a table makes the rows NaN that meet it, and may make others of
  its head so; other heads it does not touch. Where grad_out is None, a NaN in v may count or not. A row whose scores
  are all -inf has out 0 and no gradient.
- Lengths that are negative, that fall or that end past S raise ValueError on a CPU.
- B, N, S and H may be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.disentangled import eager, reference, samples
from fastseq.reasons import needs, no_triton
from fastseq.registry import Op, is_plain, opaque

__all__ = ["attend", "attend_grad"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? pos_key, Tensor? pos_query, Tensor slots, Tensor? cu_seqlens, "
    "Tensor? lengths, Tensor? seed, int max_length, float scale, float dropout"
)
_GRADS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
TRITON_SIZE = 256  # the largest D of the Triton kernels


def _like(tensors: Sequence[Tensor | None], lead: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, empty gradients: (0,) for None, of the dtype of `lead`."""
    return tuple(lead.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _result(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_backends(op: Op, first: int) -> None:
    """Add the kernels of `op`, whose argument number `first` is q."""

    def limits(*args: Any) -> str | None:
        size = args[first].shape[3]
        return None if size <= TRITON_SIZE else f"has kernels for D <= {TRITON_SIZE}, got {size}"

    op.compiled("cpu", needs(device="cpu", dtype=FLOATS))
    op.lacks("cuda", "Triton has this op on a GPU")
    triton = needs(device="cuda", dtype=FLOATS[1:], capability=(8, 0), limits=limits)
    op.lazy("triton", f"{__name__}.triton:{op.name}", triton, no_triton)


# ---- attend: the output and the log of what was summed ---------------------------------------------------------------


def _attend_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, s, h, _d = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, s), dtype=_result(q.dtype))


attend = Op(
    f"disentangled_attention({_INPUTS}) -> (Tensor, Tensor)",
    reference=reference.attend,
    eager=eager.attend,
    fake=_attend_fake,
    samples=samples.batches,
    half_products=True,
)
_add_backends(attend, 0)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], *output)


def _attend_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    grads = attend_grad(grad_out, grad_lse, out, lse, *inputs, *ctx.numbers)
    return *_where_given(grads, inputs[:5]), *(None,) * 7


def _where_given(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, None for an argument that is None."""
    return [None if x is None else g for g, x in zip(grads, inputs, strict=True)]


attend.autograd(setup=_attend_setup, backward=_attend_backward)


# ---- attend_grad: from the gradients to the results, those to the arguments ------------------------------------------

_WITH_RESULTS = f"Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUTS}"

attend_grad = Op(
    f"disentangled_attention_grad({_WITH_RESULTS}) -> {_GRADS}",
    reference=reference.attend_grad,
    eager=eager.attend_grad,
    fake=lambda *args: _like(args[4:9], args[2]),
    samples=samples.batches_with_gradients,
    half_products=True,
)
_add_backends(attend_grad, 4)


def _attend_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[13:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13])


def _double_backward(*args: Any) -> tuple[Tensor, ...]:
    """Below the op boundary: (5 grad_grads, the 16 arguments of attend_grad) -> the gradients to the first nine."""
    found = eager.double_backward(args[5:], args[:5])
    wanted = _like(args[5:14], args[7])
    return tuple(torch.zeros_like(w) if f is None else f.contiguous() for f, w in zip(found[:9], wanted, strict=True))


_opaque_double_backward = opaque(
    "disentangled_attention_grad_backward(Tensor? grad_dq, Tensor? grad_dk, Tensor? grad_dv, Tensor? grad_dpos_key, "
    f"Tensor? grad_dpos_query, {_WITH_RESULTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    _double_backward,
    lambda *args: _like(args[5:14], args[7]),
)


def _attend_grad_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    inputs = *tensors, *ctx.numbers
    grad_grads = tuple(_where_given(grad_grads, tensors[4:9]))
    if all(g is None for g in grad_grads):
        return (None,) * 16
    if torch.is_grad_enabled() and is_plain((*grad_grads, *inputs)):
        return eager.double_backward(inputs, grad_grads)
    return *_where_given(_opaque_double_backward(*grad_grads, *inputs), tensors[:9]), *(None,) * 7


attend_grad.autograd(setup=_attend_grad_setup, backward=_attend_grad_backward)
