"""A call of attention's Triton kernels: arguments as kernels take them, sizes of tiles, launches.

Both ops of this family are made of the same kernels. Nothing here waits for the device or asks it for a size: all can
be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from fastseq.ops.attention.dot_product import triton_bias, triton_gradients, triton_kernels

__all__ = ["Call", "options"]

COMPILE: dict[str, Any] = {"enable_fp_fusion": True}
PROGRAMS = 264  # two for each multiprocessor of the largest GPUs
PARTS = 64
INTERPRETED = triton.knobs.runtime.interpret

# BM queries, BN keys, warps, stages; by the head size up to which it holds. The fastest on an H100, up to 128, of what
# needs no more than 99 KB of shared memory, which all GPUs from sm_80 on have, and hardly spills.
_HALF = {
    "forward": {64: (128, 64, 8, 3), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
    "key_gradient": {64: (32, 64, 4, 3), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
    "query_gradient": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 8, 1)},
    "bias_gradient": {64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
}
_FULL = {
    "forward": {64: (128, 64, 8, 1), 128: (64, 32, 8, 1), 256: (32, 16, 4, 1)},
    "key_gradient": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "query_gradient": {64: (64, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "bias_gradient": {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
}
_POSITIONS = {"forward": (64, 32, 4, 2), "key_gradient": (32, 32, 4, 2), "query_gradient": (32, 32, 4, 2)}


def options(kernel: str, D: int, half: bool, positions: bool = False) -> dict[str, int]:
    """The compile-time sizes of a kernel; with what positions meet, half types need more registers."""
    width = max(16, triton.next_power_of_2(D))
    if kernel == "delta":
        return {"BR": max(1, 2048 // width), "BD": width, "num_warps": 4, "num_stages": 1}
    table = (_HALF if half else _FULL)[kernel]
    queries, keys, warps, stages = _POSITIONS[kernel] if positions and half and width <= 64 else table[max(64, width)]
    return {"BM": queries, "BN": keys, "BD": width, "num_warps": warps, "num_stages": stages}


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch on the current stream of the current device."""
    kernel[(programs,)](*args, **COMPILE, **constants)


