"""What tells the parts of a step apart: hooks on all modules and optimizers of the process, while they are wanted."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.profiler import record_function

Path = tuple[str, ...]
"""Where a module is: the class of the root that it was found in, and the parts of its name there."""


class Marks:
    """Knows, while it is entered, which module runs; writes it into a trace where `recording` is set.

    Modules that the step calls from outside any other are roots; their submodules have the names that they have there.

    Args:
        model: a root that is known beforehand, for steps that call its parts only; or None.

    Attributes:
        roots: the modules that the step called, in order.
        modules: of each path, the module.
        optimizers: those that made a step.
        recording: write marks.
        names: of each mark in the trace, the place.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.roots: list[nn.Module] = []
        self.modules: dict[Path, nn.Module] = {}
        self.optimizers: list[Optimizer] = []
        self.recording = False
        self.names: dict[str, Path] = {}
        self._paths: dict[nn.Module, Path] = {}
        self._stack: list[tuple[Path, record_function | None]] = []
        if model is not None:
            self._add_root(model)

    def __enter__(self) -> Marks:
        self._handles = ExitStack()
        self._handles.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
        for handle in (
            register_module_forward_pre_hook(self.enter),
            register_module_forward_hook(self.leave, always_call=True),
            register_optimizer_step_pre_hook(self._optimizer),
        ):
            self._handles.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()

    @property
    def place(self) -> Path:
        """The module that runs, or ()."""
        return self._stack[-1][0] if self._stack else ()

    def path(self, root: nn.Module) -> Path:
        """The place of a module that has run, or is in one."""
        return self._paths[root]

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has made one piece of a module, or of all, so that none was seen."""
        made = ("_orig_mod", "_compiled_call_impl")
        found = (getattr(module, name, None) is not None for module in self.modules.values() for name in made)
        return not self.modules or any(found)

    @property
    def parameters(self) -> set[int]:
        """The addresses of the storages of the roots' parameters and buffers."""
        tensors = [tensor for root in self.roots for tensor in (*root.parameters(), *root.buffers())]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout == torch.strided}

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a module's forward."""
        if torch.compiler.is_compiling():  # a compiled module is one piece, and must stay one
            return
        if not self._stack:
            self._add_root(module)
        path = self._paths.get(module)
        if path is None:  # made on the way, and in no module's list
            path = self._paths[module] = (*self.place, type(module).__name__)
            self.modules[path] = module
        mark = None
        if self.recording:
            name = f"{'.'.join(path[1:]) or path[0]} ({type(module).__name__})"
            self.names[name] = path
            mark = record_function(name)
            mark.__enter__()
        self._stack.append((path, mark))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it, also where it has raised."""
        if torch.compiler.is_compiling() or not self._stack:
            return
        _, mark = self._stack.pop()
        if mark is not None:
            mark.__exit__(None, None, None)

    def _add_root(self, module: nn.Module) -> None:
        if module in self._paths:
            return
        name = type(module).__name__
        same = sum(type(root).__name__ == name for root in self.roots)
        root = f"{name} {same + 1}" if same else name
        self.roots.append(module)
        for inner, found in module.named_modules():
            path = (root, *inner.split(".")) if inner else (root,)
            self._paths.setdefault(found, path)
            self.modules.setdefault(path, found)

    def _optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self.optimizers:
            self.optimizers.append(optimizer)
