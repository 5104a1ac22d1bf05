"""What a trace says, with traces that are made up: also what a CPU never writes."""

from __future__ import annotations

from typing import Any

import pytest

from fastseq.profiling.timeline import CLIP, DATA, NO_LAYER, OPTIMIZER, STEP, STEP_MARK, Key, Reading, read

MAIN, ENGINE_THREAD = 1, 2
NAMES = {"net (Net)": ("Net",), "net.crf (CRF)": ("Net", "crf")}
NODE = "autograd::engine::evaluate_function: "


def event(start: float, end: float, name: str, **extra: Any) -> dict[str, Any]:
    mark = name in NAMES or name == STEP_MARK or "#" in name
    args = {key: extra.pop(key) for key in list(extra) if " " in key}
    cat = "user_annotation" if mark else "cpu_op"
    return {"ph": "X", "cat": cat, "name": name, "tid": MAIN, "ts": start, "dur": end - start, "args": args, **extra}


def us(reading: Reading) -> dict[tuple[Any, bool], float]:
    """The microseconds of each place and direction."""
    found: dict[tuple[Any, bool], float] = {}
    for key, total in reading.totals.items():
        found[key.place, key.backward] = found.get((key.place, key.backward), 0) + total.us
    return {key: value for key, value in found.items() if value}


def training_step() -> list[dict[str, Any]]:
    seq = "Sequence number"
    return [
        event(0, 100, STEP_MARK),
        event(0, 10, "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
        event(12, 40, "net (Net)"),
        event(14, 18, "aten::linear", **{seq: 7}),
        event(20, 38, "net.crf (CRF)"),
        event(21, 25, "aten::gt", **{seq: 8}),  # makes no node: the next one has its number too
        event(26, 36, "aten::logsumexp", **{seq: 8}),
        event(28, 34, "aten::exp", **{seq: 8}),  # a part of it
        event(44, 52, f"{NODE}LogsumexpBackward0", **{seq: 8}),
        event(45, 51, "LogsumexpBackward0", **{seq: 8}),
        event(46, 50, "aten::mul"),
        event(53, 59, f"{NODE}AddmmBackward0", **{seq: 7}),
        event(54, 58, "_PythonNodeBackward", **{seq: 7}),
        event(55, 57, "aten::mm"),
        event(60, 62, f"{NODE}torch::autograd::AccumulateGrad"),
        event(64, 68, "aten::_foreach_norm"),
        event(70, 90, "Optimizer.step#AdamW.step"),
        event(72, 88, "aten::_fused_adamw_"),
    ]


def test_every_microsecond_is_somewhere() -> None:
    reading = read(training_step(), NAMES)
    assert (reading.steps, reading.us) == (1, 100)
    net, crf = ("Net",), ("Net", "crf")
    assert us(reading) == {
        (DATA, False): 10,
        (net, False): 28 - 18,
        (crf, False): 18,
        (crf, True): 8,
        (net, True): 6 + 1,  # and what the engine did before it
        (NO_LAYER, True): 2 + 1,
        (CLIP, False): 8,
        (OPTIMIZER, False): 20,
        (STEP, False): 2 + 4 + 10,
    }
    assert sum(us(reading).values()) == 100


def test_python_is_what_is_outside_operators() -> None:
    reading = read(training_step(), NAMES)
    crf = ("Net", "crf")
    python = {key.place: total.us for key, total in reading.totals.items() if key.python and not key.backward}
    assert python[crf] == 18 - 4 - 10
    assert reading.totals[Key(("Net",), True, True)].us == 2  # a node written in Python, without the product in it
    assert reading.totals[Key(("Net",), True, False)].us == 5
    assert sum(total.calls for total in reading.totals.values()) == 7  # exp is a part of logsumexp
    assert reading.op_us[crf] == {"aten::gt": 4, "aten::logsumexp": 10, "aten::mul": 4}


def test_a_clipping_is_told_by_its_norm() -> None:
    events = [e for e in training_step() if "norm" not in e["name"]]
    assert (CLIP, False) not in us(read(events, NAMES))
    assert us(read(events, NAMES))[STEP, False] == 16 + 8


def test_on_a_gpu_kernels_go_to_their_callers() -> None:
    """The backward pass runs in a thread of its own, while the main thread waits; kernels run later."""
    external, seq = "External id", "Sequence number"
    kernel = {"cat": "kernel", "tid": 7}
    reading = read(
        [
            event(0, 100, STEP_MARK),
            event(10, 40, "net (Net)"),
            event(20, 30, "aten::mm", **{external: 5, seq: 3}),
            event(50, 60, f"{NODE}MmBackward0", **{external: 6, seq: 3}, tid=ENGINE_THREAD),
            event(52, 58, "aten::mm", **{external: 7}, tid=ENGINE_THREAD),
            event(20, 80, "aten::pin_memory", tid=3),  # a loader's thread: not the step's time
            event(110, 130, "sgemm", **{external: 5}, **kernel),
            event(130, 170, "sgemm", **{external: 7}, **kernel),
            event(70, 90, "cudaStreamSynchronize", cat="cuda_runtime"),
            event(91, 92, "cudaMemcpyAsync", cat="cuda_runtime"),
            event(200, 210, "cudaDeviceSynchronize", cat="cuda_runtime"),  # after the step
        ],
        NAMES,
    )
    assert sum(us(reading).values()) == 100
    gpu = {(key.place, key.backward): (t.gpu_us, t.launches) for key, t in reading.totals.items() if t.launches}
    assert gpu == {(("Net",), False): (20, 1), (("Net",), True): (40, 1)}
    assert reading.waits == 1


def test_recomputed_layers_keep_their_time() -> None:
    """Gradient checkpointing runs modules again inside a node of the backward pass."""
    events = [
        event(0, 100, STEP_MARK),
        event(10, 20, "net (Net)", **{"Sequence number": 1}),
        event(12, 18, "aten::add", **{"Sequence number": 1}),
        event(30, 90, f"{NODE}AddBackward0", **{"Sequence number": 1}),
        event(40, 80, "net.crf (CRF)"),
    ]
    assert us(read(events, NAMES)) == {
        (STEP, False): 10 + 10 + 10,
        (("Net",), False): 10,
        (("Net",), True): 20,
        (("Net", "crf"), True): 40,
    }


@pytest.mark.parametrize("events", [[], [event(0, 1, "aten::add")]])
def test_a_trace_without_steps_is_empty(events: list[dict[str, Any]]) -> None:
    assert read(events, NAMES) == Reading()
