r"""Attention, softmax(scale q k^T + bias) v: the contract of its two ops, and the mathematics.

Letters: B rows of the batch, N sequences, Sq and Sk positions of queries and keys, Hq and Hk heads, D the head's size.
Hk divides Hq, and the query head h reads the kv head h // (Hq/Hk). For a sequence n with lq queries and lk keys,
query i, key j and offset = lk - lq (the last query is aligned with the last key, as flash_attn has it):

    t_ij = scale q_i . k_j                          then, with a softcap, t_ij = softcap tanh(t_ij / softcap)
    t_ij = t_ij + bias_nhij - slopes_nh |i + offset - j|
    visible(i,j):  j <= i + offset if causal;   j >= i + offset - window_left and j <= i + offset + window_right, each
                   unless negative: a window of -1 is none
    lse_i = logsumexp over visible j of t_ij        p_ij = exp(t_ij - lse_i)
    out_i = sum over visible j of m_ij p_ij v_j     m_ij = keep_ij 65536/(65536 - threshold), 1 without dropout

keep is a hash of (seed, n, h, i, j), see `fastseq.ops.attention.dropout`. With delta_i = grad_out_i.out_i - grad_lse_i:

    dp_ij = m_ij grad_out_i . v_j      dt_ij = p_ij (dp_ij - delta_i)      ds_ij = dt_ij (1 - tanh^2) scale
    dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i      dv_j = sum_i m_ij p_ij grad_out_i      dbias = dt

so that p is made again from lse, and nothing of size Sq*Sk is kept. (Dao et al. 2022, 2023.)

    attention        out (B,Sq,Hq,D) and lse (B,Hq,Sq)
    attention_grad   the gradients to q, k, v and bias, from those of out and lse and from what attention returned

**Conventions**, the same in every backend:

- q (B,Sq,Hq,D) and k, v (B,Sk,Hk,D) are float64, float32, bfloat16 or float16, all of one dtype, which out and their
  gradients have. R is float64 for float64, else float32: lse is R, and products are summed in R; with a half type, p
  and ds may be rounded to it before the next product. Any strides, any D >= 1. Results are contiguous.
- Dense: cu_seqlens_q, cu_seqlens_k and so on are None, each of the B rows is a sequence (N = B), max_q = Sq and
  max_k = Sk. Packed: B = 1, both cu_seqlens are int32 (N+1,) offsets that never fall, and sequence n is the tokens
  cu[n] to cu[n+1]; max_q and max_k are at least the longest. A query of no sequence has out 0 and lse -inf, and tokens
  of no sequence have gradient 0. key_lengths int32 (N,), or None: only the first key_lengths[n] keys of sequence n are.
- bias (N|1,Hq|1,max_q|1,max_k|1) of q's dtype or R, any strides; -inf forbids. Its gradient has its shape and dtype,
  and is empty (0,) if bias is None or bias_grad is False. slopes float32 or float64, (Hq,) or (N,Hq); no gradient.
- dropout in [0,1) needs seed, int64 (1,); 1/131072 and less is none.
- A query with lse -inf (it sees no key, or only forbidden ones) has out 0 and no gradient.
- What is not visible, or beyond the lengths, is never read into a result, be it NaN. Of what is visible, a NaN or +inf
  score makes the query's lse, out and dq NaN, and dk and dv of the keys that it sees; a row v_j or grad_out_i of NaN
  does the same to what it is read into. Exempt are flash_attn and sdpa, kernels of others: with causal or a window,
  they multiply hidden values by 0.
- B, Sq, Sk and N may be 0. cu_seqlens and key_lengths that do not fit raise ValueError on a CPU; on a GPU, where nobody
  waits for them, results are arbitrary.
- Gradients of the gradients are plain torch's, in float64, with Sq*Sk tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention.dot_product import eager, flash_package, reference, samples, sdpa
from fastseq.reasons import needs, no_triton
from fastseq.registry import Op, is_plain, opaque

__all__ = ["attention", "attention_grad", "weights"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_SIZE = 256
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? key_lengths, Tensor? seed, int max_q, int max_k, float scale, bool causal, int window_left, "
    "int window_right, float softcap, float dropout"
)
_GRADS = "Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse"

weights = eager.weights
"""The first 17 arguments -> (N,Hq,max_q,max_k), the p of above: plain torch, which makes it, and differentiable."""


def _result(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _limits(q: Tensor, k: Tensor, *_: Any) -> str | None:
    """What the Triton kernels lack, and that they count in 31 bits."""
    if q.shape[-1] > TRITON_SIZE:
        return f"needs heads of at most {TRITON_SIZE} numbers, got {q.shape[-1]}"
    return None if max(q.numel(), k.numel()) < 2**31 else "needs fewer than 2^31 elements in each tensor"


def _register(op: Op, limits: Any, sdpa_limits: Any, package_limits: Any) -> None:
    """Add the backends of `op`; tensor cores that take bfloat16 and TF32 begin with sm_80."""
    op.compiled("cpu", needs(device="cpu", dtype=FLOATS))
    op.lacks("cuda", "Triton has this op on a GPU")
    tensor_cores, here = {"device": "cuda", "capability": (8, 0)}, __name__
    package = needs(**tensor_cores, limits=package_limits)  # type: ignore[arg-type]
    op.lazy("flash_attn", f"{here}.flash_package:{op.name}", package, flash_package.missing)
    op.lazy("sdpa", f"{here}.sdpa:{op.name}", needs(**tensor_cores, limits=sdpa_limits), sdpa.missing)  # type: ignore[arg-type]
    triton = needs(**tensor_cores, dtype=FLOATS[1:], limits=limits)  # type: ignore[arg-type]
    op.lazy("triton", f"{here}.triton:{op.name}", triton, no_triton)


# ---- attention: output and logsumexp ---------------------------------------------------------------------------------

attention = Op(
    f"attention({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    reference=reference.attention,
    eager=eager.attention,
    fake=lambda q, *_: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_result(q)),
    ),
    samples=samples.forward,
    half_products=True,
)
_register(attention, _limits, sdpa.limits, flash_package.limits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:9])


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 17
    grads = attention_grad(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers, ctx.needs_input_grad[3])
    return *grads[:3], grads[3] if ctx.needs_input_grad[3] else None, *(None,) * 13


attention.autograd(setup=_setup, backward=_backward)


# ---- attention_grad: the gradients -----------------------------------------------------------------------------------


def _fake_grad(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, bias = args[4:8]
    empty = q.new_empty(0, dtype=_result(q) if bias is None else bias.dtype)
    return *(x.new_empty(x.shape) for x in (q, k, v)), bias.new_empty(bias.shape) if _has_bias(args) else empty


def _has_bias(args: Any) -> bool:
    """Whether attention_grad has a gradient to bias."""
    return args[7] is not None and args[21]


attention_grad = Op(
    f"attention_grad({_GRADS}, {_ARGUMENTS}, bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    reference=reference.attention_grad,
    eager=eager.attention_grad,
    fake=_fake_grad,
    samples=samples.backward,
    half_products=True,
)
_register(
    attention_grad,
    lambda *args: _limits(*args[4:]),
    sdpa.limits_of_grad,
    flash_package.limits_of_grad,
)


def _grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[13:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13])


def _grad_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    """The double backward, by `eager`."""
    inputs = (*ctx.saved_tensors, *ctx.numbers)
    if not _has_bias(inputs):
        grad_grads = (*grad_grads[:3], None)
    if torch.is_grad_enabled() and is_plain((*grad_grads, *inputs)):
        found = eager.double_backward(inputs, grad_grads)
    else:
        found = _opaque_double_backward(*grad_grads, *inputs)
        found = tuple(None if x is None else f for x, f in zip(inputs[:8], found, strict=True))
    return *found, *(None,) * 14


attention_grad.autograd(setup=_grad_setup, backward=_grad_backward)


def _double_backward(*args: Any) -> tuple[Tensor, ...]:
    """Below the op boundary: (4 grad_grads, the 22 arguments of attention_grad) -> 8 gradients, (0,) for None."""
    found = eager.double_backward(args[4:], args[:4])
    return tuple(
        w if f is None else f.contiguous() for f, w in zip(found, _fake_double_backward(*args, fill=0), strict=True)
    )


def _fake_double_backward(*args: Any, fill: float | None = None) -> tuple[Tensor, ...]:
    inputs = args[4:12]
    made = (inputs[2].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)
    return tuple(made) if fill is None else tuple(x.fill_(fill) for x in made)


_opaque_double_backward = opaque(
    "attention_grad_backward(Tensor? grad_dq, Tensor? grad_dk, Tensor? grad_dv, Tensor? grad_dbias, "
    f"{_GRADS}, {_ARGUMENTS}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    _fake_double_backward,
)
