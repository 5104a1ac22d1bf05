"""The gates on what nvcc makes of the CUDA kernels, without nvcc: loops in a listing, and the table."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "testing"
pytestmark = pytest.mark.skipif(not FOLDER.exists() or sys.platform == "win32", reason="needs the source tree")

# Two loops, one in the other, with a copy for split-up lanes behind the end, which jumps back; and a wait for lanes.
LISTING = """
\t.section\t.text._Z1kv,"ax",@progbits
.L_x_0:
        /*0000*/                   LDG.E R0, [R2.64] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [R0] ;
        /*0020*/                   FFMA R8, R4, R5, R8 ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*0040*/                   SHFL.BFLY PT, R9, R8, 0x1, 0x1f ;
.L_x_2:
        /*0050*/                   VOTE.ANY R20, PT, PT ;
        /*0060*/              @P2 BRA.U `(.L_x_2) ;
        /*0070*/              @P0 BRA `(.L_x_1) ;
        /*0080*/              @!P1 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_9:
        /*00a0*/                   WARPSYNC.COLLECTIVE R1, `(.L_x_2) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("sass", "cuda_resources")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def _found(modules: SimpleNamespace, loops: tuple[int, ...] = (100,), **row: int) -> tuple:
    numbers = {"registers": 100, "barriers": 1, "shared": 4096, "blocks": 4, "warps": 16} | row
    counts = [Counter({"FFMA": 32, "IMAD": n - 32}) for n in loops]
    return modules.cuda_resources.Found(numbers | {"loops": list(loops)}, counts, [])


def test_the_innermost_loop_that_works_is_found(modules: SimpleNamespace) -> None:
    kernel = modules.sass.kernels(LISTING)["_Z1kv"]
    loops = kernel.innermost_loops()
    assert [modules.sass.describe(loop) for loop in loops] == ["7: 1 FFMA, 1 LDS.128, 1 SHFL"]
    assert kernel.counts()["LDG"] == 1


@pytest.mark.parametrize(
    ("row", "loops", "fails"),
    [
        ({}, (100,), False),
        ({"registers": 99}, (90,), False),
        ({"registers": 101}, (100,), True),
        ({"shared": 4112}, (100,), True),
        ({"warps": 12}, (100,), True),
        ({}, (105,), False),
        ({}, (106,), True),
        ({}, (100, 100), True),
    ],
)
def test_what_is_worse_fails(modules: SimpleNamespace, row: dict, loops: tuple[int, ...], fails: bool) -> None:
    table = {"nvcc": "1", "kernels": {"sm_90": {"k": _found(modules).row}}}
    found = {"sm_90": {"k": _found(modules, loops, **row)}}
    assert bool(modules.cuda_resources.judge(table, found, "1")) == fails


def test_another_compiler_may_allocate_otherwise_and_not_spill(modules: SimpleNamespace) -> None:
    table = {"nvcc": "1", "kernels": {"sm_90": {"k": _found(modules).row}}}
    other = _found(modules, (200,), registers=200)
    judge = modules.cuda_resources.judge
    assert not judge(table, {"sm_90": {"k": other}}, "2")
    assert judge(table, {"sm_90": {"k": other._replace(faults=["local memory"])}}, "2")
    assert judge(table, {"sm_90": {"k": _found(modules, shared=8192)}}, "2")


def test_a_kernel_must_be_in_the_table_and_still_there(modules: SimpleNamespace) -> None:
    row = _found(modules)
    judge = modules.cuda_resources.judge
    assert judge({"nvcc": "1", "kernels": {"sm_90": {}}}, {"sm_90": {"k": row}}, "1")
    assert judge({"nvcc": "1", "kernels": {"sm_90": {"k": row.row}}}, {"sm_90": {}}, "1")


def test_room_of_a_multiprocessor(modules: SimpleNamespace) -> None:
    room = modules.cuda_resources.room
    assert room(90, threads=128, registers=168, shared=26688) == 3  # by registers
    assert room(90, threads=128, registers=32, shared=26688) == 8  # by shared memory
    assert room(75, threads=128, registers=32, shared=26688) == 2
    assert room(90, threads=256, registers=16, shared=0) == 8  # by threads
    assert room(86, threads=32, registers=16, shared=0) == 16  # by blocks


def test_the_steps_of_a_recursion_read_whole_vectors(modules: SimpleNamespace) -> None:
    faults = modules.cuda_resources.recursion_faults
    step = Counter({"FFMA": 32, "LDS.128": 8})
    assert faults("sweep_kernel<float, Registers<32, 1>>", [step, step]) == []
    assert faults("sweep_kernel<float, Registers<32, 1>>", [step, Counter({"FFMA": 32, "LDS": 32})])
    assert faults("viterbi_kernel<InRegisters<float, float, 32, 1>>", []) == []
