r"""Linear-chain conditional random fields: the contract of the op family, and its mathematics.

Letters: B sequences, T positions, K tags. A row b is the positions t of `emissions[b]` that are on; call them 1..L. The
score of a path y and the log-partition are

    s(y)  = start[y_1] + sum_t emissions[t, y_t] + sum_{t>1} transitions[y_{t-1}, y_t] + end[y_L]
    log Z = log sum_y exp s(y)                               (Lafferty et al. 2001; Sutton & McCallum 2012, section 4.1)

and everything here is a sum over paths, or a search through them, in O(L K^2):

    crf_nll          nll_b = log Z - s(tags); without tags, log Z itself
    crf_nll_grad     scale * sum_b weights_b nll_b, and its gradient, in one forward-backward
    crf_token_nll    -log p(y_t | y_1..y_{t-1}, x) for each position: nll split by the chain rule
    crf_viterbi      the best path and its score;   crf_nbest   the n best, best first
    crf_entropy      -sum_y p(y) log p(y);          crf_sample  exact samples from p(y)

**Forward-backward in a scaled domain.** With E = exp(A - max A), X_t = exp(x_t - max x_t):

    alpha_t ~ (alpha_{t-1} E) * X_t        scaled to sum 1;  log Z = sum_t log(scale_t) + the maxima taken out
    beta_t  ~ E (X_{t+1} * beta_{t+1})     scaled so that alpha_t . beta_t = 1
    d log Z / d x_t = alpha_t * beta_t     d log Z / d A = E * sum_t alpha_{t-1}^T (X_t * beta_t / scale_t)

A step is a (B,K) x (K,K) product, with no exp and no log of a (B,K,K) tensor, and no graph is kept. What this can lose
is a path that falls so far behind that it underflows, and later is the only one left. It is never lost silently: (1) a
tag that a nonzero alpha reaches over a nonzero edge, yet whose alpha is below 2^-90, marks its row; (2) an entry of E
or X that underflows counts as a pruned edge, and the row is marked unless log Z proves that the edge could not matter
(the best conceivable path with it is 30 nats below log Z). Marked rows are done again, in the float64 log domain.

**Conventions**, the same in every op and backend:

- `emissions` (B,T,K) float64, float32, bfloat16 or float16. `transitions` (K,K), from x to, `start` (K,), `end` (K,)
  are float64 if emissions are, else float32; so are results. Half types are read as they are, with float32 arithmetic.
- `mask` (B,T) bool or None: any pattern. The sequence is the positions that are on; `tags` of -100 are off as well.
- A row with no position on: nll 0, entropy 0, an empty path with score 0, gradient 0.
- -inf forbids. A row in which nothing is possible has log Z = -inf and nll = +inf, with gradient 0; a row in which only
  its `tags` are impossible has nll = +inf and the gradient of any other row: expected minus observed.
- A row of weight 0 has no part in a sum or a gradient, whatever it holds.
- NaN or +inf in a row makes that row's results NaN, and no other's (`transitions` touch every row).
- A tag id outside [0, K) that is not -100 raises ValueError, on a CPU. A GPU kernel, which nobody waits for, makes its
  row NaN instead; eager on a GPU does not look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastseq.ops.crf import eager, reference, samples
from fastseq.ops.derivatives import is_one, pull_back
from fastseq.reasons import needs, no_triton
from fastseq.registry import Op, is_plain, opaque

__all__ = ["entropy", "log_likelihood", "nbest", "nll", "nll_grad", "sample", "token_nll", "viterbi"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_TAGS = 1024  # csrc/crf/cuda/kernels.h
TRITON_TAGS = 128  # the widest table that a program of triton.py can hold
_PARAMETERS = "Tensor transitions, Tensor start, Tensor end"
_MODEL = f"Tensor emissions, Tensor? mask, {_PARAMETERS}"
_PATHS = f"Tensor emissions, Tensor? tags, Tensor? mask, {_PARAMETERS}"


def _rows(emissions: Tensor, *trailing: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, *trailing) output, float64 or float32 unless said otherwise."""
    default = torch.float64 if emissions.dtype == torch.float64 else torch.float32
    return emissions.new_empty((emissions.shape[0], *trailing), dtype=dtype or default)


def at_most(limit: int) -> Callable[..., str | None]:
    """The limits of a GPU kernel: on K, and that positions and emissions of a row are counted in 31 bits."""

    def why_not(*args: Any) -> str | None:
        batch, steps, tags = args[0].shape
        if tags > limit:
            return f"needs at most {limit} tags, got {tags}"
        return (
            None if max(steps * tags, batch * steps) < 2**31 else "needs fewer than 2^31 emissions a row, and positions"
        )

    return why_not


