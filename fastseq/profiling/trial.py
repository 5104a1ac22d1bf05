"""`fastseq.patch` tried on the model that is profiled: timed in turns with the model as it is, and undone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastseq.profiling.record import Step, seconds

TURNS = 2
"""Times that each is timed."""

WARM_STEPS = 2


@dataclass
class Trial:
    """What came of it.

    Attributes:
        changed: names and classes of the modules that were swapped, without those inside of others.
        before_ms: a step of the model as it is.
        after_ms: a step of the patched one.
        error: why the patched step failed, in which case nothing was timed.
    """

    changed: list[tuple[str, str]]
    before_ms: float = 0.0
    after_ms: float = 0.0
    error: str | None = None


def is_patched(module: nn.Module) -> bool:
    """Whether `fastseq.patch` has swapped this very module."""
    import fastseq

    return fastseq.integrations.RECORD in vars(module)


def try_patch(model: nn.Module, step: Step, steps: int, device: torch.device) -> Trial | None:
    """Tries it; the weights go on training, and all else is as it was.

    Returns:
        What came of it; None where there is nothing to swap, or where something is swapped already.
    """
    import fastseq

    if any(is_patched(module) for module in model.modules()):
        return None
    changed = _outermost([(line.module, line.cls) for line in fastseq.patch(model).changed])
    try:
        if not changed:
            return None
        seconds(step, WARM_STEPS, device)
        times = {"before": 0.0, "after": 0.0}
        for _ in range(TURNS):
            times["after"] += seconds(step, steps, device)
            fastseq.unpatch(model)
            times["before"] += seconds(step, steps, device)
            fastseq.patch(model)
    except Exception as error:  # a model that patch does not suit is no reason to lose the other figures
        return Trial(changed, error=f"{type(error).__name__}: {error}")
    finally:
        fastseq.unpatch(model)
    per_step = 1e3 / (TURNS * steps)
    return Trial(changed, per_step * times["before"], per_step * times["after"])


def _outermost(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    names = {name for name, _ in lines}

    def inside(name: str) -> bool:
        parts = name.split(".")
        return "(root)" in names - {name} or any(".".join(parts[:i]) in names for i in range(1, len(parts)))

    return [(name, cls) for name, cls in lines if not inside(name)]
