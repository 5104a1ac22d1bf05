"""Every op x backend x device x law: a new op is tested by being registered.

Backends and devices that this machine does not have are skipped, with the reason; `pytest -m gpu` runs those on a GPU.
FASTSEQ_SEED=n draws other samples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseq
from fastseq.registry import OPS, BackendError, Op
from fastseq.testing import assert_matches_reference, backend_of, compare, describe, sample_inputs

SEED = int(os.environ.get("FASTSEQ_SEED", "0"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRIPLES = [
    pytest.param(name, b.name, device, marks=[pytest.mark.gpu] * (device == "cuda"))
    for name, op in sorted(OPS.items())
    for b in op.backends
    if b.name != "reference"
    for device in ([b.device] if b.device else ["cpu", "cuda"])
]
DIFFERENTIABLE = [triple for triple in TRIPLES if OPS[str(triple.values[0])].backward is not None]

each = pytest.mark.parametrize(("name", "backend", "device"), TRIPLES)
each_differentiable = pytest.mark.parametrize(("name", "backend", "device"), DIFFERENTIABLE)


@pytest.fixture
def op(name: str, backend: str) -> Any:
    """The op, with its backend forced; skips where the machine does not have it."""
    reason = backend_of(OPS[name], backend).available()
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with fastseq.use(backend):
        yield OPS[name]


def samples_of(op: Op, device: str, dtype: torch.dtype = torch.float64, seed: int = SEED) -> list[tuple[Any, ...]]:
    """The samples that the forced backend runs; a GPU kernel need not have every dtype and every option."""
    found = [args for args in sample_inputs(op, device=device, dtype=dtype, seed=seed) if runs(op, args)]
    if not found:
        pytest.skip(f"the backend runs no sample of {op.name} in {dtype}")
    return found


def runs(op: Op, args: Sequence[Any]) -> bool:
    try:
        op.choose(*args)
    except BackendError:
        return False
    return True


def ordinary(
    op: Op, device: str, dtype: torch.dtype = torch.float64, count: int = 3, seed: int = SEED
) -> list[tuple[Any, ...]]:
    """A few small finite samples that are not empty, of as many kinds (masked, strided) as there are."""
    kinds: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for args in samples_of(op, device, dtype, seed):
        tensors = [a for a in args if isinstance(a, Tensor)]
        small = all(0 < t.numel() <= 80 and t.shape[0] > 1 for t in tensors)
        if small and all(bool((t.double().abs() < 50).all()) for t in tensors):
            kinds.setdefault(tuple(a is None or (isinstance(a, Tensor) and a.is_contiguous()) for a in args), args)
    return list(kinds.values())[-count:]


def leaves(args: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The arguments, floats requiring grad; and those."""
    copies = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return copies, [a for a in copies if isinstance(a, Tensor) and a.requires_grad]