def _on_gpus(op: Op) -> None:
    """Add the GPU kernels of `op`: the compiled library's, which is tried first, and Triton's."""
    op.compiled("cuda", needs(device="cuda", dtype=FLOATS, limits=at_most(CUDA_TAGS)))
    triton = needs(device="cuda", dtype=FLOATS, capability=(7, 5), limits=at_most(TRITON_TAGS))
    op.lazy("triton", f"{__name__}.triton:{op.name.removeprefix('crf_')}", triton, no_triton)


def _only_eager_on_gpus(op: Op) -> None:
    for backend in ("cuda", "triton"):
        op.lacks(backend, "no GPU kernel in this version; eager runs it on the GPU")


# ---- nll: the value, a row each --------------------------------------------------------------------------------------

nll = Op(
    f"crf_nll({_PATHS}) -> Tensor",
    reference=reference.nll,
    eager=eager.nll,
    fake=lambda emissions, *_: _rows(emissions),
    samples=samples.paths,
)
nll.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_on_gpus(nll)


def _nll_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _nll_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    emissions, tags, mask, *parameters = ctx.saved_tensors
    _, *grads = nll_grad(emissions, tags, mask, *parameters, grad, 1.0)
    return grads[0], None, None, *grads[1:]


nll.autograd(setup=_nll_setup, backward=_nll_backward)


# ---- nll_grad: the weighted sum and its gradient, together -----------------------------------------------------------


def _fake_nll_grad(
    emissions: Tensor,
    tags: Tensor | None,
    mask: Tensor | None,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    weights: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    parameters = (p.new_empty(p.shape) for p in (transitions, start, end))
    return start.new_empty(()), torch.empty_like(emissions), *parameters


nll_grad = Op(
    f"crf_nll_grad({_PATHS}, Tensor? weights, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.nll_grad,
    eager=eager.nll_grad,
    fake=_fake_nll_grad,
    samples=samples.weighted_paths,
)
nll_grad.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_on_gpus(nll_grad)


def _nll_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.scale, ctx.handed_over = inputs[7], False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[1:])


def _double_backward(*args: Any) -> tuple[Tensor, ...]:
    """Below the op boundary: (grad_total, 4 grad_grads, the 7 tensors of nll_grad, scale) -> 5 gradients."""
    found = eager.double_backward(args[5:12], args[12], args[0], args[1:5])
    wanted = args[5], *args[8:11], args[8].new_zeros(args[5].shape[0])
    return tuple(torch.zeros_like(w) if f is None else f for f, w in zip((found[0], *found[3:]), wanted, strict=True))


_opaque_double_backward = opaque(
    "crf_nll_grad_backward(Tensor? grad_total, Tensor? grad_x, Tensor? grad_a, Tensor? grad_s, Tensor? grad_e, "
    f"{_PATHS}, Tensor? weights, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    lambda *args: (*(a.new_empty(a.shape) for a in (args[5], *args[8:11])), args[8].new_empty(args[5].shape[0])),
)


def _nll_grad_backward(ctx: Any, grad_total: Tensor | None, *grad_grads: Tensor | None) -> tuple[Any, ...]:
    """Of the total: the gradients at hand, times grad_total. Of the gradients: the double backward, by `eager`."""
    *inputs, grad_x, grad_a, grad_s, grad_e = ctx.saved_tensors
    weights = inputs[6]
    if any(g is not None for g in grad_grads):
        if torch.is_grad_enabled() and is_plain((grad_total, *grad_grads, *inputs)):
            return *eager.double_backward(inputs, ctx.scale, grad_total, grad_grads), None
        x, a, s, e, w = _opaque_double_backward(grad_total, *grad_grads, *inputs, ctx.scale)
        return x, None, None, a, s, e, w if weights is not None else None, None
    if grad_total is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # create_graph: what is at hand has no graph, so have it computed by an op that does
        scaled = grad_total.expand(grad_x.shape[0]) if weights is None else weights * grad_total
        _, x, a, s, e = nll_grad(*inputs[:6], scaled, ctx.scale)
    elif ctx.handed_over:  # a second backward pass: what was handed over is the user's, who may have changed it
        x, a, s, e = torch._foreach_mul(nll_grad.run(*inputs, ctx.scale)[1:], grad_total)
    elif is_one(grad_total):
        ctx.handed_over = True
        x, a, s, e = grad_x.data, grad_a.data, grad_s.data, grad_e.data  # no longer watched for changes in place
    else:
        x, a, s, e = torch._foreach_mul((grad_x, grad_a, grad_s, grad_e), grad_total)
    grad_weights = grad_total * ctx.scale * nll(*inputs[:6]) if ctx.needs_input_grad[6] else None
    return x, None, None, a, s, e, grad_weights, None


