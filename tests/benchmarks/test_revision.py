"""`--compare REV`: the package beside that of a git revision, in a checkout made for the test."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fastseq
from fastseq_benchmarks import cli, report, results, revision
from fastseq_benchmarks.results import CaseResult, RivalResult
from fastseq_benchmarks.revision import Pair
from fastseq_benchmarks.runner import Effort
from fastseq_benchmarks.stats import Estimate

CRF = "fastseq/functional/crf.py"


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout with the Python files of the package, which need no compiler, and one commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path_factory.mktemp("checkout")
    package = Path(fastseq.__file__).parent
    shutil.copytree(package, root / "fastseq", ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"))
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout, unchanged, as that of the command."""
    git(checkout, "checkout", "-q", ".")
    monkeypatch.setattr(revision, "_checkout", lambda: checkout)
    return checkout


def test_what_has_become_worse_since_a_revision_is_found(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (here / CRF).read_text("utf-8")
    copies = "def crf_viterbi(*args):\n    return _same(args[0].clone(), *args[1:])\n\n\ndef _same("
    slow = source.replace("def crf_viterbi(", copies)
    (here / CRF).write_text(slow, "utf-8")  # not committed: the working tree is now
    out = tmp_path / "now.json"
    options = ["--suite", "viterbi", "--shape", "2,6,3", "--budget", "0", "--threads", "1", "--json", str(out)]
    status = cli.main(["crf", *options, "--compare", "HEAD"])
    text = capsys.readouterr().out
    assert status == 1, text
    assert re.search(r"fastseq eager .* [\d.]+x \[.*REGRESSION: ops \d+ -> \d+", text), text
    assert text.rstrip().endswith("1 regressions in 2 results that both have"), text
    (case,) = json.loads(out.read_text("utf-8"))["cases"]
    assert case["rounds"] == Effort.min_rounds
    listed = subprocess.run(["git", "worktree", "list"], cwd=here, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1  # the worktree is gone


def test_a_revision_that_does_not_run_says_why(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "fastseq" / "registry.py").write_text("raise ImportError('no such thing')\n", "utf-8")
    assert cli.main(["crf", "--suite", "viterbi", "--shape", "2,6,3", "--compare", "HEAD"]) == 2
    text = capsys.readouterr().out
    assert "--compare: now the benchmarks do not run: ImportError: no such thing" in text


@pytest.mark.parametrize("name", ["no-such-branch", "--help", "HEAD:fastseq"])
def test_an_unknown_revision_gets_a_clear_error(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["crf", "--shape", "2,6,3", f"--compare={name}"]) == 2
    assert f"--compare: got {name!r}, wanted a file of --json, or a revision that git knows" in capsys.readouterr().out


def test_outside_a_checkout_there_are_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(revision, "HERE", tmp_path)
    assert cli.main(["crf", "--shape", "2,6,3", "--compare", "HEAD"]) == 2
    assert "--compare: a revision needs a git checkout of fastseq, and this is none" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [False, True])
def test_a_tree_is_compiled_only_where_its_sources_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    root, tree = tmp_path / "root", tmp_path / "tree"
    (root / "fastseq" / "lib").mkdir(parents=True)
    (root / "CMakeLists.txt").write_text("one")
    (root / "fastseq" / "lib" / "libfastseq_cpu.so").write_text("compiled")
    git(root, "init", "-q")
    git(root, "add", "CMakeLists.txt")
    git(root, "commit", "-q", "-m", "first")
    if changed:
        (root / "CMakeLists.txt").write_text("another")
    (tree / "fastseq").mkdir(parents=True)
    shutil.copy(root / "CMakeLists.txt", tree)
    commands: list[Any] = []

    def run(command: Any, **options: Any) -> Any:
        if command[0] == "git":
            return real(command, **options)
        commands.append((command[1:], options["cwd"]))
        return subprocess.CompletedProcess(command, 1, stdout="g++: many words\nno compiler\n")

    real = subprocess.run
    monkeypatch.setattr(revision.subprocess, "run", run)
    if not changed:
        revision._build(root, tree, "HEAD", "HEAD")
        assert (tree / "fastseq" / "lib" / "libfastseq_cpu.so").read_text() == "compiled"
        assert not commands
        return
    with pytest.raises(ValueError, match="--compare: v1 does not compile here: no compiler"):
        revision._build(root, tree, "HEAD", "v1")
    assert commands == [(["setup.py", "build_native", "--inplace"], tree)]


# ---- the verdict ---------------------------------------------------------------------------------------------------


def pair(ours: Estimate, control: Estimate | None = None, *, ops: int = 9, base: str = "peer") -> Pair:
    def case(count: int) -> CaseResult:
        one = Estimate(1.0, 0.9, 1.1)
        rivals = [RivalResult(name, "", True, 0.0, one, one, None, count, 10, 10) for name in (base, "fastseq cpu")]
        return CaseResult("crf", "loss", "B", "1", "float32", "cpu", base, 20, one, True, None, {}, rivals)

    return Pair(case(9), case(ops), {base: control or Estimate(1.0, 0.99, 1.01), "fastseq cpu": ours})


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (pair(Estimate(1.2, 1.1, 1.3)), "REGRESSION: slower"),
        (pair(Estimate(1.2, 1.04, 1.3)), "same"),  # its interval reaches what two processes differ by
        (pair(Estimate(1.2, 1.1, 1.3), Estimate(1.08, 1.02, 1.15)), "same"),  # so does the control's
        (pair(Estimate(1.2, 1.1, 1.3), Estimate(1.2, 1.1, 1.3)), "not judged"),
        (pair(Estimate(0.8, 0.7, 0.9)), "faster"),
        (pair(Estimate(1.0, 0.9, 1.1), ops=10), "REGRESSION: ops 9 -> 10"),
        (pair(Estimate(1.2, 1.1, 1.3), base="fastseq eager"), "REGRESSION: slower"),  # which controls nothing
    ],
)
def test_verdicts(found: Pair, word: str) -> None:
    table, regressions = report.compare_in_turns([found])
    words = {row[1]: row[-1] for row in table.rows}
    assert words["fastseq cpu"] == word
    assert regressions == sum(row[-1].startswith("REGRESSION") for row in table.rows)


def test_the_two_sides_take_turns() -> None:
    """Rounds are paired, and each side is first in half of them."""
    order: list[str] = []

    class Side:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def ask(self, what: str, *_: int) -> Any:
            if what == "begin":
                return ["peer", "ours", self.name]
            if what == "round":
                order.append(self.name)
                return {"peer": 1.0, "ours": self.seconds, self.name: 1.0}
            case = CaseResult("crf", "loss", "B", "1", "float32", "cpu")
            return json.loads(json.dumps(results.dataclasses.asdict(case)))

    sides: Any = Side("old", 1.0), Side("new", 2.0)
    found = revision._in_turns(*sides, 0, Effort(budget_s=0.0, min_rounds=4))
    assert order == ["new", "old", "old", "new"] * 2
    assert {name: ratio.median for name, ratio in found.ratios.items()} == {"peer": 1.0, "ours": 2.0}
