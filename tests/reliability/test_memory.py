"""Ten thousand training steps: the process does not grow, and Python keeps no more objects than before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastseq import flash_attn
from fastseq import functional as F
from fastseq.nn import CRF, PointerGeneratorDecoder

FIRST, LAST = 1_000, 10_000
KIB = 512  # what the C library's bookkeeping may take; a leak of 64 bytes a step would be more
OBJECTS = 50

Step = Callable[[], Tensor]


def resident() -> int:
    """KiB of this process that are in memory, once the C library has given back what it can."""
    ctypes.CDLL(None).malloc_trim(0)  # glibc's heap settles for some thousand steps, which is no leak
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0])


def growth(step: Callable[[int], object]) -> tuple[int, int]:
    """KiB and Python objects that were added from step 1,000 to step 10,000."""
    for number in range(FIRST):
        step(number)
    gc.collect()
    before = resident(), len(gc.get_objects())
    for number in range(FIRST, LAST):
        step(number)
    gc.collect()
    return resident() - before[0], len(gc.get_objects()) - before[1]


def crf() -> tuple[list[Tensor], Step]:
    module, x = CRF(5, batch_first=True), torch.randn(2, 6, 5, requires_grad=True)
    tags, mask = torch.randint(5, (2, 6)), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])

    def step() -> Tensor:
        module.viterbi(x, mask)
        return -module(x, tags, mask)

    return [x, *module.parameters()], step


def pointer() -> tuple[list[Tensor], Step]:
    decoder = PointerGeneratorDecoder(9, 4, 4, 6)
    words, memory, source = torch.randn(2, 3, 4), torch.randn(2, 5, 6, requires_grad=True), torch.randint(11, (2, 5))
    targets, output = torch.randint(11, (2, 3)).clamp(max=8), decoder.output

    def step() -> Tensor:
        out = decoder(words, memory)
        args = out.hidden, output.weight, output.bias, out.attention, out.gate, source
        F.pointer_generator_topk(*(a.detach() for a in args), 2)
        p = F.pointer_generator_distribution(output(out.hidden), out.attention, out.gate, source, 2)
        return F.pointer_generator_nll(*args, targets) + p.square().sum() + out.coverage_loss.mean()

    return [memory, *decoder.parameters()], step


def attention() -> tuple[list[Tensor], Step]:
    q, k, v = (torch.randn(2, 5, 2, 4, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)

    def step() -> Tensor:
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        out = flash_attn.flash_attn_varlen_func(*packed, bounds, bounds, 6, 6, dropout_p=0.1, causal=True)
        return F.attention(q, k, v, dropout_p=0.1).sum() + out.sum()

    return [q, k, v], step


def disentangled() -> tuple[list[Tensor], Step]:
    q, k, v = (torch.randn(2, 5, 2, 4, requires_grad=True) for _ in range(3))
    tables = [torch.randn(8, 2, 4, requires_grad=True) for _ in range(2)]

    def step() -> Tensor:
        return F.disentangled_attention(q, k, v, *tables, position_buckets=4, max_position=8).sum()

    return [q, k, v, *tables], step


@pytest.mark.slow
@pytest.mark.parametrize("family", [crf, pointer, attention, disentangled])
def test_training_steps_keep_nothing(family: Callable[[], tuple[list[Tensor], Step]]) -> None:
    torch.set_num_threads(1)
    parameters, step = family()
    optimizer = torch.optim.SGD(parameters, lr=1e-6)

    def train(_: int) -> None:
        step().backward()
        optimizer.step()
        optimizer.zero_grad()

    kib, objects = growth(train)
    assert kib <= KIB
    assert objects <= OBJECTS


@pytest.mark.slow
def test_the_loops_report_keeps_nothing(tmp_path: Path) -> None:
    """What a run shows of each update, without an evaluation in between."""
    from fastseq.recipes.config import RecipeConfig
    from fastseq.recipes.report import Reporter

    config = RecipeConfig.model_validate({"run_dir": tmp_path, "train": {"tensorboard": False, "progress": False}})
    model, x = nn.Linear(4, 1), torch.randn(2, 4)
    with Reporter(config, 0, LAST, main=True, device=torch.device("cpu")) as reporter:

        def update(number: int) -> None:
            position: Any = SimpleNamespace(step=number + 1)
            reporter.update(position, model(x).sum().detach(), 0.1)

        kib, objects = growth(update)
    assert kib <= KIB
    assert objects <= OBJECTS + 1000  # of the last points of the bar, from which rich tells its speed