def _bits(tensor: Tensor | None) -> Tensor | None:
    """The interpreter gets bfloat16 by its bits; a GPU's kernels know it."""
    return tensor.view(torch.int16) if INTERPRETED and tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def _rows(x: Tensor) -> Tensor:
    """With numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _products(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """The type of the matrix products, that of q; float32 by three TF32 products, or one if allowed."""
    kind = {torch.bfloat16: "emulated" if INTERPRETED else "bfloat16", torch.float16: "float16"}.get(dtype, "float32")
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRODUCTS": kind, "PRECISION": "tf32" if tf32 else "tf32x3"}


class Call:
    """The seventeen arguments of `attention`, and for disentangled attention what positions meet: (H,B*S,P)."""

    def __init__(
        self, args: tuple[Any, ...], c2p: Tensor | None = None, p2c: Tensor | None = None, slots: Tensor | None = None
    ) -> None:
        q, k, v, bias, slopes, cu_q, cu_k, lengths, seed, max_q, max_k, scale, causal, left, right, cap, dropout = args
        self.lead, self.like, self.bias, packed = q, (q, k, v), bias, cu_q is not None
        self.B, self.Sq, self.H, self.D = q.shape
        self.Sk, self.Hk = k.shape[1:3]
        self.N = cu_q.shape[0] - 1 if packed else self.B
        self.max_q, self.max_k = (max(1, max_q), max(1, max_k)) if packed else (self.Sq, self.Sk)
        q, k, v = map(_rows, (q, k, v))
        middle = None if slots is None else slots.contiguous()[len(slots) // 2 :]
        offsets = cu_q, cu_k, lengths
        tensors = *map(_bits, (q, k, v, bias)), slopes, *map(_contiguous, offsets), seed
        self.tensors, self.positions = tensors, (_bits(c2p), _bits(p2c), middle)
        strides = [s for x in (q, k, v) for s in (0 if packed else x.stride(0), x.stride(1), x.stride(2))]
        per_n = 0
        if slopes is not None:
            per_n = slopes.stride(0) if slopes.dim() == 2 and len(slopes) > 1 else 0
        self.strides = *strides, *_broadcast_strides(bias), per_n
        met = c2p if p2c is None else p2c
        self.sizes = self.N, self.H, self.H // max(1, self.Hk), self.Sq, self.Sk, self.max_q, self.max_k
        self.tables = self.B * self.Sq, 0 if met is None else met.shape[2]
        right = 0 if causal else right
        has_left, has_right = 0 <= left < self.max_k - 1, 0 <= right < self.max_q - 1
        threshold = min(math.floor(dropout * 65536 + 0.5), 65535)
        factor = 65536 / (65536 - threshold)
        self.numbers = left if has_left else 0, right if has_right else 0, scale, cap, threshold, factor
        self.constants = {
            "D": self.D, "LEFT": has_left, "RIGHT": has_right, "SOFTCAP": cap > 0, "DROPOUT": threshold > 0,
            **_products(q.dtype, q.device)
        }  # fmt: skip
        self.half = q.dtype != torch.float32

    def _sizes(self, kernel: str) -> dict[str, int]:
        return options(kernel, self.D, self.half, self.positions[2] is not None)

    def _over_queries(self, kernel: Any, name: str, *outputs: Tensor | None) -> None:
        sizes = self._sizes(name)
        programs = triton.cdiv(self.max_q, sizes["BM"]) * self.N * self.H
        _launch(
            kernel, programs, *self.tensors, *self.positions, *outputs, *self.strides, *self.sizes, *self.tables,
            *self.numbers, **self.constants, **sizes
        )  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (B,Sq,Hq,D) and lse (B,Hq,Sq)."""
        out = self.lead.new_empty(self.lead.shape)
        lse = self.lead.new_empty(self.B, self.H, self.Sq, dtype=torch.float32)
        if not self.N * self.H * self.Sq:
            return out.zero_(), lse.fill_(-math.inf)
        with torch.cuda.device_of(self.lead):
            self._over_queries(triton_kernels.forward, "forward", _bits(out), lse)
        return out, lse

    def backward(
        self, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool,
        d_c2p: Tensor | None = None, d_p2c: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of q, k, v and, if asked for, the bias; adds those of what positions meet to d_c2p, d_p2c."""
        dq, dk, dv = (x.new_empty(x.shape) for x in self.like)
        if not self.N * self.H * self.Sq:
            return dq.zero_(), dk.zero_(), dv.zero_(), self._empty_bias(bias_grad).zero_()
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        out, lse, grad = out.contiguous(), lse.contiguous(), grad.contiguous()
        deltas = torch.empty_like(lse)
        with torch.cuda.device_of(self.lead):
            rows, sizes = self.B * self.Sq * self.H, self._sizes("delta")
            programs = triton.cdiv(rows, sizes["BR"])
            statistics = _bits(grad), _contiguous(grad_lse), _bits(out), lse, deltas
            _launch(triton_gradients.delta, programs, *statistics, rows, self.Sq, self.H, D=self.D, **sizes)
            given = _bits(grad), lse, deltas
            if dk.numel():
                sizes = self._sizes("key_gradient")
                programs = triton.cdiv(self.max_k, sizes["BN"]) * self.N * self.Hk
                _launch(
                    triton_gradients.key_gradient, programs, *self.tensors, *self.positions, *given, _bits(dk),
                    _bits(dv), d_p2c, *self.strides, *self.sizes, *self.tables, *self.numbers, **self.constants, **sizes
                )  # fmt: skip
            self._over_queries(triton_gradients.query_gradient, "query_gradient", *given, _bits(dq), d_c2p)
            dbias = self._empty_bias(bias_grad)
            if dbias.numel():
                self._bias_gradient(given, dbias)
        return dq, dk, dv, dbias

    def _empty_bias(self, wanted: bool) -> Tensor:
        """For the bias's gradient; (0,) where there is none."""
        if self.bias is None:
            return torch.empty(0, dtype=torch.float32, device=self.lead.device)
        return torch.empty(self.bias.shape if wanted else (0,), dtype=self.bias.dtype, device=self.bias.device)

    def _bias_gradient(self, given: tuple[Tensor | None, ...], dbias: Tensor) -> None:
        """Write it, as a sum of partial sums where few tiles of bias are each broadcast to many of scores."""
        sizes = self._sizes("bias_gradient")
        whole = self.N, self.H, triton.cdiv(self.max_q, sizes["BM"]), triton.cdiv(self.max_k, sizes["BN"])
        shared = [length == 1 for length in dbias.shape]
        own = [1 if one else count for one, count in zip(shared, whole, strict=True)]
        loop = [count if one else 1 for one, count in zip(shared, whole, strict=True)]
        parts = max(1, min(math.prod(loop), PROGRAMS // math.prod(own), PARTS))
        partial = dbias.new_empty(parts, *dbias.shape, dtype=torch.float32)
        _launch(
            triton_bias.bias_gradient, math.prod(own) * parts, *self.tensors, *given, partial, *self.strides,
            *self.sizes, *self.numbers, *own, *loop, parts, *dbias.shape[2:], SUM_I=shared[2], SUM_J=shared[3],
            **self.constants, **sizes
        )  # fmt: skip
        torch.sum(partial, 0, out=dbias) if dbias.dtype == torch.float32 else dbias.copy_(partial.sum(0))


def _broadcast_strides(bias: Tensor | None) -> tuple[int, ...]:
    """Strides that are 0 where all share one element."""
    return (
        (0,) * 4 if bias is None else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    )
