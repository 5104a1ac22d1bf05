"""The pointer-generator benchmark: its truth against the published form, its rivals, the command from end to end."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastseq_benchmarks import cli, pointer, pointer_models, pointer_truth
from fastseq_benchmarks.common import gradient_error
from fastseq_benchmarks.runner import Effort

SHAPE = (3, 8, 3, 20)


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICK", Effort(budget_s=0.0, min_rounds=2, sample_s=0.0))


def test_truth_is_the_mixture() -> None:
    inputs = pointer_truth.make_loss_inputs(SHAPE, torch.float64, "cpu", 0)
    assert bool((inputs.source_ids < 0).any())
    assert bool((inputs.target_ids < SHAPE[3]).any())
    values = [getattr(inputs, name) for name in ("hidden", "weight", "bias", "attention", "gate")]
    got = pointer_truth.log_likelihood(*values, inputs.source_ids, inputs.target_ids)
    hidden, weight, bias, attention, gate = values
    for b, t in [(b, t) for b in range(SHAPE[0]) for t in range(SHAPE[2])]:
        p = torch.zeros(SHAPE[3] + pointer_truth.OUT_OF_VOCABULARY, dtype=torch.float64)
        p[: SHAPE[3]] = torch.sigmoid(gate[b, t]) * F.linear(hidden[b, t], weight, bias).softmax(-1)
        for s, word in enumerate(inputs.source_ids[b].tolist()):
            if word >= 0:
                p[word] += torch.sigmoid(-gate[b, t]) * attention[b, t, s]
        assert float(p.sum()) == pytest.approx(1)
        assert float(got[b, t]) == pytest.approx(float(p[inputs.target_ids[b, t]].log()))


def test_the_check_sees_one_wrong_entry() -> None:
    truth = pointer_truth.loss_and_gradients(pointer_truth.make_loss_inputs(SHAPE, torch.float32, "cpu", 0))
    result = {name: value.clone() for name, value in truth.items()}
    assert gradient_error(result, truth) == 0
    result["gate"][0, 0] += 0.01 * float(truth["gate"].abs().max())
    assert gradient_error(result, truth) == pytest.approx(0.01)


@pytest.mark.parametrize("whole", [False, True])
def test_both_models_have_the_gradients_of_the_truth(whole: bool) -> None:
    inputs = pointer_models.make_inputs(whole, SHAPE, torch.float64, "cpu", seed=0)
    truth = pointer_models.loss_and_gradients(inputs)
    fused = pointer_models.training_step(inputs.fused(), inputs)[1]()
    assert gradient_error(fused, truth) < 1e-8
    names = {"embedding.weight", "output.weight", "query.weight", "gate.weight", "x_context.weight", "loss"}
    assert set(truth) == set(fused) >= names | ({"reduce_cell.weight"} if whole else {"first_memory"})


def test_quick_run_of_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new.json"
    shape = ",".join(map(str, SHAPE))
    assert cli.main(["pointer", "--quick", "--shape", shape, "--threads", "1", "--json", str(out)]) == 0
    cases = json.loads(out.read_text("utf-8"))["cases"]
    assert [case["suite"] for case in cases] == ["loss", "decoder"]
    for case in cases:
        timed = {rival["name"] for rival in case["rivals"] if rival["seconds"]}
        assert {"step loop", "fastseq eager"} <= timed
    assert "three GEMMs" in capsys.readouterr().out


def test_the_memory_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointer, "LOSS_SHAPES", [SHAPE])
    monkeypatch.setattr(pointer, "KEPT_SHAPE", (2, 12, 6, 30))
    table = pointer.memory(torch.float32, "cpu")
    kept = {row[2]: float(row[-1]) for row in table.rows if row[0] == "decoder's steps"}
    assert kept["fastseq"] < kept["step loop"]