def scalar(output: Any) -> Tensor:
    """A number that depends on every element of the first output, the one that is trained on."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return (first * torch.linspace(1, 2, first.numel(), device=first.device).view(first.shape)).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_matches_reference(op: Op, backend: str, device: str, dtype: torch.dtype) -> None:
    samples_of(op, device, dtype)
    assert_matches_reference(op, backend, device=device, dtype=dtype, seed=SEED)


@each
def test_fake_is_like_real(op: Op, device: str) -> None:
    """Shapes, dtypes and strides of the fake implementation are the real ones, for every sample."""
    for args in samples_of(op, device, torch.bfloat16) + samples_of(op, device, torch.float32)[::5]:
        real = op.torch_op(*args)
        with FakeTensorMode() as mode:
            fake = op.torch_op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        pairs = [(real, fake)] if isinstance(real, Tensor) else list(zip(real, fake, strict=True))
        for r, f in pairs:
            assert (r.shape, r.dtype) == (f.shape, f.dtype), describe(args)
            assert r.stride() == f.stride() or r.numel() == 0, describe(args)


@each
def test_opcheck(op: Op, device: str) -> None:
    for args in ordinary(op, device, torch.float32):
        args = leaves(args)[0] if op.backward is not None else args
        torch.library.opcheck(op.torch_op, args)


@each_differentiable
def test_gradcheck(op: Op, device: str) -> None:
    """First and second derivatives, in the short way of plain calls and through the dispatcher."""
    for args in ordinary(op, device):
        copies, floats = leaves(args)

        def call(*values: Tensor, way: Any, args: tuple[Any, ...] = copies) -> Any:
            rest = iter(values)
            return way(*(next(rest) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))

        for way in (op, op.torch_op):
            check: Any = {"fast_mode": True, "nondet_tol": 0.0 if device == "cpu" else 1e-12}  # index_add_ on a GPU
            assert torch.autograd.gradcheck(lambda *v, w=way: call(*v, way=w), floats, **check)
            assert torch.autograd.gradgradcheck(lambda *v, w=way: call(*v, way=w), floats, **check)


@each
def test_compiles_whole(op: Op, device: str) -> None:
    """torch.compile(fullgraph=True) gives the same outputs and gradients."""
    torch._dynamo.reset()  # or the ops before this one count as recompilations of `__call__`
    args, floats = leaves(ordinary(op, device, torch.float32)[-1])
    compiled = torch.compile(op.__call__, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*args), op(*args)
    compare(got, wanted, 1e-6)
    if op.backward is not None:
        for g, w in zip(
            torch.autograd.grad(scalar(got), floats, allow_unused=True),
            torch.autograd.grad(scalar(wanted), floats, allow_unused=True),
            strict=True,
        ):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w)


@pytest.mark.slow
@each
def test_compiles_with_inductor(op: Op, device: str) -> None:
    torch._dynamo.reset()
    args, _ = leaves(ordinary(op, device, torch.float32)[-1])
    compare(torch.compile(op.__call__, fullgraph=True)(*args), op(*args), 1e-6)


@each
def test_vmap(op: Op, device: str) -> None:
    """Over every tensor argument at once, and over the first alone."""
    one, two = ordinary(op, device)[-1], ordinary(op, device, seed=SEED + 1)[-1]
    assert describe(one) == describe(two)
    tensors = [i for i, a in enumerate(one) if isinstance(a, Tensor)]
    for mapped in (tensors, tensors[:1]):
        both = tuple(torch.stack([a, b]) if i in mapped else a for i, (a, b) in enumerate(zip(one, two, strict=True)))
        dims = tuple(0 if i in mapped else None for i in range(len(one)))
        got = torch.vmap(op, dims)(*both)
        loop = [
            op(*one),
            op(*(b if i in mapped else a for i, (a, b) in enumerate(zip(one, two, strict=True)))),
        ]
        if isinstance(got, Tensor):
            compare(got, torch.stack(loop), 1e-12)
        else:
            compare(got, tuple(torch.stack(o) for o in zip(*loop, strict=True)), 1e-12)


@each_differentiable
def test_functional_transforms(op: Op, device: str) -> None:
    """vmap(grad) and jacrev of the first float argument are those of a loop with autograd."""
    args = ordinary(op, device)[-1]
    place = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())

    def at(x: Tensor) -> Any:
        return op(*args[:place], x, *args[place + 1 :])

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(scalar(at(x)), x)[0]

    xs = torch.stack([args[place], args[place] * 0.5])
    got = torch.vmap(torch.func.grad(lambda x: scalar(at(x))))(xs)
    torch.testing.assert_close(got, torch.stack([gradient(x) for x in xs]))

    def vector(x: Tensor) -> Tensor:
        output = at(x)
        return (output if isinstance(output, Tensor) else output[1]).flatten()

    jacobian = torch.func.jacrev(vector)(args[place])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(vector, args[place]))


@each
def test_threads_and_runs_are_bitwise_equal(op: Op, backend: str, device: str) -> None:
    if (backend, device) == ("eager", "cuda"):
        pytest.skip("plain torch on a GPU: index_add_ adds in any order")
    for args in samples_of(op, device, torch.float32)[::4]:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(op(*args))
        for other in results[1:]:
            compare(other, results[0], 0.0)


@each
def test_autocast_changes_nothing(op: Op, device: str) -> None:
    args = ordinary(op, device, torch.float32)[-1]
    with torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16):
        got = op(*args)
    compare(got, op(*args), 0.0 if device == "cpu" else 1e-6)


@each
def test_strides_do_not_matter(op: Op, device: str) -> None:
    for args in ordinary(op, device, torch.float32):
        strided = tuple(torch.stack([a, a], -1)[..., 0] if isinstance(a, Tensor) and a.dim() else a for a in args)
        compare(op(*strided), op(*args), 1e-6)


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_forced_backend_never_falls_back(name: str) -> None:
    args = next(sample_inputs(name))
    refused = [
        b for b in OPS[name].backends if b.refusal(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    ]
    assert "reference" in [b.name for b in refused]  # it is for CPUs
    for b in refused:
        meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        with fastseq.use(b.name), pytest.raises(BackendError, match=b.name):
            OPS[name].choose(*meta)
