"""What a CRF costs: ops called, tensors made and kept, waits for a device; and that it can be exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq.ops import crf

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Record(TorchDispatchMode):
    """The names of the ops called, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:  # an alias: autograd makes one for each tensor it keeps
            self.names.append(str(func))
        for o in out if isinstance(out, tuple | list) else (out,):
            if isinstance(o, Tensor):
                self.largest = max(self.largest, o.untyped_storage().nbytes() // o.element_size())
        return out


def _leaves(case: Case) -> Case:
    return tuple(v.requires_grad_() if v.is_floating_point() else v for v in case)  # type: ignore[return-value]


def test_a_training_step_is_few_ops(backend: str, random_case: Any) -> None:
    x, tags, mask, a, s, e = _leaves(random_case(4, 64, 9))
    with _Record() as record:
        crf.nll_grad(x, tags, mask, a, s, e, None, 0.25)[0].backward()
    assert len(record.names) <= 12, record.names
    with _Record() as record:
        crf.viterbi(x, mask, a, s, e)
    assert len(record.names) <= 4, record.names


def test_little_is_kept_for_the_backward_pass(backend: str, random_case: Any) -> None:
    x, tags, mask, a, s, e = _leaves(random_case(16, 64, 32))
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        crf.nll_grad(x, tags, mask, a, s, e, None, 1.0)[0].backward()
        total = sum(kept.values())
    assert total <= 2.5 * x.nbytes


def test_eager_makes_nothing_of_size_b_t_k_k(random_case: Any) -> None:
    case = random_case(4, 64, 16)
    for run in (
        lambda: crf.eager.nll_grad(*case, None, 1.0),
        lambda: crf.eager.viterbi(case[0], *case[2:]),
        lambda: crf.eager.entropy(case[0], *case[2:]),
        lambda: crf.eager.token_nll(*case),
    ):
        with _Record() as record:
            run()
        assert record.largest <= 4 * case[0].numel()


def test_viterbi_never_waits_for_a_device(random_case: Any) -> None:
    """On the meta device there are no values to wait for: what reads one fails."""
    x, _, mask, a, s, e = (v.to("meta") for v in random_case(3, 5, 4))
    paths, scores = crf.eager.viterbi(x, mask, a, s, e)
    assert (paths.shape, scores.shape) == ((3, 5), (3,))
    assert crf.eager.nbest(x, mask, a, s, e, 3)[0].shape == (3, 3, 5)


class _Module(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def test_export(random_case: Any) -> None:
    x, tags, mask, a, s, e = random_case(2, 5, 3)
    for function, args in ((crf.nll, (x, tags, mask, a, s, e)), (crf.viterbi, (x, mask, a, s, e))):
        exported = torch.export.export(_Module(function), args)
        torch.testing.assert_close(exported.module()(*args), function(*args))
