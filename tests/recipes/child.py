"""What tests run in a process of its own: given are a ``recipe``, ``overrides``, and what is to happen to it.

``die_at_rename``: it kills itself before its n-th rename of a file. ``file_limit``: no file can be larger, in bytes.
What the user would read of an error is left in ``<run_dir>-error.txt``.
"""

import os
import resource
import signal
from pathlib import Path

from fastseq.recipes import RECIPES, get
from fastseq.recipes.config import load
from fastseq.recipes.errors import RecipeError
from fastseq.recipes.train import run

recipe: str = globals()["recipe"]
overrides: list[str] = globals()["overrides"]
countdown: int = globals()["die_at_rename"]
limit: int | None = globals()["file_limit"]
rename = os.replace


def replace_or_die(source: object, target: object) -> None:
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)  # type: ignore[call-overload]


os.replace = replace_or_die  # type: ignore[assignment]
if limit is not None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
config = load(get(recipe).Config, RECIPES[recipe], None, overrides)
try:
    run(config, get(recipe).build)
except RecipeError as error:
    Path(f"{config.run_dir}-error.txt").write_text(f"{type(error).__name__}: {error}", "utf-8")
    raise
