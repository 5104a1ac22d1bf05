"""Hugging Face's encoders, packed and patched, against themselves as they were."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq.integrations import patch, unpatch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hf = pytest.importorskip("transformers", minversion="5")

B, S = 4, 12
CHANGED = {"bert": 8, "distilbert": 6, "deberta": 8}  # modules of two layers
SMALL = {"vocab_size": 50, "pad_token_id": 0, "num_labels": 3, "max_position_embeddings": 16}
BERT = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
BUCKETS = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 32,
    "pooler_dropout": 0.0,
}
# Head sizes are such that the root of a size times the number of terms, which DeBERTa takes in float32, is exact.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "distilbert": ("DistilBert", {**SMALL, **DISTIL, "seq_classif_dropout": 0.0}),
    "deberta": (
        "DebertaV2",
        {**BERT, **BUCKETS, "hidden_size": 24, "num_attention_heads": 2, "pooler_hidden_size": 24},
    ),
    "deberta-plain": (
        "DebertaV2",
        {
            **BERT,
            **BUCKETS,
            "position_buckets": -1,
            "max_relative_positions": 6,
            "share_att_key": False,
            "conv_kernel_size": 3,
        }
        | {"pos_att_type": "c2p", "type_vocab_size": 2, "position_biased_input": True, "norm_rel_ebd": "none"},
    ),
    "deberta-absolute": (
        "DebertaV2",
        {**BERT, "num_attention_heads": 2, "pooler_hidden_size": 32, "pooler_dropout": 0.0},
    ),
}
RIGHT = ["111111111111", "111110000000", "100000000000", "111111100000"]
HOLES = ["111111111111", "110110010000", "101000000001", "100000000000"]
LEFT = ["000000111111", "000011111111", "010101010101", "111111111111"]
EMPTY = ["111100000000", "000000000000", "111111110000", "111110000000"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:  # the tensors are tiny; for all tests the number is set anew
    torch.set_num_threads(1)


def mask_of(rows: list[str]) -> Tensor:
    return torch.tensor([[int(x) for x in row] for row in rows])


def model_of(
    family: str, head: str = "ForSequenceClassification", dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    name, config = CONFIGS[family]
    torch.manual_seed(0)
    model = getattr(hf, name + head)(getattr(hf, name + "Config")(**{**config, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)  # or position tables are all but 0
    return model.to(dtype).train()


def batch(rows: list[str] | None = RIGHT, labels: int | None = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {"input_ids": torch.randint(1, 50, (B, S), generator=generator)}
    if rows is not None:
        made["attention_mask"] = mask_of(rows)
    if labels is not None:
        made["labels"] = torch.randint(3, (B, S)[:labels], generator=generator)
        if labels == 2 and rows is not None:
            made["labels"][mask_of(rows) == 0] = -100
    return made


def results(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """The loss and all gradients by name, and the output."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach()} | gradients, output


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], relative: float) -> None:
    assert got.keys() == want.keys()
    scale = max(float(x.abs().max()) for x in want.values())
    for name, x in want.items():
        bound = relative * max(float(x.abs().max()), 1e-2 * scale)
        assert float((got[name] - x).abs().max()) <= bound, name


