"""What a plan keeps of a mask, and the way there and back."""

from __future__ import annotations

import pytest
import torch

from fastseq.integrations.packing import Plan


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(x) for x in row] for row in rows])


def test_right_padding_packed() -> None:
    plan = Plan((3, 4), masks("1100", "1111", "1000"), packed=True)
    assert plan.indices is not None
    assert plan.indices.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert plan.cu_seqlens is not None
    assert plan.cu_seqlens.tolist() == [0, 2, 6, 7]
    assert plan.cu_seqlens.dtype == torch.int32
    assert (plan.longest, plan.right_padded, plan.key_lengths) == (4, True, None)
    assert plan.bias(torch.float32) is None


def test_first_positions_are_kept_and_not_looked_at() -> None:
    plan = Plan((3, 4), masks("0011", "0000", "1010"), packed=True)
    assert plan.indices is not None
    assert plan.indices.tolist() == [0, 2, 3, 4, 8, 10]
    assert not plan.right_padded
    bias = plan.bias(torch.bfloat16)
    assert bias is not None
    assert bias.dtype == torch.bfloat16
    assert bias.shape == (3, 1, 1, 3)
    assert bias.isinf().flatten(1).tolist() == [[True, False, False], [True, False, False], [False] * 3]


def test_padding_that_runs_along() -> None:
    plan = Plan((2, 3), masks("110", "000"), packed=False)
    assert plan.key_lengths is not None
    assert plan.key_lengths.tolist() == [2, 0]
    assert (plan.indices, plan.cu_seqlens, plan.longest) == (None, None, 3)
    holes = Plan((2, 3), masks("101", "011"), packed=False)
    bias = holes.bias(torch.float64)
    assert bias is not None
    assert bias.isinf().view(2, 3).tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(0, 3)])
def test_nothing_to_leave_out(mask: torch.Tensor | None) -> None:
    plan = Plan((2, 3), mask, packed=True)
    x = torch.randn(2, 3, 5)
    assert plan.pack(x) is x
    assert plan.unpack(x) is x
    assert plan.key_lengths is None
    assert plan.bias(torch.float32) is None


def test_there_and_back_with_gradients() -> None:
    mask = masks("110", "101")
    plan = Plan((2, 3), mask, packed=True)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    packed = plan.pack(x)
    assert packed.shape == (1, 4, 5)
    back = plan.unpack(packed)
    torch.testing.assert_close(back, x * mask[..., None])
    back.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, mask[..., None].expand(2, 3, 5).double())
    assert plan.pack(mask).tolist() == [[1, 1, 1, 1]]
