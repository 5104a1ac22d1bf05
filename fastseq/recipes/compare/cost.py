"""What a step of training takes besides time: operator calls, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from fastseq.profiling.memory import Watch
from fastseq.recipes.compare.variant import Variant, matrix_products


def cost(variant: Variant, plan: Sequence[list[int]]) -> dict[str, int | None]:
    """What the forward and backward passes take on the batches of a plan, besides time.

    Returns:
        "ops", operator calls a step on average, and "peak_bytes", the most that its own tensors hold at once; None
        for what is compiled, whose kernels cannot be watched.
    """
    if variant.setup.train.compile:
        return {"ops": None, "peak_bytes": None}
    ops = peak = 0
    for batch in variant.made(plan):
        watch = Watch()
        with matrix_products(variant.setup.train), watch:
            variant.loss(batch).backward()
        variant.optimizer.zero_grad(set_to_none=True)
        ops, peak = ops + watch.ops, max(peak, watch.live.peak)
    return {"ops": round(ops / len(plan)), "peak_bytes": peak}
