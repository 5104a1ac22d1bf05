"""All the dispatch there is: one `Op` object per operator, and the choice of its backend, per call.

An `Op` owns a schema, a reference (plain loops, float64), and a priority list of backends. PyTorch sees one custom op
per name, `torch.ops.fastseq.<name>`; the backend is chosen below that boundary, so `torch.compile(fullgraph=True)` sees
one opaque op, autograd is written once for all backends, and the choice is still made anew for each call.

    op(*args)                     run it on the first backend that can
    op.explain(*args)             a line per backend: "ok", or why it cannot run these arguments
    op.register(Backend(...))     add one from outside
    with use("eager"): ...        force one backend; forcing never falls back

Backends are tried in the order in which they were registered: the compiled ones, triton, eager.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import library
from fastseq.reasons import WhyNot, needs, no_cuda, with_gpu

__all__ = ["OPS", "Backend", "BackendError", "Op", "explain", "use", "value_errors"]

NAMESPACE = "fastseq"
LIB = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, Op] = {}
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What runs below the boundary of each `fastseq::` op by name, opaque ones included."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "fastseq_backend", default=os.environ.get("FASTSEQ_BACKEND") or None
)


class BackendError(RuntimeError):
    """No backend, or not the forced one, can run a call; the message has every backend's reason."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: cpu, cuda, triton, eager or reference, or that of a backend from outside.
        run: The implementation; takes the op's arguments.
        why_not: The reason it cannot run given arguments, or None.
        available: The reason it cannot run anything on this machine, or None.
        automatic: Whether it is chosen without being forced (all of the package's but the reference).
        device: The type of device it is for, where tests and benchmarks try it; None for any.
    """

    name: str
    run: Callable[..., Any]
    why_not: WhyNot
    available: Callable[[], str | None] = lambda: None
    automatic: bool = True
    device: str | None = None

    def refusal(self, *args: Any) -> str | None:
        """The reason this backend cannot run `args` here, or None."""
        return self.available() or self.why_not(*args)


class Op:
    """An operator: its schema, its reference, its backends, its derivative.

    Args:
        schema: `name(Tensor x, ...) -> ...`, as in `torch.library.define`.
        reference: The definition in plain loops; slow, float64 inside, CPU only. Never chosen unless forced.
        eager: The fastest that plain torch can do, on any device; the last choice, and never refuses.
        fake: Shapes and dtypes of the outputs for given (fake) inputs.
        samples: `samples(device, dtype, seed) -> iterator of argument tuples`, for the contract tests.
        half_products: Whether matrix products have the least exact of the arguments' dtypes, a half type too: results
            are then only as good as that, whatever their own dtype.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        samples: Callable[..., Iterator[tuple[Any, ...]]],
        half_products: bool = False,
    ) -> None:
        self.schema, self.name = schema, schema.partition("(")[0]
        self.samples, self.half_products = samples, half_products
        self.backends = [
            Backend("eager", eager, lambda *_: None),
            Backend("reference", reference, needs(device="cpu"), automatic=False, device="cpu"),
        ]
        self.setup: Any = None  # the derivative, where it has one: see `autograd`
        self.backward: Any = None
        self._function: Any = None  # the op as an autograd.Function, where it has a derivative
        self._direct: Callable[..., Any] | None = None  # its apply
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIB.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=LIB)
        self._vmap = _vmap_by_loop(self)
        torch.library.register_vmap(f"{NAMESPACE}::{self.name}", self._vmap, lib=LIB)
        self.torch_op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        OPS[self.name], IMPLEMENTATIONS[self.name] = self, self.run

    def register(self, backend: Backend, *, before: str = "eager") -> None:
        """Add a backend, to be tried before the one named.

        Raises:
            ValueError: The op has a backend of its name, or none that is named `before`.
        """
        names = [b.name for b in self.backends]
        if backend.name in names:
            raise ValueError(f"backend: {self.name} has one named {backend.name!r} already")
        if before not in names:
            raise ValueError(f"before: got {before!r}, wanted one of {', '.join(names)}")
        self.backends.insert(names.index(before), backend)

    def compiled(self, device: str, why_not: WhyNot) -> None:
        """Add the compiled backend of `device`: the op of this name in the library `fastseq_<device>`."""
        missing = library.why_not(device)
        if missing is not None:
            self.lacks(device, missing, why_not)
            return
        compiled = getattr(getattr(torch.ops, f"{NAMESPACE}_{device}"), self.name, None)
        if compiled is None:  # in a source tree, after an update
            self.lacks(device, f"the compiled {device} library is older than this op: build it again", why_not)
            return
        run = value_errors(compiled.default)
        if device == "cuda":
            self.register(Backend(device, run, with_gpu(why_not), no_cuda, device=device))
        else:
            self.register(Backend(device, run, why_not, device=device))

    def lazy(
        self, name: str, target: str, why_not: WhyNot, available: Callable[[], str | None], device: str = "cuda"
    ) -> None:
        """Add a backend that is imported at its first call; `target` is "package.module:function"."""

        def run(*args: Any) -> Any:
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)(*args)

        self.register(Backend(name, run, why_not, available, device=device))

    def lacks(self, name: str, reason: str, why_not: WhyNot | None = None) -> None:
        """Say why there is no backend `name`: `fastseq info`, `explain` and the error of forcing it repeat it.

        `why_not` is what the backend would refuse where it is built, and None where it is built nowhere: the table of
        what runs where is made of it.
        """

        def run(*args: Any) -> Any:
            raise BackendError(f"{self.name} has no backend {name!r}: {reason}")

        device = "cpu" if name == "cpu" else "cuda"
        self.register(Backend(name, run, why_not or (lambda *_: reason), lambda: reason, device=device))

    def autograd(self, *, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Give the op its derivative, for every backend.

        `setup(ctx, inputs, output)` and `backward(ctx, *grads)` are those of `torch.library.register_autograd`. They
        serve twice: below torch.compile, through the dispatcher, and else through an ordinary autograd.Function, which
        functorch understands, and which costs about 55 us less a training step than the dispatcher's way.

        Autograd runs the backward pass of a GPU's tensors in a thread of its own, which `use` does not reach: so the
        backend that was forced when `setup` ran is forced again while `backward` runs. Both are kept, with that, as
        attributes, for an autograd.Function that has the op inside.
        """
        self.setup, self.backward = setup, backward = _on_the_same_backend(setup, backward)
        torch.library.register_autograd(f"{NAMESPACE}::{self.name}", backward, setup_context=setup, lib=LIB)
        self._function = _function(self.name, self.run, setup, backward, self._vmap)
        # What Function.apply comes down to outside functorch, less the inspection of the signature (60 us).
        self._direct = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]

    def no_derivative(self) -> None:
        """Say that the op's outputs never require a gradient, as those of a search or of a sampler do not."""
        LIB.impl(self.name, torch.library.fallthrough_kernel, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """Run the op; differentiable if it has a derivative."""
        if not is_plain(args):
            functorch = self._function is not None and torch._C._are_functorch_transforms_active()
            return self._function.apply(*args) if functorch else self.torch_op(*args)
        if not torch.is_grad_enabled():
            return self.run(*args)
        if self._direct is not None:
            return self._direct(*args)
        with torch.no_grad():  # no backend shall have a derivative that the op has not
            return self.run(*args)

    def run(self, *args: Any) -> Any:
        """What PyTorch calls below the op boundary: the dispatch, in one line."""
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Backend:
        """The backend that would run `args`: the forced one, else the first that can."""
        forced = _forced.get()
        for backend in self.backends:
            wanted = backend.automatic if forced is None else backend.name == forced
            # The arguments first: what the machine has may be slow to find out, and wakes its driver up.
            if wanted and backend.why_not(*args) is None and backend.available() is None:
                return backend
        what = "no backend can" if forced is None else f"the forced backend {forced!r} cannot"
        raise BackendError(f"{what} run {self.name} on these arguments:\n{self.explain(*args)}")

    def explain(self, *args: Any) -> str:
        """One line a backend, in order of choice: `ok`, or the reason it cannot run `args`."""
        return "\n".join(f"  {b.name:9s} {b.refusal(*args) or 'ok'}" for b in self.backends)


def opaque(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """A custom op without backends or derivative: `run`, where a compiler or a transform must not look inside."""
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"

    def no_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name} has no derivative: for derivatives of this order, use neither torch.compile nor torch.func"
        )

    def run_with_autograd(*args: Any) -> Any:
        keys = torch._C.DispatchKey  # below the op boundary autograd is switched off; `run` may use it
        with (
            torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
            torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        ):
            return run(*args)

    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, run_with_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIB)
    torch.library.register_autograd(name, no_backward, lib=LIB)
    IMPLEMENTATIONS[name.partition("::")[2]] = run_with_autograd
    op = getattr(getattr(torch.ops, NAMESPACE), name.partition("::")[2]).default

    function: list[Any] = []

    def call(*args: Any) -> Any:
        return function[0].apply(*args) if torch._C._are_functorch_transforms_active() else op(*args)

    function.append(_function(name, run_with_autograd, lambda *_: None, no_backward, _vmap_by_loop(call)))
    return call


