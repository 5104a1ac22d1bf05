"""`fastseq.nn.CRF` is pytorch-crf's class: the same values, gradients, paths, parameters and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchcrf
from torch import Tensor

from fastseq.nn import CRF

B, T, K = 5, 7, 4


def pair(batch_first: bool, dtype: torch.dtype = torch.float64) -> tuple[CRF, torchcrf.CRF]:
    ours, theirs = CRF(K, batch_first).to(dtype), torchcrf.CRF(K, batch_first).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(batch_first: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Random emissions, tags, and a right-padded mask, in the layout asked for."""
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    tensors = torch.randn(B, T, K, dtype=dtype), torch.randint(K, (B, T)), mask
    return tensors if batch_first else tuple(x.transpose(0, 1) for x in tensors)  # type: ignore[return-value]


def gradients(crf: torch.nn.Module, x: Tensor, *args: object) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    value = crf(x, *args)
    leaves = [x, crf.start_transitions, crf.end_transitions, crf.transitions]
    weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    return value, list(torch.autograd.grad((value * weights).sum(), leaves))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_log_likelihood_and_gradients(batch_first: bool, reduction: str, masked: bool) -> None:
    ours, theirs = pair(batch_first)
    x, tags, mask = batch(batch_first)
    args = tags, mask if masked else None, reduction
    value, grads = gradients(ours, x, *args)
    their_value, their_grads = gradients(theirs, x, *args)
    torch.testing.assert_close(value, their_value)
    torch.testing.assert_close(grads, their_grads)
    with torch.no_grad():  # another op serves calls without gradients
        torch.testing.assert_close(ours(x, *args), their_value.detach())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_decode(batch_first: bool, masked: bool) -> None:
    ours, theirs = pair(batch_first, torch.float32)
    for _ in range(5):
        x, _, mask = batch(batch_first, torch.float32)
        paths = ours.decode(x, mask if masked else None)
        assert paths == theirs.decode(x, mask if masked else None)
        assert all(type(tag) is int for path in paths for tag in path)


def test_byte_mask_is_a_mask() -> None:
    ours, _ = pair(True)
    x, tags, mask = batch(True)
    assert torch.equal(ours(x, tags, mask.byte()), ours(x, tags, mask))
    assert ours.decode(x, mask.byte()) == ours.decode(x, mask)


def test_tags_of_any_integer_type() -> None:
    ours, _ = pair(True)
    x, tags, _ = batch(True)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        assert torch.equal(ours(x, tags.to(dtype)), ours(x, tags))


def test_same_initial_parameters_and_repr() -> None:
    torch.manual_seed(3)
    ours = CRF(K)
    torch.manual_seed(3)
    theirs = torchcrf.CRF(K)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs) == f"CRF(num_tags={K})"
    assert ours.batch_first is theirs.batch_first is False


def test_checkpoints_load_both_ways() -> None:
    ours, theirs = CRF(K, allowed_start=torch.arange(K) > 0), torchcrf.CRF(K)
    for source, target in ((theirs, ours), (ours, theirs)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.reset_parameters()
        target.load_state_dict(torch.load(file))
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            assert torch.equal(a, b)


def test_copies_keep_constraints() -> None:
    crf = CRF(K, True, allowed_start=torch.arange(K) > 0)
    x = torch.randn(2, 3, K)
    for other in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert torch.equal(other.log_partition(x), crf.log_partition(x))
        assert other.decode(x) == crf.decode(x)
