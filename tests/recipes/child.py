"""What test_resume.py runs in a process of its own: ``overrides`` and ``die_at_rename`` are given to it."""

import os
import signal

from fastseq.recipes import get
from fastseq.recipes.config import load
from fastseq.recipes.train import run

overrides: list[str] = globals()["overrides"]
countdown: int = globals()["die_at_rename"]
rename = os.replace


def replace_or_die(source: object, target: object) -> None:
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)  # type: ignore[call-overload]


os.replace = replace_or_die  # type: ignore[assignment]
run(load(get("tagger").Config, "fastseq.recipes.tagger", None, overrides), get("tagger").build)
