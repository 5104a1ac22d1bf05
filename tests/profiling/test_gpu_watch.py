"""The watch of a GPU, with an NVML and a torch.cuda that are made up."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastseq.gpu_watch import GpuWatch, Sample

GIB = 2**30


class Nvml:
    """What is used of pynvml; it says what it is told to say in turns, and knows how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.says = [50]
        self.broken = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.asked.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        assert handle == "handle"
        self.asked.append("rates")
        if self.broken and self.asked.count("rates") > 2:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(gpu=self.says[self.asked.count("rates") % len(self.says)])

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=12 * GIB, total=80 * GIB)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of which torch knows the name and the memory."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="11-22"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    return torch.device("cuda", 0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, cuda: torch.device) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it did not happen in 2 seconds")


def test_samples_and_their_mean(nvml: Nvml, cuda: torch.device) -> None:
    nvml.says = [50, 70]
    with GpuWatch(cuda, interval=0.001) as watch:
        wait_for(lambda: nvml.asked.count("rates") > 6)
        wait_for(lambda: watch.latest is not None)
    mean = watch.mean()
    assert mean is not None
    assert mean.utilisation == pytest.approx(60, abs=5)
    assert (mean.memory_used, mean.memory_total) == (12 * GIB, 80 * GIB)
    assert watch.latest in (Sample(50.0, 12 * GIB, 80 * GIB), Sample(70.0, 12 * GIB, 80 * GIB))
    assert watch.mean() is None  # each sample counts once
    assert nvml.asked[:2] == ["init", "GPU-11-22"]  # by its UUID: torch's numbers are not NVML's
    assert not [thread for thread in threading.enumerate() if thread.name == "fastseq-gpu-watch"]


def test_without_nvml_there_is_the_memory(monkeypatch: pytest.MonkeyPatch, cuda: torch.device) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuWatch(cuda, interval=0.001) as watch:
        wait_for(lambda: watch.latest is not None)
    assert watch.latest == Sample(None, 20 * GIB, 80 * GIB)
    assert str(watch.latest) == "GPU 20.0/80.0 GiB"
    assert watch.latest.as_dict() == {"memory": 25.0}


def test_a_driver_that_stops_answering_ends_the_samples_only(nvml: Nvml, cuda: torch.device) -> None:
    nvml.broken = True
    with GpuWatch(cuda, interval=0.001) as watch:
        wait_for(lambda: nvml.asked.count("rates") > 2)
    assert watch.mean() == Sample(50.0, 12 * GIB, 80 * GIB)


def test_without_a_gpu_it_costs_nothing(nvml: Nvml) -> None:
    before = threading.active_count()
    with GpuWatch(torch.device("cpu")) as watch:
        assert threading.active_count() == before
    assert watch.mean() is None
    assert watch.latest is None
    assert nvml.asked == []


def test_the_progress_line_and_the_logs_have_it(nvml: Nvml, cuda: torch.device, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastseq.recipes.config import RecipeConfig
    from fastseq.recipes.report import REFRESH, Reporter
    from fastseq.recipes.train import Position

    config = RecipeConfig(run_dir=tmp_path)
    loss = torch.tensor(0.5)
    with Reporter(config, 0, 100, True, cuda) as reporter:
        wait_for(lambda: reporter.gpu.latest is not None)
        for step in range(1, REFRESH + 1):
            reporter.update(Position(step=step), loss, 1e-3)
        text = reporter.progress.tasks[0].fields["text"]
        reporter.evaluation(Position(step=REFRESH), {"f1": 50.0})
    assert "GPU 50 % 12.0/80.0 GiB" in text
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["gpu"] == {"utilisation": 50.0, "memory": 15.0}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("gpu/utilisation")] == [50.0]
    assert [event.value for event in board.Scalars("gpu/memory")] == [15.0]


def test_without_a_gpu_the_logs_have_nothing_of_it(tmp_path: Path) -> None:
    from fastseq.recipes.config import RecipeConfig
    from fastseq.recipes.report import Reporter
    from fastseq.recipes.train import Position

    with Reporter(RecipeConfig(run_dir=tmp_path), 0, 100, True, torch.device("cpu")) as reporter:
        reporter.evaluation(Position(step=1), {"f1": 50.0})
    assert "gpu" not in json.loads((tmp_path / "metrics.jsonl").read_text())
