"""The CRF benchmarks: shapes and rivals only.

    loss        loss and all gradients through the public modules of both, on the same parameters
    viterbi     fastseq's `viterbi` (tensors) against pytorch-crf's `decode`
    decode      `decode` (lists of tags) of both
    accuracy    a table: emission gradients and log-likelihood against float64, by number of tags

Lengths are ragged, uniform in [T/2, T], and the mask is right padding. "call overhead" is a loss and its
gradients at B=1, T=2: what a call costs before there is any work, which bounds the speed-up at a small shape.
The floor counts 3 N K^2 multiply-adds for loss and gradients (forward, backward, transition counts) and N K^2
max-adds for the search, N being the positions that are on; a max-add is two instructions where a multiply-add
is one, so the search's share of the floor is for orientation only.

On a GPU there are larger batches as well, and a second floor, the bytes that cannot but be moved, with s bytes an
element: for loss and gradients N K s of emissions read, B T K s of their gradients written, and 8 B T + B T of tags and
mask read; for the search N K s read, B T of mask, and 8 B T of tags written; and the parameters once, or twice with
gradients. At these sizes a GPU is held up by the T steps, each of which needs the one before, and not by its memory.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.registry import OPS
from fastseq_benchmarks import crf_truth
from fastseq_benchmarks.common import backends_of, cases_of, forced, gradient_error
from fastseq_benchmarks.crf_truth import Inputs, Paths
from fastseq_benchmarks.results import Table
from fastseq_benchmarks.runner import Case, Rival, Shape, Suite

__all__ = ["LARGE_BATCHES", "LETTERS", "PEER", "SHAPES", "SUITES", "TABLES", "no_peer"]

LETTERS = "B,T,K"
SHAPES: list[Shape] = [(32, 64, 9), (32, 128, 25), (64, 256, 64), (8, 1024, 128), (16, 128, 512)]
LARGE_BATCHES: list[Shape] = [(1024, 64, 9), (512, 128, 25), (256, 256, 64)]  # for a GPU
LOSS_GOALS = dict(zip(SHAPES, (100, 180, 190, 180, 130), strict=True))
EAGER_GOALS = {SHAPES[0]: 4, SHAPES[1]: 6, SHAPES[2]: 15, SHAPES[4]: 40}
VITERBI_GOALS = dict(zip(SHAPES, (100, 150, 100, 100, 100), strict=True))

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PEER = "pytorch-crf"
PEER_TOLERANCE = 0.1  # in float32 at T=1024 its gradients are up to 0.07 off, and it is timed for all that
TIE = 1e-6  # two paths whose scores differ by less, relatively, are the same to float32
ACCURACY_K = (9, 25, 64, 128)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Normal emissions and parameters, uniform tags, lengths uniform in [T/2, T], the first row full."""
    B, T, K = shape
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(T // 2, 1), T + 1, (B,), generator=g)
    lengths[0] = T
    x, tags = torch.randn(B, T, K, generator=g), torch.randint(K, (B, T), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    A, start, end = (torch.randn(s, generator=g).mul_(0.5) for s in ((K, K), (K,), (K,)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (x.to(dtype), tags, mask, A.to(wide), start.to(wide), end.to(wide))
    return Inputs(*(t.to(device) for t in tensors))


# ---- rivals ---------------------------------------------------------------------------------------------


def _load(crf: nn.Module, inputs: Inputs) -> nn.Module:
    """Give a CRF module, of either package, the parameters of `inputs`."""
    state = {
        "transitions": inputs.transitions,
        "start_transitions": inputs.start,
        "end_transitions": inputs.end,
    }
    crf.to(inputs.emissions.device, inputs.transitions.dtype).load_state_dict(state)
    return crf


def no_peer() -> str:
    """Why pytorch-crf is not there, or nothing."""
    try:
        importlib.import_module("torchcrf")
    except ImportError:
        return "not installed: pip install 'fastseq-kernels[bench]'"
    return ""


def _peer(inputs: Inputs) -> tuple[nn.Module | None, str]:
    """pytorch-crf's module, in the emissions' dtype; or why there is none."""
    if missing := no_peer():
        return None, missing
    crf = importlib.import_module("torchcrf").CRF(inputs.shape[2], batch_first=True)
    return _load(crf, inputs).to(inputs.emissions.dtype), ""


def _training_step(crf: nn.Module, inputs: Inputs) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    """(a call: the loss, then its gradients; the same call, giving them by name)."""
    x = inputs.emissions.clone().requires_grad_()
    tags, mask = inputs.tags, inputs.mask
    modules_name = {"transitions": "transitions", "start": "start_transitions", "end": "end_transitions"}
    leaves = {"emissions": x} | {ours: crf.get_parameter(name) for ours, name in modules_name.items()}
    parameters = list(leaves.values())

    def step() -> Tensor:
        for p in parameters:
            p.grad = None
        loss: Tensor = -crf(x, tags, mask=mask, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def named() -> dict[str, Tensor]:
        loss = step().detach().clone()
        return {"loss": loss} | {name: p.grad for name, p in leaves.items() if p.grad is not None}

    return step, named


def _fastseq(op: str, args: Sequence[Any], call: Callable[[], Any], result: Callable[[], Any]) -> list[Rival]:
    """The same fastseq call on each backend that `op` has for the device of its arguments `args`."""
    context = functools.partial(forced, grad=OPS[op].backward is not None)
    return [
        Rival(f"fastseq {b.name}", call, result, functools.partial(context, b.name), missing=b.refusal(*args) or "")
        for b in backends_of(op, args[0].device.type)
    ]


def _loss_rivals(inputs: Inputs) -> list[Rival]:
    K = inputs.shape[2]
    device, dtype = inputs.emissions.device.type, inputs.emissions.dtype
    peer, missing = _peer(inputs)
    step, named = _training_step(peer, inputs) if peer is not None else (_never, _never)
    tiny = make_inputs((1, 2, K), dtype, device, 0)
    ours = _load(fastseq.nn.CRF(K, batch_first=True), inputs)
    overhead, _ = _training_step(_load(fastseq.nn.CRF(K, batch_first=True), tiny), tiny)
    return [
        Rival(PEER, step, named, tolerance=PEER_TOLERANCE, missing=missing),
        *_fastseq("crf_nll_grad", (*vars(inputs).values(), None, 1.0), *_training_step(ours, inputs)),
        Rival("call overhead", overhead, probe=True),
    ]


def _search_rivals(method: str, inputs: Inputs) -> list[Rival]:
    x, mask = inputs.emissions, inputs.mask
    peer, missing = _peer(inputs)
    search = getattr(_load(fastseq.nn.CRF(inputs.shape[2], batch_first=True), inputs), method)

    def ours() -> Any:
        return search(x, mask)

    def lists() -> list[list[int]]:
        if method == "decode":
            return list(ours())
        return [[tag for tag in row if tag >= 0] for row in ours()[0].tolist()]

    def theirs() -> Any:
        return peer.decode(x, mask) if peer is not None else None  # type: ignore[operator]

    peers = Rival(PEER, theirs, context=torch.no_grad, missing=missing)
    model = (inputs.transitions, inputs.start, inputs.end)
    return [peers, *_fastseq("crf_viterbi", (x, mask, *model), ours, lists)]


def _never() -> Any:
    raise RuntimeError("a rival that is missing was called")


# ---- checks ---------------------------------------------------------------------------------------------


def wrong_paths(result: list[list[int]], truth: Paths) -> float:
    """The share of rows whose path is not the best one, nor tied with it in float32."""
    if len(result) != len(truth.paths):
        return 1.0
    wrong = 0
    for b, (path, true) in enumerate(zip(result, truth.paths, strict=True)):
        best = float(truth.scores[b])
        wrong += path != true and not crf_truth.path_score(truth.inputs, b, path) >= best - TIE * abs(best)
    return wrong / max(len(result), 1)


def _traffic(inputs: Inputs, *, grad: bool) -> float:
    """The bytes that cannot but be moved: see the module docstring."""
    (B, T, K), size = inputs.shape, inputs.emissions.element_size()
    parameters = (K * K + 2 * K) * inputs.transitions.element_size()
    passes = 2 if grad else 1
    return (inputs.tokens + (B * T if grad else 0)) * K * size + 9.0 * B * T + passes * parameters


# ---- suites ---------------------------------------------------------------------------------------------


def loss_cases(shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> list[Case]:
    """Loss and all gradients; errors are relative where the true values are above 1."""
    return _cases(
        "loss",
        (shapes, dtype, device),
        {"fastseq cpu": LOSS_GOALS, "fastseq eager": EAGER_GOALS},
        rivals=_loss_rivals,
        truth=crf_truth.loss_and_gradients,
        check=functools.partial(gradient_error, least=1.0),
        tolerance=TOLERANCE[dtype],
        work=lambda inputs: 3.0 * inputs.tokens * inputs.shape[2] ** 2,
        traffic=functools.partial(_traffic, grad=True) if device == "cuda" else None,
    )


def search_cases(suite: str, shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> list[Case]:
    """The best path: `suite` is the method of `fastseq.nn.CRF`."""
    return _cases(
        suite,
        (shapes, dtype, device),
        {"fastseq cpu": VITERBI_GOALS} if suite == "viterbi" else {},
        rivals=functools.partial(_search_rivals, suite),
        truth=crf_truth.best_paths,
        check=wrong_paths,
        tolerance=0.0,
        work=lambda inputs: 1.0 * inputs.tokens * inputs.shape[2] ** 2,
        traffic=functools.partial(_traffic, grad=False) if device == "cuda" else None,
    )


def _cases(
    suite: str,
    where: tuple[Sequence[Shape], torch.dtype, str],
    goals: Mapping[str, Mapping[Shape, int]],
    **fields: Any,
) -> list[Case]:
    def goals_of(shape: Shape) -> dict[str, float]:
        return {rival: by[shape] for rival, by in goals.items() if shape in by}

    fields |= {"family": "crf", "suite": suite, "letters": LETTERS}
    return cases_of(*where, make_inputs=make_inputs, goals=goals_of, **fields)


def accuracy(dtype: torch.dtype, device: str, T: int = 1024, tag_counts: Sequence[int] = ACCURACY_K) -> Table:
    """Errors against float64 at B=4 and a long T: emission gradients absolute, log-likelihood relative."""
    title = f"crf accuracy   B,T = 4,{T}   {dtype} on {device}: the largest error against float64"
    table = Table(title, ["K", "rival", "emission gradients", "log-likelihood, relative"], [])
    for K in tag_counts:
        inputs = make_inputs((4, T, K), dtype, device, seed=0)
        truth = crf_truth.loss_and_gradients(inputs)
        for rival in _loss_rivals(inputs):
            if rival.probe or rival.missing:
                continue
            with rival.context():
                result = (rival.result or rival.call)()
            gradients = (result["emissions"].double() - truth["emissions"]).abs().max()
            value = ((result["loss"].double() - truth["loss"]) / truth["loss"]).abs()
            table.rows.append([str(K), rival.name, f"{float(gradients):.1e}", f"{float(value):.1e}"])
    return table


SUITES = {
    name: Suite(cases, LETTERS, SHAPES, LARGE_BATCHES)
    for name, cases in {
        "loss": loss_cases,
        "viterbi": functools.partial(search_cases, "viterbi"),
        "decode": functools.partial(search_cases, "decode"),
    }.items()
}
TABLES: dict[str, Callable[[torch.dtype, str], Table]] = {"accuracy": accuracy}
