"""The regressor: its loss is SMAPE, its columns all count, and real tokens only give the same as padded ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2Model

import fastseq
from fastseq.models import TextRegressor
from fastseq.models.text_regressor import smape_loss

V = 30
COLUMNS: dict[str, Any] = {"numeric": 3, "category_sizes": [4, 2], "bags": 2, "bag_size": 20}


def deberta() -> DebertaV2Model:
    torch.manual_seed(0)
    relative = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    others = {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 20}
    return DebertaV2Model(DebertaV2Config(vocab_size=V, **relative, **sizes, **others, **off))


def model(encoder: Any = None, **options: Any) -> TextRegressor:
    torch.manual_seed(1)
    return TextRegressor(encoder, dropout=0.0, bag_dropout=0.0, **{**COLUMNS, **options})


def batch() -> dict[str, Tensor]:
    mask = (torch.arange(9) < torch.tensor([9, 2, 5])[:, None]).long()
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, V, (3, 9), generator=generator) * mask,
        "attention_mask": mask,
        "numeric": torch.randn(3, 3, generator=generator),
        "categories": torch.tensor([[0, 1], [3, 0], [2, 1]]),
        "bag_ids": torch.tensor([1, 2, 3, 4, 5, 6]),
        "bag_offsets": torch.tensor([0, 2, 3, 3, 3, 5, 6]),
        "targets": torch.tensor([1.0, -2.0, 7.0]),
    }


def test_the_loss_is_smape_of_what_the_logarithms_stand_for() -> None:
    torch.manual_seed(0)
    a, p = torch.randn(2, 50, dtype=torch.float64).mul(3).exp()
    formula = (200 * (a - p).abs() / (a.abs() + p.abs())).mean()
    torch.testing.assert_close(100 * smape_loss(p.log(), a.log()), formula)
    extreme = smape_loss(torch.tensor([1000.0], requires_grad=True), torch.tensor([-1000.0]))
    assert extreme.item() == 2  # exp(1000) is no number


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [("l1", F.l1_loss), ("huber", F.huber_loss), ("smape", smape_loss)],
)
def test_the_losses_are_of_logarithms(loss: Any, wanted: Any) -> None:
    regressor, b = model(loss=loss, center=3.0, scale=2.0), batch()
    predicted = regressor(**{**b, "targets": None})
    assert predicted.shape == (3,)
    torch.testing.assert_close(regressor(**b), wanted(predicted, b["targets"]))


def test_real_tokens_only_give_what_padded_ones_give() -> None:
    b, packed = batch(), model(deberta())
    assert "DebertaEncoder" in str(packed.text.report)  # type: ignore[union-attr]
    padded = copy.deepcopy(packed)
    fastseq.unpatch(padded)
    losses = [each(**b) for each in (packed, padded)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(packed.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_every_column_has_a_say_in_its_own_row_alone() -> None:
    regressor, b = model(deberta()).eval(), batch()
    before = regressor(**{**b, "targets": None})
    changes = {
        "input_ids": b["input_ids"].index_put((torch.tensor(0), torch.tensor(8)), torch.tensor(5)),
        "numeric": b["numeric"].index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(5.0)),
        "categories": b["categories"].index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1)),
        "bag_ids": b["bag_ids"].index_put((torch.tensor(2),), torch.tensor(9)),  # of row 0's second bag
    }
    for name, value in changes.items():
        after = regressor(**{**b, name: value, "targets": None})
        assert after[0] != before[0], name
        torch.testing.assert_close(after[1:], before[1:])


def test_a_bag_is_the_mean_of_its_values_and_an_absent_one_counts_for_nothing() -> None:
    regressor, b = model().eval(), batch()
    more = {**b, "bag_ids": torch.tensor([1, 2, 0, 3, 4, 5, 6]), "bag_offsets": torch.tensor([0, 3, 4, 4, 4, 6, 7])}
    torch.testing.assert_close(regressor(**more), regressor(**b))
    regressor.train()
    regressor.bag_dropout = 1.0
    none = {**b, "bag_ids": torch.zeros(6, dtype=torch.int64)}
    torch.testing.assert_close(regressor(**b), regressor.eval()(**none))


def test_it_needs_a_column() -> None:
    with pytest.raises(ValueError, match="at least one column is wanted, got none"):
        TextRegressor(None)
    alone = TextRegressor(None, bags=2, bag_size=20)
    b = batch()
    assert alone(**{**b, "numeric": b["numeric"][:, :0], "categories": b["categories"][:, :0]}).ndim == 0


def test_gradient_checkpointing_changes_no_gradient() -> None:
    b, regressor = batch(), model(deberta())
    again = copy.deepcopy(regressor)
    again.gradient_checkpointing_enable()
    for each in (regressor, again):
        each(**b).backward()
    for one, other in zip(regressor.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    model().gradient_checkpointing_enable()  # nothing to recompute, and no error
