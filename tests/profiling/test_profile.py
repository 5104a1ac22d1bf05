"""`fastseq.profile` of steps whose parts are known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils.data import DataLoader, TensorDataset

import fastseq
from fastseq.profiling import Phase, Profile
from fastseq.profiling.advice import NOTHING
from fastseq.profiling.tree import ENOUGH_ROWS

STEPS = 3


class Sleep(torch.autograd.Function):
    """Takes the time that it is told to, forward and backward, whatever else the machine does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:  # type: ignore[override]
        ctx.backward_time = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_time)
        return grad.clone(), None, None


class Slow(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.times = forward, backward
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x * self.weight, *self.times)  # type: ignore[no-any-return]


class Net(nn.Module):
    """Layers that take 50 ms, 25 ms and next to nothing a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Slow(0.005, 0.02), Slow(0.005, 0.02)])
        self.other = Slow(0.025, 0.0)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.other(x)).sum()  # type: ignore[no-any-return]


def step_of(model: nn.Module, *inputs: Any, clip: bool = False, **settings: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), **settings)

    def step() -> None:
        model(*inputs).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def phase(profile: Profile, name: str) -> Phase:
    return next(row for row in profile.phases if row.name.startswith(name))


@pytest.fixture(scope="module")
def known() -> Profile:
    """The profile of a step that takes about 75 ms, in known places."""
    torch.manual_seed(0)
    return fastseq.profile(step_of(Net(), torch.ones(4, 8), clip=True), steps=STEPS, warmup=1)


def test_known_times_are_found(known: Profile) -> None:
    layers, other = phase(known, "layers.* (Slow)"), phase(known, "other (Slow)")
    assert 0.5 < layers.share < 0.8  # 2 of 3 parts; a busy machine sleeps longer
    assert 0.2 < other.share < 0.45
    assert layers.backward_ms > 2 * layers.forward_ms
    assert other.backward_ms < other.forward_ms / 4
    assert known.step_ms > 75
    assert known.python_share > 0.8  # time.sleep is no operator


def test_the_table_adds_up(known: Profile) -> None:
    assert sum(row.ms for row in known.phases) == pytest.approx(known.step_ms)
    assert sum(row.share for row in known.phases) == pytest.approx(1)
    assert sum(row.calls for row in known.phases) == pytest.approx(known.calls)
    assert sum(row.kept_bytes for row in known.phases) == known.kept_bytes
    for row in known.phases:
        assert row.forward_ms + row.backward_ms == pytest.approx(row.ms)
    names = [row.name for row in known.phases]
    assert len(names) == len(set(names)) <= ENOUGH_ROWS
    assert names.index("layers.* (Slow)") < names.index("other (Slow)") < names.index("smaller parts")
    table = str(known)
    assert "layers.* (Slow)" in table
    assert "100.0%" in table.splitlines()[len(known.phases) + 1]
    assert json.loads(json.dumps(known.as_dict()))["step_ms"] == known.step_ms


def test_what_is_kept_for_backward() -> None:
    """A square keeps what it squares; parameters are there anyway, and a shared storage counts once."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x + x[:1] * x[1:2]

    model = nn.Sequential(nn.Linear(64, 256), Square(), nn.Linear(256, 256, bias=False), nn.Flatten(0))
    model.append(nn.Linear(32 * 256, 1))
    found = fastseq.profile(step_of(model, torch.ones(32, 64)), steps=1, warmup=1)
    kept = [32 * 64, 32 * 256, 32 * 256, 32 * 256]  # what the three layers read, and what is squared
    assert found.kept_bytes == 4 * sum(kept)
    assert found.peak_bytes > 4 * 32 * 256


