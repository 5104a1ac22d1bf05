"""The memory of a step: what autograd keeps for the backward pass, and the most that lives at once (both to 1 %)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live:
    """Adds up the storages that it is shown for as long as they live.

    Attributes:
        peak: the most bytes that lived at once.
        at_peak: those bytes by the place that each storage was shown at.
    """

    def __init__(self) -> None:
        self.peak = self._level = 0
        self.at_peak: Counter[Hashable] = Counter()
        self._known: dict[int, tuple[StorageWeakRef, int, Hashable]] = {}

    def add(self, tensor: Tensor, place: Hashable = None) -> None:
        """Counts the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata in self._known:
            return
        self._known[reference.cdata] = (reference, storage.nbytes(), place)
        self._level += storage.nbytes()
        if self._level > 1.01 * self.peak:  # only then is it worth asking which of them are gone
            self.look()

    def look(self) -> None:
        """Brings the peak up to date."""
        self._known = {key: item for key, item in self._known.items() if not item[0].expired()}
        self._level = sum(size for _, size, _ in self._known.values())
        if self._level > self.peak:
            self.peak, self.at_peak = self._level, Counter()
            for _, size, place in self._known.values():
                self.at_peak[place] += size


def _has_memory(value: Any) -> bool:
    """Whether it is a tensor with a storage of its own: no sparse one, and none that torch.compile traces with."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, adds up in `live` what forward passes save for backward, by the place that saves it.

    Args:
        place: says where the step is, at each tensor saved.
        parameters: the addresses of storages that are there anyway, and are not counted.
    """

    def __init__(self, place: Callable[[], Hashable], parameters: Collection[int]) -> None:
        self.live = Live()
        self._saving = False

        def pack(tensor: Tensor) -> Tensor:
            if torch.compiler.is_compiling():  # a compiler would take this into its graph
                return tensor
            self._saving = True
            if _has_memory(tensor) and tensor.untyped_storage().data_ptr() not in parameters:
                self.live.add(tensor, place())
            return tensor

        def unpack(tensor: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and self._saving:  # backward begins, and all is there
                self.live.look()
                self._saving = False
            return tensor

        super().__init__(pack, unpack)


class Watch(TorchDispatchMode):
    """While it is entered, counts operator calls (`ops`), and in `live` the bytes of tensors made under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: int = 0
        self.live: Live = Live()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        result = func(*args, **(kwargs or {}))
        known = {id(value) for value in tree_leaves((args, kwargs))}
        for value in tree_leaves(result):
            if _has_memory(value) and id(value) not in known and value._base is None:
                self.live.add(value)
        return result