def compare(model: Any, inputs: dict[str, Tensor], relative: float = 1e-11, **options: Any) -> Any:
    """Patch a copy, and check it against the model; the copy."""
    patched = copy.deepcopy(model)
    assert patch(patched, **options).changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, output = results(patched, inputs)
    want, plain = results(model, inputs)
    assert_same(got, want, relative)
    if output.logits.dim() == 3 and "attention_mask" in inputs:
        on = inputs["attention_mask"].bool()
        torch.testing.assert_close(output.logits[on], plain.logits[on])
    else:
        torch.testing.assert_close(output.logits, plain.logits)
    return patched


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_same_loss_and_gradients(family: str, packed: bool) -> None:
    compare(model_of(family), batch(), packed=packed)
    if packed:
        compare(model_of(family, "ForTokenClassification"), batch(RIGHT, 2))


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_float32(family: str) -> None:
    compare(model_of(family, dtype=torch.float32), batch(), 1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_any_mask(family: str, packed: bool) -> None:
    model = model_of(family)
    for rows in (None, ["1" * S] * B, HOLES, LEFT):
        compare(model, batch(rows), packed=packed)
    compare(model_of(family, "ForTokenClassification"), batch(HOLES, 2), packed=packed)


@pytest.mark.parametrize("packed", [True, False])
def test_deberta_with_a_row_of_padding(packed: bool) -> None:
    compare(model_of("deberta"), batch(EMPTY), packed=packed)
    compare(model_of("deberta"), batch(None), packed=packed)


@pytest.mark.parametrize("rows", [HOLES, LEFT])
def test_deberta_runs_padded_where_distances_have_holes(rows: list[str]) -> None:
    model = model_of("deberta")
    patched = copy.deepcopy(model)
    patch(patched)
    with pytest.warns(UserWarning, match="DebertaV2Model runs as it was before patch: its relative positions need"):
        got, _ = results(patched, batch(rows))
    assert_same(got, results(model, batch(rows))[0], 1e-12)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_row_of_padding_leaves_the_others_alone(family: str, packed: bool) -> None:
    model, inputs = model_of(family), batch(EMPTY)
    others = [0, 2, 3]
    want = model(**inputs).logits[others]
    patch(model, packed=packed)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[others], want)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_bare_models(family: str) -> None:
    model, inputs = model_of(family, "Model"), batch(RIGHT, None)
    on = inputs["attention_mask"].bool()
    want = model(**inputs)
    patch(model)
    got = model(**inputs)
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    torch.testing.assert_close(got[0][on], want[0][on])
    assert got[0].shape == (B, S, model.config.hidden_size)
    assert not got[0][~on].any()
    if family == "bert":
        torch.testing.assert_close(got.pooler_output, want.pooler_output)
    pair = model(**inputs, return_dict=False)
    assert isinstance(pair, tuple)
    assert len(pair) == len(got)
    one = {name: x[1:2] for name, x in inputs.items()}
    torch.testing.assert_close(model.eval()(**one)[0], got[0][1:2])


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-plain"])
def test_embeddings_positions_and_types_given(family: str) -> None:
    model, inputs = model_of(family), batch(RIGHT)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    if family != "distilbert":
        inputs["token_type_ids"] = torch.arange(S)[None].expand(B, S) % 2
    if family == "bert":
        inputs["position_ids"] = torch.arange(S).flip(0)[None]
    compare(model, inputs)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model = model_of(family)
    want, _ = results(model, batch())
    patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.get_submodule(model.base_model_prefix).embeddings.register_forward_hook(lambda *_: calls.append("embeddings"))
    attention = next(m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "dropout"))
    attention.register_forward_hook(lambda *_: calls.append("attention"))
    got, _ = results(model, batch())
    assert calls == ["embeddings", "attention", "attention"]
    assert_same(got, want, 1e-11)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rows", [None, RIGHT])
