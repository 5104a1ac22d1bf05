"""The CUDA library's build and loader, without CUDA: nvcc is a script that says what the real one says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastseq import library

BACKEND = Path(__file__).resolve().parents[2] / "build_backend"
pytestmark = pytest.mark.skipif(not BACKEND.exists() or sys.platform == "win32", reason="needs the source tree")

CUDA_13 = (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)
CUDA_12_4 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
FOR_CUDA, FOR_CPU = "cuda: Optional[str] = '13.0'", "cuda: Optional[str] = None"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The build's own modules, on a machine without nvcc."""
    monkeypatch.syspath_prepend(str(BACKEND))
    for variable in ("FASTSEQ_BUILD", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    names = ("find", "cuda", "native")
    for name in names:
        sys.modules.pop(f"fastseq_{name}", None)
    found = SimpleNamespace(**{name: importlib.import_module(f"fastseq_{name}") for name in names})
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(found.find, "CUDA_FOLDER", tmp_path / "cuda")
    monkeypatch.setattr(found.find, "_target", lambda: {"torch": None, "nvidia": [str(tmp_path / "nvidia")]})
    return found


def _nvcc(folder: Path, version: str = "13.0.88", supported: tuple[int, ...] = CUDA_13) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    said = "\\n".join(f"compute_{n}" for n in supported)
    path.write_text(
        f"""#!/bin/sh
case $1 in
  --version) printf 'Cuda compilation tools, release 0.0, V{version}\\n' ;;
  --list-gpu-arch) printf '{said}\\n' ;;
esac
"""
    )
    path.chmod(0o755)
    return str(path)


def _torch(folder: Path, cuda: str = FOR_CUDA) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "version.py").write_text(f"__version__ = '2.13.0+x'\n{cuda}\n")
    return folder


def test_nvcc_is_looked_for_in_order(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert modules.find.find_nvcc() is None
    places = ["cuda/bin", "path", "nvidia/cu9/bin", "nvidia/cu13/bin", "nvidia/cu14/bin", "home/bin"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for place in places:  # each is preferred to those before it
        wanted = _nvcc(tmp_path / place)
        assert modules.find.find_nvcc() == wanted


@pytest.mark.parametrize(
    ("supported", "wanted"),
    [
        (CUDA_13, ["75", "80", "86", "89", "90", "100", "120+PTX"]),
        (CUDA_12_4, ["60", "70", "75", "80", "86", "89", "90+PTX"]),
    ],
)
def test_usual_architectures(modules: SimpleNamespace, supported: tuple[int, ...], wanted: list[str]) -> None:
    assert modules.cuda.architectures("", list(supported), "1.2.3") == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8.0;8.6+PTX", ["80", "86+PTX"]),
        ("7.5 12.0", ["75", "120"]),
        ("9.0a, 10.0f;9.0a", ["90a", "100f"]),
        (" ; ", ["75", "80", "86", "89", "90", "100", "120+PTX"]),
    ],
)
def test_architectures_asked_for(modules: SimpleNamespace, text: str, wanted: list[str]) -> None:
    assert modules.cuda.architectures(text, list(CUDA_13), "1.2.3") == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ampere", "got 'Ampere', wanted numbers as in '8.0;9.0.PTX'"),
        ("80", "got '80', wanted numbers"),
        ("8.0;7.0", "got '7.0', and nvcc 13.0.88 can compile for 7.5, 8.0, .*, 12.1"),
    ],
)
def test_architectures_refused(modules: SimpleNamespace, text: str, message: str) -> None:
    with pytest.raises(modules.find.BuildError, match=f"TORCH_CUDA_ARCH_LIST: {message}"):
        modules.cuda.architectures(text, list(CUDA_13), "13.0.88")


def test_options_for_nvcc(modules: SimpleNamespace) -> None:
    assert modules.cuda.Cuda("nvcc", "13.0.88", ["75", "90a", "120+PTX"]).gencode() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]


@pytest.mark.parametrize(
    ("mode", "cuda", "reason"),
    [
        ("auto", FOR_CUDA, None),
        ("auto", FOR_CPU, r"torch 2.13.0\+x is not built for CUDA \(FASTSEQ_BUILD=cuda"),
        ("cuda", FOR_CUDA, None),
        ("cuda", FOR_CPU, None),
        ("require-cuda", FOR_CUDA, None),
        ("require-cuda", FOR_CPU, "is not built for CUDA"),
    ],
)
def test_which_torch_a_mode_wants(
    modules: SimpleNamespace, tmp_path: Path, mode: str, cuda: str, reason: str | None
) -> None:
    nvcc = _nvcc(tmp_path / "path")
    torch = _torch(tmp_path / "torch", cuda)
    if reason is None:
        assert modules.cuda.plan(mode, torch)[:2] == (nvcc, "13.0.88")
    else:
        with pytest.raises(modules.find.BuildError, match=reason):
            modules.cuda.plan(mode, torch)


