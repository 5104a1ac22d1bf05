"""The attention benchmark: its truths against other people's code, its rivals, the command from end to end."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastseq_benchmarks import attention, attention_truth, cli, encoder_models
from fastseq_benchmarks.common import gradient_error
from fastseq_benchmarks.runner import Effort

SHAPE = (2, 2, 9, 4)


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICK", Effort(budget_s=0.0, min_rounds=2, sample_s=0.0))


@pytest.mark.parametrize("bias", [False, True])
def test_truth_is_what_torch_computes(bias: bool) -> None:
    inputs = attention_truth.make_inputs(bias, SHAPE, torch.float64, "cpu", 0)
    leaves = inputs.leaves()
    out = attention.sdpa(leaves, 0.0)
    out.backward(inputs.grad)  # type: ignore[no-untyped-call]
    got = {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}
    assert gradient_error(got, attention_truth.outputs_and_gradients(inputs)) < 1e-12
    assert len(got) == 4 + bias


def test_truth_of_disentangled_attention_is_what_transformers_computes() -> None:
    pytest.importorskip("transformers")
    inputs = attention_truth.make_disentangled_inputs((2, 2, 150, 4), torch.float64, "cpu", 0)
    leaves = inputs.leaves()
    out = inputs.there(encoder_models.disentangled_core(inputs)(leaves, 0.0))
    out.backward(inputs.grad)  # type: ignore[no-untyped-call]
    got = {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}
    # They compute the scale in float32.
    assert gradient_error(got, attention_truth.disentangled_outputs_and_gradients(inputs)) < 1e-6
    assert len(got) == 6


def test_dropout_rivals_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed has dropout, what is checked has none."""
    seen: list[float] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, b, p: seen.append(p) or q)
    inputs = attention_truth.make_inputs(False, SHAPE, torch.float32, "cpu", 0)
    rival = attention.rival("sdpa", attention.sdpa, inputs, 0.1)
    rival.call()
    assert rival.result is not None
    rival.result()
    assert seen == [0.1, 0.0]


def test_quick_run_of_a_tiny_shape(tmp_path: Path) -> None:
    out = tmp_path / "new.json"
    names = ("attention", "dropout", "bias", "disentangled")
    options = [option for name in names for option in ("--suite", name)]
    shape = ",".join(map(str, SHAPE))
    options += ["--shape", shape, "--threads", "1", "--json", str(out)]
    assert cli.main(["attention", "--quick", *options]) == 0
    cases = json.loads(out.read_text("utf-8"))["cases"]
    assert [case["suite"] for case in cases] == list(names)
    for case in cases:
        timed = {rival["name"] for rival in case["rivals"] if rival["seconds"]}
        assert "fastseq eager" in timed
        assert timed & {"sdpa", "Hugging Face"} or case["suite"] == "disentangled"
