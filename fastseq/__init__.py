"""fastseq: compiled sequence layers for PyTorch, with a fallback to pure PyTorch that is itself fast.

fastseq.nn             modules: CRF, tag_constraints
fastseq.functional     the same without a module
fastseq.flash_attn     the functions of flash_attn, on any device
fastseq.ops            tensors in, tensors out; torch.ops.fastseq.*
fastseq.use("eager")   force a backend;  fastseq.explain(op, *args)  says why one was or was not chosen
fastseq.patch(model)   swap what fastseq knows inside any module tree;  fastseq.unpatch(model)
fastseq.profile(step)  where the time of a training step goes, and what could be faster
fastseq.info()         versions, libraries, and the op x backend table
"""

from __future__ import annotations

from typing import Any

try:
    from fastseq import functional, nn, ops
    from fastseq.registry import explain, use
except Exception as error:  # torch or numpy is broken: `fastseq info` must still run, and say so
    _broken: Exception | None = error
else:
    _broken = None

__version__ = "0.1.0"
__all__ = ["explain", "functional", "info", "nn", "ops", "patch", "profile", "unpatch", "use"]


def info() -> None:
    """Print versions, instruction sets, compiled libraries, and each op's backends with the reason for every "no"."""
    from fastseq._info import main

    main()


def __getattr__(name: str) -> Any:
    """Import what needs more than torch and numpy, or is not on the training path, at its first use."""
    import importlib

    if _broken is not None and name in __all__:
        raise ImportError(f"fastseq cannot be used here: {_broken}") from _broken
    if name in {"patch", "unpatch"}:
        return getattr(importlib.import_module("fastseq.integrations"), name)
    if name == "profile":
        return importlib.import_module("fastseq.profiling").profile
    if name in {"flash_attn", "host", "integrations", "models", "profiling", "recipes", "testing"}:
        return importlib.import_module(f"fastseq.{name}")
    raise AttributeError(f"module 'fastseq' has no attribute {name!r}")