nll_grad.autograd(setup=_nll_grad_setup, backward=_nll_grad_backward)


class _LogLikelihood(torch.autograd.Function):
    """-nll_grad(*args)[0] as one output, which spares autograd the four that a training step never asks about.

    The gradients kept are those of +nll: where the user negates, as one does, they are handed over as they are.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = nll_grad.run(*args)
        nll_grad.setup(ctx, args, output)
        return cast(Tensor, output[0].neg_())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return nll_grad.backward(ctx, None if grads[0] is None else -grads[0])


_log_likelihood: Any = super(torch.autograd.Function, _LogLikelihood).apply  # see Op.autograd


def log_likelihood(*args: Any) -> Tensor:
    """-nll_grad(*args)[0]: what a loss calls. In plain eager mode, 25 us a step less."""
    return cast(Tensor, _log_likelihood(*args) if is_plain(args) else -nll_grad(*args)[0])


# ---- ops whose derivative is that of their eager implementation ------------------------------------------------------


def _differentiate_eagerly(op: Op, differentiable: Any) -> None:
    """Give `op` a backward pass that runs its plain-torch form again under autograd."""

    def floats(inputs: Any) -> list[int]:
        return [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]

    def run(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found = pull_back(differentiable, inputs, grad)
        gradients = ((found[i], inputs[i]) for i in floats(inputs))
        return tuple(torch.zeros_like(x) if gradient is None else gradient for gradient, x in gradients)

    arguments = op.schema.partition("(")[2].partition(")")[0]
    hidden = opaque(
        f"{op.name}_backward(Tensor grad, {arguments}) -> (Tensor, Tensor, Tensor, Tensor)",
        run,
        lambda grad, *inputs: tuple(inputs[i].new_empty(inputs[i].shape) for i in floats(inputs)),
    )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and is_plain((grad, *inputs)):  # create_graph: differentiable again
            return pull_back(differentiable, inputs, grad)
        found = dict(zip(floats(inputs), hidden(grad, *inputs), strict=True))
        return tuple(found.get(i) for i in range(len(inputs)))

    op.autograd(setup=setup, backward=backward)


token_nll = Op(
    f"crf_token_nll({_PATHS.replace('Tensor? tags', 'Tensor tags')}) -> Tensor",
    reference=reference.token_nll,
    eager=eager.token_nll,
    fake=lambda emissions, *_: _rows(emissions, emissions.shape[1]),
    samples=samples.tagged_paths,
)
token_nll.lacks("cpu", "no compiled kernel in this version; eager runs in the float64 log domain")
_only_eager_on_gpus(token_nll)
_differentiate_eagerly(token_nll, eager.token_nll)

entropy = Op(
    f"crf_entropy({_MODEL}) -> Tensor",
    reference=reference.entropy,
    eager=eager.entropy,
    fake=lambda emissions, *_: _rows(emissions),
    samples=samples.models,
)
entropy.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_only_eager_on_gpus(entropy)
_differentiate_eagerly(entropy, eager.entropy)


# ---- searches and samples: no derivative -----------------------------------------------------------------------------

viterbi = Op(
    f"crf_viterbi({_MODEL}) -> (Tensor, Tensor)",
    reference=reference.viterbi,
    eager=eager.viterbi,
    fake=lambda emissions, *_: (_rows(emissions, emissions.shape[1], dtype=torch.int64), _rows(emissions)),
    samples=samples.models,
)
viterbi.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_on_gpus(viterbi)
viterbi.no_derivative()

nbest = Op(
    f"crf_nbest({_MODEL}, int n) -> (Tensor, Tensor)",
    reference=reference.nbest,
    eager=eager.nbest,
    fake=lambda emissions, mask, transitions, start, end, n: (
        _rows(emissions, n, emissions.shape[1], dtype=torch.int64),
        _rows(emissions, n),
    ),
    samples=samples.models_and_n,
)
nbest.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_only_eager_on_gpus(nbest)
nbest.no_derivative()

sample = Op(
    f"crf_sample(Tensor uniforms, {_MODEL}) -> Tensor",
    reference=reference.sample,
    eager=eager.sample,
    fake=lambda uniforms, *_: torch.empty_like(uniforms, dtype=torch.int64, memory_format=torch.contiguous_format),
    samples=samples.uniforms_and_models,
)
sample.compiled("cpu", needs(device="cpu", dtype=FLOATS))
_only_eager_on_gpus(sample)
sample.no_derivative()
