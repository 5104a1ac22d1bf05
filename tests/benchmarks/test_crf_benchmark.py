"""The CRF benchmark: its float64 truth by enumeration, its checks, and the command from end to end."""

import builtins
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastseq.reasons import no_cuda
from fastseq.registry import OPS, Backend
from fastseq_benchmarks import cli, crf, crf_truth, machine
from fastseq_benchmarks.common import gradient_error
from fastseq_benchmarks.results import load
from fastseq_benchmarks.runner import Effort

TINY = ["crf", "--quick", "--shape", "2,6,3", "--threads", "1"]


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUICK", Effort(budget_s=0.0, min_rounds=2, sample_s=0.0))


def inputs(shape: tuple[int, int, int] = (3, 4, 3), seed: int = 0) -> crf_truth.Inputs:
    return crf.make_inputs(shape, torch.float32, "cpu", seed)


def all_scores(problem: crf_truth.Inputs, row: int) -> dict[tuple[int, ...], float]:
    length = int(problem.mask[row].sum())
    paths = itertools.product(range(problem.shape[2]), repeat=length)
    return {path: crf_truth.path_score(problem, row, list(path)) for path in paths}


def test_truth_is_the_sum_and_the_maximum_over_all_paths() -> None:
    problem = inputs()
    loss, best = 0.0, crf_truth.best_paths(problem)
    for b in range(problem.shape[0]):
        scores = all_scores(problem, b)
        gold = tuple(problem.tags[b, : int(problem.mask[b].sum())].tolist())
        loss += math.log(sum(map(math.exp, scores.values()))) - scores[gold]
        assert tuple(best.paths[b]) == max(scores, key=scores.__getitem__)
        assert float(best.scores[b]) == pytest.approx(max(scores.values()))
    assert float(crf_truth.loss_and_gradients(problem)["loss"]) == pytest.approx(loss, rel=1e-12)


def test_truth_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = crf_truth.loss_and_gradients(inputs((5, 7, 4)))
    monkeypatch.setattr(crf_truth, "CHUNK_BYTES", 2 * 8 * 7 * 16)
    chunked = crf_truth.loss_and_gradients(inputs((5, 7, 4)))
    assert set(whole) == {"loss", "emissions", "transitions", "start", "end"}
    assert gradient_error(chunked, whole) < 1e-12


def test_the_check_of_gradients_sees_one_wrong_entry_and_nan() -> None:
    truth = crf_truth.loss_and_gradients(inputs())
    for value in (0.01, math.nan):
        result = {name: t.clone() for name, t in truth.items()}
        result["start"][1] += value
        error = gradient_error(result, truth, least=1.0)
        assert math.isnan(error) if math.isnan(value) else 0.003 < error < 0.02


def test_the_check_of_paths_takes_ties_and_nothing_else() -> None:
    truth = crf_truth.best_paths(inputs())
    assert crf.wrong_paths(truth.paths, truth) == 0
    for changed in (truth.paths[0][:-1], [9] * len(truth.paths[0]), [-100] * len(truth.paths[0])):
        assert crf.wrong_paths([changed, *truth.paths[1:]], truth) == pytest.approx(1 / 3)
    assert crf.wrong_paths(truth.paths[:-1], truth) == 1
    flat = crf_truth.Inputs(*(t.zero_() if t.is_floating_point() else t for t in vars(inputs()).values()))
    tied = crf_truth.best_paths(flat)
    assert crf.wrong_paths([[2] * len(p) for p in tied.paths], tied) == 0


def test_quick_run_of_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new.json"
    status = cli.main([*TINY, "--json", str(out)])
    text = capsys.readouterr().out
    assert status == 0, text
    found = load(out)
    assert [case.suite for case in found.cases] == ["loss", "viterbi", "decode"]
    for case in found.cases:
        eager = next(r for r in case.rivals if r.name == "fastseq eager")
        assert eager.matches
        assert eager.seconds is not None
        assert eager.ops
    assert {"cpu", "cores", "threads", "torch", "fastseq", "compiler", "os"} <= set(found.machine)
    assert str(Path.home()) not in out.read_text()
    assert cli.main([*TINY, "--suite", "loss", "--compare", str(out)]) in (0, 1)
    assert "new against old" in capsys.readouterr().out


