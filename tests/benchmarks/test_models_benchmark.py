"""The benchmark of models: its truths by other code, its rivals, and the command from end to end, on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastseq_benchmarks import cli, encoder_models, image_models, models, pointer_models, tagger_models, training
from fastseq_benchmarks.runner import Effort
from fastseq_benchmarks.training import relative_norm

TINY: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "deberta": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "pooler_hidden_size": 16,
    },
}
SHAPES = {
    "tagger": "3,6,4",
    "classifier": "3,12,5",
    "summarizer": "2,8,3,20",
    "image": "3,8",
    "regressor": "3,12,5",
    "bert": "3,12,5",
}
BASELINES = {"tagger": "pytorch-crf", "summarizer": "step loop", "image": "NCHW"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of a few weights, and little effort."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(cli, "QUICK", Effort(budget_s=0.0, min_rounds=2, sample_s=0.0))
    configs = {
        name: (cls, options | TINY[name] | {"vocab_size": 1100})
        for name, (cls, options) in encoder_models.CONFIGS.items()
    }
    monkeypatch.setattr(encoder_models, "CONFIGS", configs)
    monkeypatch.setattr(encoder_models, "VOCABULARY", 1100)
    monkeypatch.setattr(tagger_models, "HIDDEN", 8)
    monkeypatch.setattr(tagger_models, "VOCABULARIES", (40, 200))
    monkeypatch.setattr(pointer_models, "HIDDEN", 8)
    monkeypatch.setattr(pointer_models, "EMBEDDING", 6)
    monkeypatch.setattr(image_models, "WIDTHS", (4, 8))
    monkeypatch.setattr(image_models, "DEPTHS", (1, 1))
    monkeypatch.setattr(training, "HALF_TOLERANCE", 0.5)  # of few and small numbers


@pytest.mark.parametrize("name", models.SUITES)
def test_quick_run_of_a_tiny_shape(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new.json"
    options = ["--quick", "--suite", name, "--shape", SHAPES[name], "--threads", "1", "--json", str(out)]
    assert cli.main(["models", *options]) == 0, capsys.readouterr().out
    (case,) = json.loads(out.read_text("utf-8"))["cases"]
    assert case["baseline"] == BASELINES.get(name, "Hugging Face")
    timed = {rival["name"]: rival["error"] for rival in case["rivals"] if rival["seconds"]}
    assert {"fastseq", "fastseq bf16"} <= set(timed)
    assert timed["fastseq"] < 1e-5


def test_without_names_the_five_systems_run_at_their_quick_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = cli._parser().parse_args(["models", "--quick"])
    cases, tables = cli._select(models, options)
    assert [case.suite for case in cases] == ["tagger", "classifier", "summarizer", "image", "regressor"]
    assert [case.shape for case in cases] == [",".join(map(str, s.quick)) for s in list(models.SYSTEMS.values())[:5]]
    assert not tables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16", "--suite", "tagger"], "--dtype: got bfloat16, wanted float32"),
        (["--suite", "image"], "--suite: image needs transformers, which is not installed: pip install"),
    ],
)
def test_what_a_model_cannot_have_gets_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    monkeypatch.setattr(encoder_models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "_family", lambda name: models)
    assert cli.main(["models", *options]) == 2
    assert message in capsys.readouterr().out


def test_a_wrong_gradient_is_refused() -> None:
    """The check of a whole model sees one layer that is off by a hundredth of all."""
    inputs = image_models.make_inputs((3, 8), torch.float32, "cpu", 0)
    truth = image_models.loss_and_gradients(inputs)
    ours = image_models.rivals(inputs)[1]
    assert ours.result is not None
    result = ours.result()
    assert relative_norm(result, truth) < 1e-5
    result["output.weight"] = 1.05 * result["output.weight"]
    assert relative_norm(result, truth) > models.TOLERANCE


def test_the_tagger_without_its_peer_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tagger_models, "no_peer", lambda: "not installed")
    inputs = tagger_models.make_inputs((3, 6, 4), torch.float32, "cpu", 0)
    peer, ours, _ = tagger_models.rivals(inputs)
    truth = tagger_models.loss_and_gradients(inputs)
    assert peer.missing == "not installed"
    assert ours.result is not None
    assert relative_norm(ours.result(), truth) < 1e-5
    assert {"loss", "embeddings.0.weight", "output.weight", "decoder.transitions"} <= set(truth)