def test_no_nvcc(modules: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(modules.find.BuildError, match=r'no nvcc was found .*pip install "nvidia-cuda-nvcc==13.0.\*"'):
        modules.cuda.plan("cuda", _torch(tmp_path / "torch"))


def test_an_nvcc_of_no_use(modules: SimpleNamespace, tmp_path: Path) -> None:
    nvcc = Path(_nvcc(tmp_path / "path", "11.8.89"))
    with pytest.raises(modules.find.BuildError, match=r"nvcc is version 11.8.89, wanted 12.0 or later"):
        modules.cuda.plan("cuda", None)
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(modules.find.BuildError, match=r"nvcc cannot be run: .*status 3"):
        modules.cuda.plan("cuda", None)


@pytest.fixture
def built(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that builds: all but CMake's steps, each of which takes the message of its failure, or None."""

    def build(mode: str, cpu: str | None, cuda: str | None) -> dict[str, Any]:
        native: ModuleType = modules.native
        monkeypatch.setenv("FASTSEQ_BUILD", mode)
        monkeypatch.setattr(native, "find_torch", lambda: _torch(tmp_path / "torch"))
        monkeypatch.setattr(native, "find_tool", lambda name: name)
        monkeypatch.setattr(native, "find_compiler", lambda: "c++")
        monkeypatch.setattr(native, "_run", lambda *_: None)

        def cmake(_: str, scratch: Path, define: dict[str, str], target: str) -> None:
            reason = {"all": cpu, "fastseq_cuda": cuda}[target]
            if reason is not None:
                raise modules.find.BuildError(reason)
            scratch.mkdir(exist_ok=True)
            (scratch / "toolchain.json").write_text("{}")
            (scratch / "cuda.json").write_text(json.dumps({"cuda_flags": define.get("FASTSEQ_CUDA_GENCODE", "")}))

        monkeypatch.setattr(native, "_cmake", cmake)
        record: dict[str, Any] = native.build(tmp_path, tmp_path / "scratch")
        assert record == json.loads((tmp_path / "lib" / "build.json").read_text())
        return record

    return build


def test_record(built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvcc(tmp_path / "path")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    record = built("auto", None, None)
    assert {"cpu", "cuda"} <= set(record["built"])
    assert "cuda" not in record["left_out"]
    assert (record["nvcc"], record["cuda_architectures"]) == ("13.0.88", ["75", "80"])
    assert record["cuda_flags"] == "-gencode=arch=compute_75,code=sm_75;-gencode=arch=compute_80,code=sm_80"


def test_a_failed_cuda_compile_keeps_the_cpu_library(built: Any, tmp_path: Path) -> None:
    _nvcc(tmp_path / "path")
    record = built("auto", None, "compiling failed: x.cu(3): error")
    assert "cpu" in record["built"]
    assert "cuda" not in record["built"]
    assert record["left_out"]["cuda"] == "compiling failed: x.cu(3): error"
    assert "nvcc" not in record


def test_no_cuda_library_without_the_cpu_library(built: Any, tmp_path: Path) -> None:
    _nvcc(tmp_path / "path")
    record = built("auto", "x.cpp is broken", None)
    assert record["built"] == []
    assert (record["left_out"]["cpu"], record["left_out"]["cuda"]) == (
        "x.cpp is broken",
        "the CPU library was not built",
    )


@pytest.mark.parametrize("mode", ["cuda", "require-cuda"])
def test_failures_that_stop_the_build(built: Any, tmp_path: Path, mode: str) -> None:
    with pytest.raises(SystemExit, match=f"FASTSEQ_BUILD={mode}, but no nvcc was found"):
        built(mode, None, None)
    _nvcc(tmp_path / "path")
    for cpu, cuda in (("broken", None), (None, "broken")):
        with pytest.raises(SystemExit, match=f"FASTSEQ_BUILD={mode}, but broken"):
            built(mode, cpu, cuda)


def test_cpu_asks_for_no_nvcc(built: Any, tmp_path: Path) -> None:
    _nvcc(tmp_path / "path")
    record = built("cpu", None, "never reached")
    assert record["left_out"]["cuda"] == "FASTSEQ_BUILD=cpu asked for the CPU library alone"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["80"], (8, 0), True),
        (["80"], (8, 9), True),  # the same generation, later
        (["86"], (8, 0), False),
        (["80"], (9, 0), False),
        (["80+PTX"], (12, 1), True),
        (["100"], (10, 3), True),
        (["90a+PTX"], (9, 0), True),
        (["90a+PTX"], (10, 0), False),  # an a is for that very architecture
        (["100f"], (10, 3), True),
        (["75", "120+PTX"], (7, 0), False),
    ],
)
def test_which_gpus_the_library_has_code_for(
    monkeypatch: pytest.MonkeyPatch, architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    _pretend(monkeypatch, architectures=architectures)
    assert (library.cannot_run(capability) is None) == runs


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, architectures=["75", "80+PTX"])
    reason = library.cannot_run((7, 0))
    assert reason is not None
    assert "code for sm_75, 80+PTX, and this GPU is sm_70; nvcc 13 compiles for none before sm_75" in reason
    _pretend(monkeypatch, architectures=["80"], driver=12080)
    assert library.cannot_run((8, 0)) == "the CUDA library needs an NVIDIA driver for CUDA 13.0, this one is for 12.8"
    _pretend(monkeypatch, architectures=["80"], driver=0)
    assert library.cannot_run((8, 0)) == "no NVIDIA driver was found"
    assert (library.runtime(), library.driver()) == ((13, 0), None)
    monkeypatch.setattr(library, "_libraries", {})
    monkeypatch.setattr(library, "_reasons", {"cuda": "not built: so it was"})
    assert library.cannot_run((8, 0)) == "not built: so it was"


def _pretend(monkeypatch: pytest.MonkeyPatch, *, architectures: list[str], driver: int = 13010) -> None:
    """A CUDA library for these architectures is loaded, and there is a driver."""
    functions = {"runtime": 13000, "driver": driver}
    fake = SimpleNamespace(**{f"fastseq_cuda_{n}_version": lambda v=v: v for n, v in functions.items()})
    monkeypatch.setattr(library, "_libraries", library._libraries | {"cuda": fake})
    monkeypatch.setattr(library, "build_record", lambda: {"cuda_architectures": architectures})