def test_a_missing_peer_is_named_with_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str, *args: Any) -> Any:
        if name == "torchcrf":
            raise ImportError(name)
        return builtins.__import__(name, fromlist=["_"])

    monkeypatch.setattr(crf.importlib, "import_module", absent)
    status = cli.main([*TINY, "--suite", "viterbi"])
    text = capsys.readouterr().out
    assert status == 0, text
    assert "not installed: pip install 'fastseq-kernels[bench]'" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pointr"], "'pointr' is not a family; there is: crf, pointer, attention, models"),
        (["crf", "--suite", "lost"], "--suite: got 'lost', wanted one of loss, viterbi, decode, accuracy"),
        (["crf", "--shape", "32,64"], "--shape: got '32,64', wanted B,T,K"),
        (["crf", "--shape", "32,0,9"], "wanted B,T,K, each at least 1"),
        (["crf", "--dtype", "int8"], "--dtype: got 'int8', wanted one of float32"),
        (["crf", "--device", "tpu"], "--device: got 'tpu', wanted cpu or cuda"),
        (["crf", "--threads", "0"], "--threads: got 0, wanted at least 1"),
        (["crf", "--threads", "two"], "invalid int value: 'two'"),
        (["crf", "--plot", "x.gif"], "--plot: got 'x.gif', wanted a name that ends in .svg or .png"),
        (["crf", "--compare", "absent.json"], "absent.json: cannot be read"),
        (["crf", "--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_wrong_arguments_get_a_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().out


@pytest.mark.skipif(no_cuda() is None, reason="there is a GPU")
def test_without_a_gpu_there_is_one_line_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["crf", "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"fastseq bench: --device: got 'cuda', and {no_cuda()}"
    assert "torch finds no CUDA device" in line


def backend(name: str, device: str | None, reason: str | None = None, *, automatic: bool = True) -> Backend:
    return Backend(name, lambda *_: None, lambda *_: reason, automatic=automatic, device=device)


def test_the_backends_of_a_device_are_rivals_each_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = [
        backend("cpu", "cpu"),
        backend("cuda", "cuda"),
        backend("triton", "cuda", "at most 128 tags"),
        backend("emulator", "cpu", automatic=False),
        backend("eager", None),
        backend("reference", "cpu", automatic=False),
    ]
    monkeypatch.setattr(OPS["crf_viterbi"], "backends", backends)

    def rivals(device: str) -> dict[str, str]:
        lead = SimpleNamespace(device=torch.device(device))
        return {r.name: r.missing for r in crf._fastseq("crf_viterbi", (lead,), lambda: 0, lambda: 0)}

    assert rivals("cpu") == {"fastseq cpu": "", "fastseq eager": ""}
    assert rivals("cuda") == {"fastseq cuda": "", "fastseq triton": "at most 128 tags", "fastseq eager": ""}


def test_traffic_by_hand() -> None:
    problem = inputs((2, 4, 3))
    n = int(problem.mask.sum())
    assert crf._traffic(problem, grad=False) == 4 * 3 * n + 9 * 8 + 4 * 15
    assert crf._traffic(problem, grad=True) == 4 * 3 * (n + 8) + 9 * 8 + 2 * 4 * 15
    assert crf.loss_cases([(2, 4, 3)], torch.float32, "cpu")[0].traffic is None
    assert crf.loss_cases([(2, 4, 3)], torch.float32, "cuda")[0].traffic is not None


def test_nvidia_smi_is_read_and_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(stdout="580.65.06, 345 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 700.00 W, 31\n")

    monkeypatch.setattr(machine.subprocess, "run", answer)
    found = machine._nvidia_smi("12-34")
    assert found["driver"] == "580.65.06"
    assert found["sm clock at most"] == "1980 MHz"
    assert "--id=GPU-12-34" in asked[0]

    def absent(command: list[str], **_: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine._nvidia_smi("12-34") == {}


def test_accuracy_table_against_float64() -> None:
    table = crf.accuracy(torch.float32, "cpu", T=40, tag_counts=(3,))
    errors = {row[1]: float(row[2]) for row in table.rows}
    assert 0 < errors["fastseq eager"] < 1e-5


def test_json_is_plain(tmp_path: Path) -> None:
    """No NaN or infinity, which other readers of JSON refuse."""
    out = tmp_path / "new.json"
    cli.main([*TINY, "--suite", "loss", "--dtype", "bfloat16", "--json", str(out)])

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(out.read_text(), parse_constant=refuse)
