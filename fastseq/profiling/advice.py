"""What could be faster, in plain words, each with the figure that was measured for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW

from fastseq import host
from fastseq.gpu_watch import Sample
from fastseq.profiling.inputs import Inputs
from fastseq.profiling.marks import Marks, Path
from fastseq.profiling.timeline import DATA, OPTIMIZER, Reading
from fastseq.profiling.tree import Node, Phase
from fastseq.profiling.trial import Trial, is_patched

NOTHING = "Nothing stood out."

PRODUCTS = re.compile(
    r"aten::(linear|addmm|mm|bmm|baddbmm|matmul|einsum|lstm|gru|mkldnn_rnn_layer_backward|_thnn_fused_lstm_cell"
    r"|conv[123]d|convolution(_backward)?|_?scaled_dot_product\w*)$"
)
"""Operators that are matrix products, or little else."""

LITTLE = 0.03
"""A gain that is not worth a change, nor always there."""

MUCH_PYTHON = 0.3
MUCH_LOADING = 0.1
MUCH_OPTIMIZER = 0.05
MUCH_PADDING = 0.15
MANY_PRODUCTS = 0.3
MANY_CALLS, SMALL_CALL_US = 300, 20
IDLE_GPU, ROOM_ON_GPU = 70.0, 0.5


@dataclass
class Evidence:
    """All that was measured.

    Attributes:
        tree: the time by place.
        whole: of the step.
        reading: of the trace.
        marks: which modules and optimizers there were.
        inputs: what the modules were given.
        step_ms: of a step that is not watched.
        device: that it ran on.
        gpu: what the GPU did meanwhile; None without one.
    """

    tree: Node
    whole: Phase
    reading: Reading
    marks: Marks
    inputs: Inputs
    step_ms: float
    device: torch.device
    gpu: Sample | None


def advice(found: Evidence) -> list[str]:
    """What the figures say, apart from what would have to be tried first."""
    sayings = (_loading, _optimizer, _padding, _python, _bf16, _gpu, _waits)
    return [said for said in (say(found) for say in sayings) if said is not None]


def of_trial(trial: Trial, root: Path, tree: Node) -> str:
    """What `fastseq.patch` would give, beside the share of the layers that it knows.

    Args:
        trial: of the module at `root`.
        root: its place.
        tree: the time by place.
    """
    if trial.error is not None:
        return f"fastseq.patch(model) was tried, and the step failed: {trial.error}"
    nodes = [_find(tree, root if name == "(root)" else (*root, *name.split("."))) for name, _ in trial.changed]
    share = sum({node.path: node.whole.share for node in nodes}.values())
    names = [f"{name} ({cls})" for name, cls in trial.changed[:3]]
    more = f" and {len(trial.changed) - 3} more" if len(trial.changed) > 3 else ""
    ratio = trial.before_ms / trial.after_ms
    would = f"would give {ratio:.2f}x" if ratio > 1 + LITTLE else f"would give next to nothing here ({ratio:.2f}x)"
    return (
        f"{', '.join(names)}{more}: {share:.0%} of the step. fastseq.patch(model) {would}: {trial.before_ms:.2f} to "
        f"{trial.after_ms:.2f} ms a step, timed in turns."
    )


def _find(tree: Node, path: Path) -> Node:
    """The node of a path, or the innermost one that has it in it."""
    for part in path:
        inner = tree.parts.get(part) or tree.parts.get("*")
        if inner is None:
            break
        tree = inner
    return tree


def _loading(found: Evidence) -> str | None:
    share = _share(found.tree, DATA)
    if share < MUCH_LOADING:
        return None
    return f"Loading data is {share:.0%} of the step: worker processes (num_workers of a DataLoader) load meanwhile."


def _optimizer(found: Evidence) -> str | None:
    share = _share(found.tree, OPTIMIZER)
    slow = [
        optimizer
        for optimizer in found.marks.optimizers
        if type(optimizer) in (Adagrad, Adam, AdamW, SGD) and not all(g.get("fused") for g in optimizer.param_groups)
    ]
    if share < MUCH_OPTIMIZER or not slow:
        return None
    name = type(slow[0]).__name__
    return f"The optimizer is {share:.0%} of the step: {name}(..., fused=True) is one pass over the weights."


def _padding(found: Evidence) -> str | None:
    """Of the outermost module that pays for padding: fastseq's own, patched ones included, do not."""
    modules = found.marks.modules
    patched = [path for path, module in modules.items() if is_patched(module)]
    for path, (real, every) in sorted(found.inputs.positions.items(), key=lambda item: len(item[0])):
        ours = type(modules[path]).__module__.startswith(("fastseq.nn", "fastseq.models"))
        if ours or any(path[: len(outer)] == outer for outer in patched) or real > (1 - MUCH_PADDING) * every:
            continue
        return (
            f"{1 - real / every:.0%} of a batch's positions are padding ({real} of {every} are real), as "
            f"{'.'.join(path[1:]) or path[0]} reads it: batches of like length (fastseq.host.bucket_batches) have "
            "less, and fastseq's layers leave it out."
        )
    return None


def _python(found: Evidence) -> str | None:
    whole, calls = found.whole, found.whole.calls
    if calls < MANY_CALLS:
        return None
    share, call_us = whole.python_ms / found.step_ms, 1e3 * (whole.ms - whole.python_ms) / calls
    if share < MUCH_PYTHON and call_us > SMALL_CALL_US:
        return None
    return (
        f"{calls:.0f} operator calls a step, of {call_us:.0f} us each, and {share:.0%} of the step is Python between "
        "them: fewer and larger calls help (a loop over time steps as one op, torch.compile, a larger batch)."
    )


def _bf16(found: Evidence) -> str | None:
    products = sum(us for times in found.reading.op_us.values() for name, us in times.items() if PRODUCTS.search(name))
    share = products / max(found.reading.us, 1e-9)
    full = any(p.dtype == torch.float32 for root in found.marks.roots for p in root.parameters())
    if share < MANY_PRODUCTS or found.inputs.autocast or not full or not host.multiplies_bf16(found.device.type):
        return None
    return (
        f"{share:.0%} of the step is matrix products in float32, and this machine multiplies bfloat16: "
        f'torch.autocast("{found.device.type}", torch.bfloat16).'
    )


def _gpu(found: Evidence) -> str | None:
    gpu = found.gpu
    if gpu is None or gpu.utilisation is None or gpu.utilisation > IDLE_GPU:
        return None
    if gpu.memory_used > ROOM_ON_GPU * gpu.memory_total:
        return None
    return f"{gpu}: it waits for work, and half of its memory is free: a larger batch costs little more time a step."


def _waits(found: Evidence) -> str | None:
    waits = found.reading.waits / max(found.reading.steps, 1)
    if waits < 1:
        return None
    return (
        f"The host waits for the GPU {waits:.0f} times a step (.item(), .cpu(), a printed loss, an index that depends "
        "on values): each time the GPU is idle until new work is launched."
    )


def _share(tree: Node, place: Path) -> float:
    node = tree.parts.get(place[0])
    return node.whole.share if node is not None else 0.0
