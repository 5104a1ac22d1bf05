"""The code blocks of the README and the pages: Python runs, and commands are what the real parsers take.

The Python blocks of a page run in their order in one namespace. What a reader need not see is in a comment before them:

    <!-- setup
    num_tags = 5
    -->

and a block that cannot run has the reason in one: <!-- not run: needs a GPU -->
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastseq

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "bash", "shell", "console")
FENCE = re.compile(
    r"(?:<!-- (?P<note>(?:setup\n|not run: \S).*?) ?-->\s*)?"
    r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<text>.*?)^ *```",
    re.MULTILINE | re.DOTALL,
)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the source tree")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    setup: str
    runs: bool
    line: int


def blocks(page: Path) -> Iterator[Block]:
    source = page.read_text("utf-8")
    for match in FENCE.finditer(source):
        note = match["note"] or ""
        indent = len(match["indent"])
        text = "".join(line[indent:] or "\n" for line in match["text"].splitlines(keepends=True))
        setup = note.removeprefix("setup\n") if note.startswith("setup\n") else ""
        line = source.count("\n", 0, match.start("language")) + 1
        yield Block(match["language"], text, setup, not note.startswith("not run"), line)


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _pages(*languages: str) -> list[Any]:
    return [pytest.param(p, id=_id(p)) for p in PAGES if any(b.language in languages and b.runs for b in blocks(p))]


def test_every_block_says_its_language() -> None:
    """One without a language would be tested by nobody."""
    assert not [f"{_id(page)}:{block.line}" for page in PAGES for block in blocks(page) if not block.language]


@pytest.mark.parametrize("page", _pages("python"))
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__", "torch": torch, "fastseq": fastseq}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            text = "\n" * block.line + block.text  # so that a traceback has the page's line
            exec(compile(block.setup, f"{_id(page)}, set-up", "exec"), namespace)
            exec(compile(text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", _pages(*SHELL))
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").touch()  # the reader's own; a page may say what is in it
    for block in blocks(page):
        if block.language == "yaml" and (name := re.match(r"# (\w+\.yaml)\n", block.text)):
            (tmp_path / name[1]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language in SHELL and block.runs:
            bash = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
            assert bash.returncode == 0, f"{_id(page)}:{block.line}: {bash.stderr}"
            for command in commands(block.text):
                try:
                    check(command)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{_id(page)}:{block.line}: {shlex.join(command)}: {error}") from error


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script, without comments, redirections and what is set for one command."""
    text = re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    command: list[str] = []
    to_file = False
    for token in [*lexer, "\n"]:
        if to_file:
            to_file = False
        elif set(token) & set("<>") and set(token) <= set("<>&"):
            to_file = True
            command = command[:-1] if command[-1:] in (["1"], ["2"]) else command
        elif set(token) <= set(";|&\n()"):
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command.pop(0)
            if command:
                yield command
            command = []
        else:
            command.append(token)


def check(command: list[str]) -> None:
    """Whether a command is one that this project can run.

    Raises:
        Exception: it is not.
    """
    program, *arguments = command
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        module, *arguments = arguments[1:]
        program = {"fastseq.cli": "fastseq", "torch.distributed.run": "torchrun"}.get(module, module)
    known = {"fastseq": _fastseq, "torchrun": _torchrun, "pip": _pip, "fastseq.info": lambda _: None}
    known.get(program, _other)([program, *arguments] if program not in known else arguments)


def _fastseq(arguments: list[str]) -> None:
    import typer

    from fastseq import cli, recipes
    from fastseq.recipes.config import load

    if arguments[0] == "bench":
        from fastseq_benchmarks.cli import FAMILIES, _parser

        assert _parser().parse_args(arguments[1:]).family in FAMILIES
        return
    command: Any = typer.main.get_command(cli.app())
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    if "--help" in arguments:
        return
    given = command.make_context(command.name, arguments).params
    if "recipe" in given:
        recipe = recipes.get(given["recipe"])
        if "overrides" in given:
            package = recipes.RECIPES[given["recipe"]]
            load(recipe.Config, package, given.get("config"), given["overrides"] or [])
    elif command.name == "fetch":
        from fastseq.recipes.fetch import SOURCES

        assert given["name"] in SOURCES


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(arguments)
    script, rest = given.training_script, given.training_script_args
    assert script in ("fastseq.cli", "fastseq"), script
    _fastseq(rest)


def _pip(arguments: list[str]) -> None:
    """The files and extras that it names are there."""
    assert arguments[0] in ("install", "wheel"), arguments
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for argument in arguments[1:]:
        wanted = re.fullmatch(r"(?:\.|fastseq-kernels)\[([\w,]+)\]", argument)
        for extra in wanted[1].split(",") if wanted else ():
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"there is no extra {extra}"


def _other(command: list[str]) -> None:
    """One of the tools of the trade; the files of the project that it names are there."""
    tools = "bash cd cmake ctest echo export git lint-imports ls mkdir mkdocs mypy pre-commit pytest python ruff venv"
    assert command[0] in [*tools.split(), "."], "no such command is known to the test"
    for word in command[1:]:
        name = word.partition("::")[0]
        if re.match(r"(\.ci|benchmarks|csrc|docs|fastseq|tests)/", name) or name == "setup.py":
            assert (ROOT / name).exists(), f"{name} is not there"