def _function(name: str, forward: Any, setup_context: Any, backward: Any, vmap: Any) -> Any:
    """An autograd.Function of these parts: the form that functorch understands."""
    parts = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    return type(
        name.replace("::", "_"), (torch.autograd.Function,), {key: staticmethod(part) for key, part in parts.items()}
    )


def _vmap_by_loop(call: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Vmap by a loop over the mapped dimension: right for every op, and the ops are batched already."""

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        slices = (
            [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        outputs = [call(*s) for s in slices]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    return vmap


def is_plain(args: Sequence[Any]) -> bool:
    """No compiler, transform, dispatch mode, tensor subclass or meta tensor: the dispatcher would add only time."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and all(type(a) in _PLAIN_TYPES and not (isinstance(a, Tensor) and a.is_meta) for a in args)
    )


_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), int, float, bool}


def value_errors(run: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the compiled library's "fastseq: argument ..." failures into ValueError, without the C++ trace."""

    def checked(*args: Any) -> Any:
        try:
            return run(*args)
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            if "fastseq: " in message:
                raise ValueError(message.partition("fastseq: ")[2]) from None
            raise

    return checked


def _on_the_same_backend(setup: Callable[..., None], backward: Callable[..., Any]) -> tuple[Any, Any]:
    """The two functions of a derivative, the second with the backend forced that was forced during the first."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forced = _forced.get()
        setup(ctx, inputs, output)

    def repeat(ctx: Any, *grads: Any) -> Any:
        if ctx.forced == _forced.get():
            return backward(ctx, *grads)
        token = _forced.set(ctx.forced)
        try:
            return backward(ctx, *grads)
        finally:
            _forced.reset(token)

    return remember, repeat


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Force one backend by name inside a `with` block; a call that it cannot run raises `BackendError`.

    A backward pass runs on the backend that was forced for its forward pass, or on its own choice if none was, wherever
    and in whatever thread it runs. Not so one that torch.compile has compiled: that follows the `use` of its own
    thread, which on a GPU is autograd's. The environment variable FASTSEQ_BACKEND forces everywhere in a process.

    Raises:
        ValueError: No op has a backend of that name.
    """
    known = sorted({b.name for op in OPS.values() for b in op.backends})
    if backend not in known:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(known)}")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(op_name: str, *args: Any) -> str:
    """Say which backend would run `op_name` on `args`, and why each of the others would not.

    Raises:
        ValueError: There is no op of that name.
    """
    if op_name not in OPS:
        raise ValueError(f"op_name: got {op_name!r}, wanted one of {', '.join(sorted(OPS))}")
    return OPS[op_name].explain(*args)
