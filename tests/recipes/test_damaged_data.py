"""A data file that is not what it should be: one line that names the file, in every recipe, and no run begins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastseq.recipes import RECIPES, get
from fastseq.recipes.config import load
from fastseq.recipes.errors import DataError

GARBAGE = bytes(range(256)) * 8


def utf16(data: bytes) -> bytes:
    return data.decode("utf-8").encode("utf-16")


def half_a_line(data: bytes) -> bytes:
    """Cut off in the midst of the last line's first word."""
    return data[: data.rstrip().rindex(b"\n") + 2]


def one_byte(data: bytes) -> bytes:
    """A byte that no UTF-8 has, in a line of the middle."""
    place = data.index(b"\n", len(data) // 2) + 1
    return data[:place] + b"\xff" + data[place:]


def no_column(data: bytes) -> bytes:
    """JSON lines, and lines of CoNLL, of one column that nobody asks for."""
    return b'{"other": "x"}\n' if data.startswith(b"{") else b"word\nword\n\n"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: GARBAGE,
    "another encoding": utf16,
    "one byte": one_byte,
    "half a line": half_a_line,
    "no column": no_column,
}


def damaged(settings: list[str], key: str, tmp_path: Path, damage: Callable[[bytes], bytes]) -> tuple[list[str], Path]:
    """The settings with the file of a key damaged, and that file."""
    place = next(i for i, item in enumerate(settings) if item.startswith(f"{key}="))
    old = Path(settings[place].partition("=")[2])
    new = tmp_path / f"damaged{old.suffix}"
    new.write_bytes(damage(old.read_bytes()))
    return [*settings[:place], f"{key}={new}", *settings[place + 1 :]], new


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "image"])
def test_a_damaged_file_is_named(recipe: str, damage: str, small_run: Any, tmp_path: Path) -> None:
    settings, file = damaged(small_run(recipe, tmp_path / "run"), "data.dev", tmp_path, DAMAGES[damage])
    config = load(get(recipe).Config, RECIPES[recipe], None, settings)
    with pytest.raises(DataError, match=re.escape(str(file))) as raised:
        get(recipe).build(config)
    if damage not in ("empty", "another encoding", "garbage"):
        assert re.search(r":\d+: ", str(raised.value)), "no line is named"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_damaged_table_is_named(suffix: str, reviews: dict[str, Path], small_run: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in reviews["dev"].read_text("utf-8").splitlines()]
    comma = "," if suffix == ".csv" else "\t"
    whole = f"text{comma}label\n" + "".join(f"{row['text']}{comma}{row['label']}\n" for row in rows)
    table = tmp_path / f"whole{suffix}"
    table.write_text(whole, "utf-8")
    settings = [
        f"data.dev={table}" if item.startswith("data.dev=") else item
        for item in small_run("classifier", tmp_path / "run")
    ]
    for damage in (DAMAGES["empty"], DAMAGES["garbage"], utf16, one_byte, half_a_line):
        changed, file = damaged(settings, "data.dev", tmp_path, damage)
        config = load(get("classifier").Config, RECIPES["classifier"], None, changed)
        with pytest.raises(DataError, match=re.escape(str(file))):
            get("classifier").build(config)


@pytest.mark.parametrize("damage", [b"", GARBAGE, None], ids=["empty", "garbage", "cut off"])
def test_a_damaged_image_is_named(damage: bytes | None, images: Path, small_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for kind in ("dark", "light"):
        (folder / kind).mkdir(parents=True)
        for i in range(9):
            data = (images / kind / f"{i}.png").read_bytes()
            (folder / kind / f"{i}.png").write_bytes(data)
    file = folder / "light" / "3.png"
    file.write_bytes(file.read_bytes()[:60] if damage is None else damage)
    settings = [
        f"data.folder={folder}" if item.startswith("data.folder=") else item
        for item in small_run("image", tmp_path / "run")
    ]
    config = load(get("image").Config, RECIPES["image"], None, settings)
    with pytest.raises(DataError, match=re.escape(str(file))):
        get("image").build(config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_checkpoint_is_read_without_running_code(recipe: str, small_run: Any, tmp_path: Path) -> None:
    from fastseq.recipes.train import run

    settings = [*small_run(recipe, tmp_path / "run"), "train.max_steps=6"]
    run(load(get(recipe).Config, RECIPES[recipe], None, settings), get(recipe).build)
    for name in ("best.pt", "last.pt", "previous-last.pt"):
        assert torch.load(tmp_path / "run" / name, weights_only=True)
