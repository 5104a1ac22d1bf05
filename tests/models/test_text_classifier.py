"""The classifier on encoders of transformers: the pooling, and real tokens only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

import fastseq
from fastseq.models import TextClassifier
from fastseq.models.pooled_encoder import PooledEncoder

V, K, H = 30, 3, 16
OFF: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=V, max_position_embeddings=20, **sizes, **OFF))


def distilbert() -> DistilBertModel:
    torch.manual_seed(0)
    sizes = {"dim": H, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
    return DistilBertModel(DistilBertConfig(vocab_size=V, dropout=0.0, attention_dropout=0.0, **sizes))


def batch() -> dict[str, Tensor]:
    lengths = torch.tensor([9, 1, 4, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(1, V, (4, 9), generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, -100])}


@pytest.mark.parametrize("encoder", [bert, distilbert])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_it_is_the_equivalent_of_its_docstring(encoder: Any, pooling: Any) -> None:
    b = batch()
    model = TextClassifier(encoder(), K, pooling=pooling, dropout=0.0)
    assert "Encoder" in str(model.text.report)
    plain = copy.deepcopy(model)
    fastseq.unpatch(plain)
    mask = b["attention_mask"][..., None]
    states = plain.text.encoder(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state
    pooled = (states * mask).sum(1) / mask.sum(1) if pooling == "mean" else states[:, 0]
    loss = F.cross_entropy(plain.output(pooled), b["labels"])
    ours = model(**b)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    ours.backward()
    loss.backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_without_labels_it_gives_logits_and_predictions() -> None:
    b = batch()
    model = TextClassifier(bert(), K).eval()
    logits = model(b["input_ids"], b["attention_mask"])
    assert logits.shape == (4, K)
    assert logits.dtype == torch.float32
    assert torch.equal(model.predict(b["input_ids"], b["attention_mask"]), logits.argmax(-1))
    assert torch.equal(model(b["input_ids"], b["attention_mask"].double()), logits)  # a mask of any real type
    longer = F.pad(b["input_ids"], (0, 5)), F.pad(b["attention_mask"], (0, 5))
    torch.testing.assert_close(model(*longer), logits, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(b["input_ids"], b["attention_mask"]).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient() -> None:
    b = batch()
    model = TextClassifier(bert(), K, dropout=0.0).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.modules())
    for each in (model, again):
        each(**b).backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_packed_can_be_left_off() -> None:
    assert PooledEncoder(bert(), packed=False).report is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="pooling: 'mean' or 'first' is wanted, got 'max'"):
        TextClassifier(bert(), K, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes: at least 1 is wanted, got 0"):
        TextClassifier(bert(), 0)