def test_loading_clipping_and_optimizer_are_phases() -> None:
    class Data(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            time.sleep(0.003)
            return super().__getitem__(index)

    model = Slow(0.0, 0.001)
    data = iter(DataLoader(Data(torch.ones(1000, 8)), batch_size=1))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        (x,) = next(data)
        model(x).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found = fastseq.profile(step, steps=STEPS)
    assert found.phases[0].name == "data loading"
    assert found.phases[0].share > 0.3
    for name in ("gradient clipping", "optimizer"):
        assert phase(found, name).calls > 0
    assert any("Loading data is" in said for said in found.advice)


class Crf(nn.Module):
    """A tagger whose time goes into pytorch-crf."""

    def __init__(self) -> None:
        super().__init__()
        from torchcrf import CRF

        self.output, self.crf = nn.Linear(4, 6), CRF(6, batch_first=True)

    def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        return -self.crf(self.output(x), tags, mask=mask, reduction="mean")  # type: ignore[no-any-return]


def test_a_crf_gets_advice_that_was_measured() -> None:
    mask = torch.arange(30) < torch.tensor([[30], [12], [3], [3]])
    model = Crf()
    found = fastseq.profile(step_of(model, torch.randn(4, 30, 4), torch.zeros(4, 30).long(), mask), steps=STEPS)
    (said,) = [said for said in found.advice if "fastseq.patch" in said]
    assert said.startswith("crf (torchcrf.CRF): ")
    share = phase(found, "crf (CRF)").share
    assert share > 0.5
    assert f"{share:.0%} of the step" in said
    ratio = float(said.partition("would give ")[2].partition("x")[0])
    assert ratio > 1.2
    assert type(model.crf).__module__ == "torchcrf"
    (padding,) = [said for said in found.advice if "padding" in said]
    assert "60% of a batch's positions are padding (48 of 120 are real)" in padding


def test_many_small_calls_are_told() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step() -> None:
        x = weight
        for _ in range(400):
            x = x + sum(range(1000))
        x.sum().backward()

    found = fastseq.profile(step, steps=STEPS)
    assert found.calls > 400
    assert any(said.startswith("40") and "is Python between them" in said for said in found.advice)


def test_what_patch_would_change_can_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.integrations.patch", lambda model: pytest.fail("it was patched"))
    model = Crf()
    inputs = torch.randn(2, 5, 4), torch.zeros(2, 5).long(), torch.ones(2, 5).bool()
    fastseq.profile(step_of(model, *inputs), steps=1, warmup=1, patch=False)


def test_a_patch_that_does_not_suit_costs_the_advice_only() -> None:
    model = Crf()
    inputs = torch.randn(2, 5, 4), torch.zeros(2, 5).long(), torch.ones(2, 5).bool()
    train = step_of(model, *inputs)

    def step() -> None:
        assert type(model.crf).__module__ == "torchcrf", "only the one and true"
        train()

    found = fastseq.profile(step, steps=1, warmup=1)
    assert any("the step failed: AssertionError: only the one and true" in said for said in found.advice)
    step()


def test_a_patched_model_stays_patched() -> None:
    model = Crf()
    fastseq.patch(model)
    inputs = torch.randn(2, 5, 4), torch.zeros(2, 5).long(), torch.ones(2, 5).bool()
    found = fastseq.profile(step_of(model, *inputs), steps=1, warmup=1)
    assert isinstance(model.crf, fastseq.nn.CRF)
    assert not any("fastseq.patch" in said for said in found.advice)


def test_everything_is_left_as_it_was() -> None:
    model = Net()
    model.other.eval()
    model.head.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.AdamW(model.parameters())
    modes = [module.training for module in model.modules()]
    seen = []

    def step() -> None:
        seen.append(1)
        model(torch.ones(2, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    keys = {name: type(value) for name, value in vars(model).items()}
    state = [set(values) for values in optimizer.state.values()]
    fastseq.profile(step, steps=1, warmup=1)
    assert len(seen) > 4
    assert {name: type(value) for name, value in vars(model).items()} == keys
    assert [module.training for module in model.modules()] == modes
    assert [set(values) for values in optimizer.state.values()] == state
    assert [len(module._forward_hooks) for module in (model, model.other, model.head)] == [0, 0, 1]
    assert not global_hooks._has_any_global_hook()
    assert not optimizer_hooks._global_optimizer_pre_hooks


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6, 7])
def test_a_step_that_fails_leaves_no_hooks(failing: int) -> None:
    calls = []

    def step() -> None:
        calls.append(nn.Linear(2, 2)(torch.ones(1, 2)))
        if len(calls) == failing:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fastseq.profile(step, steps=1, warmup=1)
    assert not global_hooks._has_any_global_hook()


def test_the_trace_can_be_opened(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    fastseq.profile(
        step_of(nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Linear(16, 1)), torch.ones(4, 4)), trace=file
    )
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"]}
    assert {"0 (Linear)", "1 (Flatten)", "Sequential (Sequential)", "aten::addmm"} <= names


def test_a_compiled_model_is_one_phase() -> None:
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)), backend="eager")
    losses = []

    def step() -> None:
        loss = model(torch.ones(4, 8)).sum()
        loss.backward()
        losses.append(loss)

    found = fastseq.profile(step, steps=STEPS)
    assert (found.kept_bytes, found.peak_bytes) == (None, None)
    assert not any("Tanh" in row.name for row in found.phases)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert sum(row.ms for row in found.phases) == pytest.approx(found.step_ms)


def test_parts_of_a_model_have_their_names_in_it() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(64, 512), "head": nn.Linear(512, 1)})
    x = torch.ones(256, 64)
    found = fastseq.profile(
        lambda: model["head"](model["encoder"](x).tanh()).sum().backward(), model=model, steps=STEPS
    )
    assert phase(found, "encoder (Linear)").backward_ms > 0
    assert phase(found, "head (Linear)").forward_ms > 0


def test_advice_is_given_for_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.host.multiplies_bf16", lambda device: True)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 1), nn.Flatten(0), nn.Linear(512, 1))
    x = torch.ones(512, 512)
    slow = fastseq.profile(step_of(model, x), steps=STEPS)
    assert any("matrix products in float32" in said and 'autocast("cpu"' in said for said in slow.advice)

    def half() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x).backward()

    assert not any("float32" in said for said in fastseq.profile(half, steps=STEPS).advice)
    wide = nn.Linear(512, 4096)

    def updates(**settings: bool) -> list[str]:
        optimizer = torch.optim.Adam(wide.parameters(), **settings)

        def step() -> None:
            wide(x[:1]).sum().backward()
            optimizer.step()

        return fastseq.profile(step, steps=STEPS).advice

    assert any("Adam(..., fused=True)" in said for said in updates())
    assert not any("fused=True" in said for said in updates(fused=True))


def test_nothing_stands_out_where_nothing_does() -> None:
    found = fastseq.profile(lambda: Slow(0.002, 0.002)(torch.ones(8, 8)).sum().backward(), steps=STEPS)
    assert found.advice == [NOTHING]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 3}, TypeError, "step: a function that does one training step is wanted, got int"),
        ({"model": "net"}, TypeError, "model: a torch.nn.Module or None is wanted, got str"),
        ({"steps": 0}, ValueError, "steps: a count of at least 1 is wanted, got 0"),
        ({"steps": 2.5}, ValueError, "steps: a count of at least 1 is wanted, got 2.5"),
        ({"warmup": -1}, ValueError, "warmup: a count of at least 0 is wanted, got -1"),
        ({"trace": "/no/such/folder/t.json"}, ValueError, "trace: a file in a folder that exists is wanted, got '/no"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastseq.profile(**{"step": lambda: pytest.fail("it ran"), **arguments})