def test_the_last_layer_runs_on_first_positions_only(family: str, rows: list[str] | None) -> None:
    model = model_of(family)
    patch(model)
    shapes: list[tuple[int, ...]] = []
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and ".layer." in name]
    for norm in norms:
        norm.register_forward_hook(lambda _, __, output: shapes.append(output.shape[:2]))
    inputs = batch(rows)
    model(**inputs)
    total, first = ((B, S), (B, 1)) if rows is None else ((1, int(inputs["attention_mask"].sum())), (1, B))
    assert shapes == [total, total, first, first]
    shapes.clear()
    inner = model.get_submodule(model.base_model_prefix)
    assert inner(inputs["input_ids"], inputs.get("attention_mask"))[0].shape[1] == S
    assert shapes == [total] * 4
    one_layer = "n_layers" if family == "distilbert" else "num_hidden_layers"
    compare(model_of(family, **{one_layer: 1}), inputs)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_autocast(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    exact, _ = results(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        patched = copy.deepcopy(model)
        patch(patched)
        got, output = results(patched, batch())
        theirs, _ = results(model, batch())
    assert output.logits.dtype == torch.bfloat16

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - x).norm() ** 2) for name, x in exact.items()) ** 0.5

    assert error(got) <= 2 * error(theirs)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_dropout_in_training_only(family: str) -> None:
    names = ("dropout", "attention_dropout") if family == "distilbert" else list(BERT)[-2:]
    model = model_of(family, **dict.fromkeys(names, 0.5))
    inputs = batch()
    want = model.eval()(**inputs).logits
    patch(model)
    torch.testing.assert_close(model(**inputs).logits, want)
    model.train()
    drawn: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(**inputs).logits)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = model_of(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    bare = model.get_submodule(model.base_model_prefix)
    bare.save_pretrained(tmp_path / "bare")
    files = [sorted(p.name for p in (tmp_path / x).iterdir()) for x in ("plain", "patched")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    back = type(model).from_pretrained(tmp_path / "patched").train()
    torch.testing.assert_close(model(**batch()).logits, back(**batch()).logits)
    assert hf.AutoModel.from_pretrained(tmp_path / "bare").config.architectures == [type(bare).__name__]


def state(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    return [
        (name, type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_unpatch_restores_all(family: str) -> None:
    model = model_of(family)
    before = state(model)
    report = fastseq.patch(model)
    assert isinstance(model.get_submodule(model.base_model_prefix), getattr(hf, CONFIGS[family][0] + "Model"))
    assert len(report.changed) == CHANGED[family]
    assert not report.left
    assert {line.result for line in patch(model).left} == {"already patched"}
    model(**batch())
    back = fastseq.unpatch(model)
    assert [line.result for line in back.changed] == [line.cls for line in report.changed]
    assert [line.cls for line in back.changed] == [line.result for line in report.changed]
    assert state(model) == before


def test_report() -> None:
    model = model_of("distilbert")
    lines = [line.split() for line in str(patch(model)).splitlines()]
    module = "transformers.models.distilbert.modeling_distilbert."
    layers = [
        [f"distilbert.transformer.layer.{i}.{name}", module + cls, f"fastseq.integrations.{ours}"]
        for i in range(2)
        for name, cls, ours in (
            ("attention", "DistilBertSelfAttention", "self_attention.DistilBertAttention"),
            ("ffn", "FFN", "dropout.FeedForward"),
        )
    ]
    root = ["(root)", f"{module}DistilBertForSequenceClassification", "fastseq.integrations.transformers.Classifier"]
    encoder = ["distilbert", f"{module}DistilBertModel", "fastseq.integrations.transformers.Encoder"]
    assert lines == [["module", "class", "result"], root, encoder, *layers]


def test_copies_and_pickles_of_a_patched_model() -> None:
    model, inputs = model_of("deberta"), batch()
    want = model(**inputs).logits
    patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**inputs).logits, want)
        assert len(unpatch(other).changed) == CHANGED["deberta"]
        torch.testing.assert_close(other(**inputs).logits, want)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta"])
def test_what_runs_as_it_was(family: str) -> None:
    model, inputs = model_of(family, attn_implementation="eager"), batch()
    want = model(**inputs, output_hidden_states=True, output_attentions=True)
    patch(model)
    with pytest.warns(UserWarning, match=r"Model runs as it was before patch: output_attentions is set"):
        got = model(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(got.hidden_states, want.hidden_states)
    torch.testing.assert_close(got.attentions, want.attentions)
    assert len(got.hidden_states) == 3
    if family != "deberta":
        pairs = torch.ones(B, 1, S, S, dtype=torch.float64).tril().log()
        with pytest.warns(UserWarning, match=r"attention_mask has shape \(4, 1, 12, 12\), not \(4, 12\)"):
            model(**inputs | {"attention_mask": pairs})
    with pytest.warns(UserWarning, match="it needs either"), pytest.raises(ValueError, match="specify"):
        model()


def test_what_is_left_and_why() -> None:
    decoder = hf.BertModel(hf.BertConfig(**BERT, is_decoder=True))
    (line,) = patch(decoder).left
    assert (line.module, line.result) == ("(root)", "is a decoder")
    answers = model_of("bert", "ForQuestionAnswering", num_labels=2)
    (line,) = patch(answers).left
    assert line.result == "its loss reads the hidden states of padding, which are not computed if packed"
    assert not unpatch(answers).changed
    inputs = batch(RIGHT, None) | {"start_positions": torch.tensor([0, 1, 0, 2])}
    inputs["end_positions"] = inputs["start_positions"]
    want = answers(**inputs).loss
    assert not patch(answers, packed=False).left
    torch.testing.assert_close(answers(**inputs).loss, want)
    deberta = model_of("deberta", "ForQuestionAnswering")
    assert patch(deberta, packed=False).left[0].result.endswith("padding, which are not computed")
    chunked = model_of("bert", chunk_size_feed_forward=4)
    assert patch(chunked).left[0].result == "chunk_size_feed_forward cuts positions into equal chunks"


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_attention_implementation(family: str) -> None:
    fastseq.integrations.transformers.register()
    model = model_of(family)
    other = copy.deepcopy(model)
    other.set_attn_implementation("fastseq")
    for rows in (None, RIGHT, HOLES, LEFT):
        want, plain = results(model, batch(rows))
        got, output = results(other, batch(rows))
        assert_same(got, want, 1e-11)
        torch.testing.assert_close(output.logits, plain.logits)
    made = type(model)._from_config(model.config, attn_implementation="fastseq")
    assert made.config._attn_implementation == "fastseq"


def test_attention_implementation_of_a_decoder() -> None:
    fastseq.integrations.transformers.register()
    torch.manual_seed(0)
    config = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config, intermediate_size=48)).double().eval()
    for rows in (None, RIGHT, LEFT[3:] * B):
        inputs = batch(rows, None)
        on = inputs.get("attention_mask", torch.ones(B, S)).bool()
        found = []
        for implementation in ("sdpa", "fastseq"):
            model.set_attn_implementation(implementation)
            found.append(model(**inputs).logits[on])
            found.append(model.generate(inputs["input_ids"][:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0))
        torch.testing.assert_close(found[2], found[0])
        assert torch.equal(found[3], found[1])


def test_imports_transformers_only_for_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # to import it is an error now
    patch(nn.Linear(1, 1))
    folder = Path(fastseq.integrations.__file__).parent
    for file in ("transformers", "attention_interface", "self_attention", "packing", "dropout"):
        spec = importlib.util.spec_from_file_location(f"again_{file}", folder / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
