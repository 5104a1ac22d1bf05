"""What a step of training takes besides time: operator calls, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastseq.recipes.compare.variant import Variant, matrix_products


class _Watch(TorchDispatchMode):
    """Counts operator calls, and the most bytes of tensors made under it that lived at once (to 1 %)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.peak = self._level = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        result = func(*args, **(kwargs or {}))
        known = {id(value) for value in tree_leaves((args, kwargs))}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and id(value) not in known and value._base is None:
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata in self._live:
            return
        self._live[reference.cdata] = (reference, storage.nbytes())
        self._level += storage.nbytes()
        if self._level > 1.01 * self.peak:  # only then is it worth asking which of them are gone
            self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
            self._level = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._level)


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
        with matrix_products(variant.setup.train), _Watch() as watch:
            variant.loss(batch).backward()
        variant.optimizer.zero_grad(set_to_none=True)
        ops, peak = ops + watch.ops, max(peak, watch.peak)
    return {"ops": round(ops / len(plan)), "peak_bytes": peak}
