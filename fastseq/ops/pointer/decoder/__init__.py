r"""All steps of the pointer-generator's decoder: the contract of the op family, and its mathematics.

Letters: B rows, T target steps, S source positions, H hidden, E embedding, M memory size, A attention size. An LSTM
with additive attention over a memory, coverage, and input feeding (Bahdanau et al. 2015; See, Liu & Manning 2017):

    x_t        = inputs_t + w_context ctx_{t-1}
    h_t, c_t   = LSTMCell(x_t, (h_{t-1}, c_{t-1}))                        gates in torch's order: i, f, g, o
    q_t        = w_query [h_t; c_t] + b_query
    e_ti       = v . tanh(features_i + q_t + w_coverage cov_ti)
    a_t        = softmax of e_t over the positions that are on in the mask, 0 elsewhere
    ctx_t      = sum_i a_ti memory_i
    closs_t    = sum_i min(a_ti, cov_ti)
    cov_{t+1}  = cov_t + a_t

    pointer_decoder        (x, hiddens, cells, contexts, attention: (B,T,size); the last coverage (B,S); closs (B,T))
    pointer_decoder_grad   the recurrent part of its gradient, from the gradients of those

A step of a row is 4H(E+H) + EM + 2HA multiplications for its matrices and S(2A+M), with S A tanh, for its attention.
The second is most of it, and reads S(A+M) numbers: from the cache, if they fit.

**The gradient.** Only inputs and outputs are kept, nothing of size T S A: pointer_decoder_grad makes gates, queries,
tanh and coverage again. With u = 1 - tanh^2, and a' the gradient of a (which has a part from cov and closs):

    d e_t      = a_t (a'_t - a_t . a'_t)                  d features_i += d e_ti u_ti v
    d q_t      = sum_i d e_ti u_ti v                      d v          += sum_i d e_ti tanh_ti
    d cov_ti  += (d e_ti u_ti v) . w_coverage             d w_coverage += sum_i cov_ti d e_ti u_ti v

then back through the cell, to d inputs_t = d x_t and d ctx_{t-1} = w_context^T d x_t. It hands out the gradients of the
gates, query and input of each step. From these, those of six weights are a product each, over all B T rows, outside it.

**Conventions**, the same in every backend:

- All tensors are float64, or all are float32. memory (Bm,S,M), features (Bm,S,A), mask (Bm,S) bool or None. B is a
  multiple of Bm: row b reads memory b // (B // Bm), so that a beam shares its source. The gradient needs B = Bm.
- The mask may have any pattern. What memory, features and coverage hold where it is off is not read, NaN neither:
  attention and gradient are 0 there, closs is a sum over the positions that are on, coverage goes through as it came.
- A row with no position on: attention, context and closs are 0.
- w_coverage None: no such term in e. Coverage and its loss are computed all the same.
- At a tie of a and cov, the gradient of their minimum is a's.
- S, T and B may be 0. NaN in a row stays in that row, and in the steps from where it is; it makes the gradients of the
  weights NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.pointer.decoder import eager, reference, samples
from fastseq.reasons import needs
from fastseq.registry import Op, is_plain, opaque

__all__ = ["decoder", "decoder_grad"]

FLOATS = (torch.float64, torch.float32)
CUDA_SIZES = {"H": 512, "E": 512, "M": 1024, "A": 1024, "S": 1 << 18}  # csrc/pointer/cuda/decoder.h
_INPUTS = (
    "Tensor inputs, Tensor memory, Tensor features, Tensor? mask, Tensor hidden, Tensor cell, Tensor context, "
    "Tensor coverage, Tensor w_context, Tensor w_ih, Tensor w_hh, Tensor bias, Tensor w_query, Tensor b_query, "
    "Tensor? w_coverage, Tensor v"
)
_GRADS = (
    "Tensor? grad_x, Tensor? grad_hiddens, Tensor? grad_cells, Tensor? grad_contexts, Tensor? grad_attention, "
    "Tensor? grad_coverage, Tensor? grad_coverage_loss"
)
_KEPT = "Tensor x, Tensor hiddens, Tensor cells, Tensor contexts, Tensor attention"


def at_most(sizes: dict[str, int]) -> Callable[..., str | None]:
    """The limits of a kernel, on sizes by their letters."""

    def why_not(*args: Any) -> str | None:
        inputs, memory, features, _, hidden = args[7:12] if len(args) > 16 else args[:5]
        found = {"H": hidden.shape[1], "E": inputs.shape[2], "M": memory.shape[2], "A": features.shape[2]}
        found["S"] = memory.shape[1]
        over = [f"{name} at most {limit}, got {found[name]}" for name, limit in sizes.items() if found[name] > limit]
        return f"needs {'; '.join(over)}" if over else None

    return why_not


def _compiled(op: Op) -> None:
    """Add the compiled kernels of `op`, and say why there is no other."""
    op.compiled("cpu", needs(device="cpu", dtype=FLOATS))
    op.compiled("cuda", needs(device="cuda", dtype=FLOATS, limits=at_most(CUDA_SIZES)))
    op.lacks("triton", "no Triton kernel: a recurrence of small products is the CUDA library's, else eager's")


def _fake(inputs: Tensor, memory: Tensor, features: Tensor, mask: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
    hidden, cell, context, coverage = rest[:4]
    rows, positions = inputs.shape[:2], coverage.shape[1:]
    shapes = (inputs.shape[2:], *(t.shape[1:] for t in (hidden, cell, context)), positions)
    return (
        *(inputs.new_empty((*rows, *shape)) for shape in shapes),
        coverage.new_empty(coverage.shape),
        inputs.new_empty(rows),
    )


def _fake_grad(*args: Any) -> tuple[Tensor, ...]:
    inputs, memory, features, _, hidden, cell, context, coverage, _, w_ih, *_, w_coverage, v = args[7:23]
    rows = inputs.shape[:2]
    shapes = [inputs.shape, (*rows, w_ih.shape[0]), (*rows, v.shape[0])]
    shapes += [t.shape for t in (memory, features, hidden, cell, context, coverage)]
    return tuple(v.new_empty(shape) for shape in (*shapes, (0,) if w_coverage is None else v.shape, v.shape))


decoder = Op(
    f"pointer_decoder({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.decoder,
    eager=eager.decoder,
    fake=_fake,
    samples=samples.decoders,
)
_compiled(decoder)

_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
decoder_grad = Op(
    f"pointer_decoder_grad({_GRADS}, {_INPUTS}, {_KEPT}) -> {_GRADIENTS}",
    reference=reference.decoder_grad,
    eager=eager.decoder_grad,
    fake=_fake_grad,
    samples=samples.gradients,
)
_compiled(decoder_grad)
decoder_grad.no_derivative()

# The same, where a transform or a compiler is at work: an attempt to differentiate it again is an error, not a zero.
_opaque_grad = opaque(
    f"pointer_decoder_backward({_GRADS}, {_INPUTS}, {_KEPT}) -> {_GRADIENTS}", decoder_grad.run, _fake_grad
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[:5])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Of everything but the weights: pointer_decoder_grad. Of the weights: a product each, where it is wanted."""
    saved = ctx.saved_tensors
    if all(g is None for g in grads):
        return (None,) * 16
    plain = is_plain((*grads, *saved))
    if plain and torch.is_grad_enabled():  # create_graph: differentiable again
        return eager.pull_back(saved[:16], grads)
    found = (decoder_grad.run if plain else _opaque_grad)(*grads, *saved)
    d_inputs, d_gates, d_query, d_memory, d_features, d_hidden, d_cell, d_context, d_coverage, d_w_coverage, d_v = found
    with torch.autocast(d_inputs.device.type, enabled=False):
        weights = _weight_gradients(ctx.needs_input_grad[8:14], d_inputs, d_gates, d_query, saved)
    states = d_memory, d_features, None, d_hidden, d_cell, d_context, d_coverage
    return d_inputs, *states, *weights, None if saved[14] is None else d_w_coverage, d_v


def _weight_gradients(
    wanted: tuple[bool, ...], d_inputs: Tensor, d_gates: Tensor, d_query: Tensor, saved: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Those of w_context, w_ih, w_hh, bias, w_query, b_query."""
    hidden, context, (x, hiddens, cells, contexts) = saved[4], saved[6], saved[16:20]
    d_inputs, d_gates, d_query = (d.flatten(0, 1) for d in (d_inputs, d_gates, d_query))
    return (
        d_inputs.t() @ eager.shifted(context, contexts).flatten(0, 1) if wanted[0] else None,
        d_gates.t() @ x.flatten(0, 1) if wanted[1] else None,
        d_gates.t() @ eager.shifted(hidden, hiddens).flatten(0, 1) if wanted[2] else None,
        d_gates.sum(0) if wanted[3] else None,
        d_query.t() @ torch.cat((hiddens, cells), 2).flatten(0, 1) if wanted[4] else None,
        d_query.sum(0) if wanted[5] else None,
    )


decoder.autograd(setup=_setup, backward=_backward)
