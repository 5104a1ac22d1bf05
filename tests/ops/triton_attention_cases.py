"""Attention's Triton kernels as they are launched: types, constants and alignments, for triton_compile."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.compiler import ASTSource

from fastseq.ops.attention import triton_call as host
from fastseq.ops.attention.dot_product import triton_bias, triton_gradients, triton_kernels

COMPILE = host.COMPILE
KERNELS = {
    "forward": triton_kernels.forward,
    "key_gradient": triton_gradients.key_gradient,
    "query_gradient": triton_gradients.query_gradient,
    "bias_gradient": triton_bias.bias_gradient,
    "delta": triton_gradients.delta,
}
PRODUCTS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOATS = ("scale", "softcap", "factor")
POSITIONS = ("c2p", "p2c", "slots", "d_c2p", "d_p2c")
POINTERS = dict.fromkeys(("q", "k", "v", "bias", "out", "g", "dq", "dk", "dv", "grad_out", "c2p", "p2c"), "")
POINTERS |= dict.fromkeys(("cu_q", "cu_k", "lengths", "slots"), "i32") | {"seed": "i64"}
POINTERS |= dict.fromkeys(("slopes", "lse", "deltas", "grad_lse", "partial", "d_c2p", "d_p2c"), "fp32")
PRESENT = {  # of the arguments that may be None
    "all": ("bias", "slopes", "cu_q", "cu_k", "lengths", "seed", "grad_lse"),
    "positions": ("lengths", *POSITIONS),
}


class Case(NamedTuple):
    """A kernel as it is compiled.

    `form` is plain, causal, all (packed, causal, with a window, softcap, dropout, bias, slopes and lengths), or
    positions, which is disentangled attention.
    """

    kernel: str
    form: str
    dtype: str
    size: int
    architecture: int


def cases() -> list[Case]:
    """Heads of 64 in all forms and on most architectures; others where registers or shared memory get scarce."""
    products = [k for k in KERNELS if k != "delta"]
    found = [Case(k, "plain", "bf16", 64, cc) for k in products for cc in (80, 90, 120)]
    for cc in (80, 90):
        found += [Case(k, form, "bf16", 64, cc) for k in products for form in ("causal", "all")]
        found += [Case(k, "positions", "bf16", 64, cc) for k in products[:3]]
        found += [Case(k, "plain", "fp32", 64, cc) for k in products]
        found += [Case(k, "causal", "bf16", 128, cc) for k in products]
    found += [Case(k, "plain", "bf16", 256, 90) for k in products]
    found += [Case(k, "plain", "fp32", size, 80) for k in products for size in (128, 256)]
    return [*found, Case("delta", "all", "bf16", 64, 80), Case("delta", "plain", "fp32", 64, 90)]


def _options(case: Case) -> dict[str, int]:
    return host.options(case.kernel, case.size, case.dtype != "fp32", case.form == "positions")


def stages(case: Case) -> int:
    """How many tiles are loaded ahead."""
    return _options(case)["num_stages"]


def _constants(case: Case, names: tuple[str, ...]) -> dict[str, Any]:
    constants: dict[str, Any] = dict(_options(case))
    present = PRESENT.get(case.form, ())
    optional = {name for names in PRESENT.values() for name in names}
    absent = [name for name in names if name in optional and name not in present]
    constants |= {name: None for name in absent if (case.kernel, name) != ("bias_gradient", "bias")}
    constants |= {"D": case.size, "LEFT": case.form == "all", "RIGHT": case.form in ("causal", "all")}
    constants |= {"SOFTCAP": case.form == "all", "DROPOUT": case.form == "all", "SUM_I": False, "SUM_J": False}
    constants |= {"PRODUCTS": PRODUCTS[case.dtype], "PRECISION": "tf32x3"}
    if case.form == "all":
        constants.pop("G", None)
    else:
        constants["G"] = 1
    return {name: value for name, value in constants.items() if name in (*names, "num_warps")}


def source(case: Case) -> tuple[ASTSource, int]:
    """The kernel with the types, constants and alignments of a launch; and its warps."""
    function = KERNELS[case.kernel]
    constants = _constants(case, tuple(function.arg_names))
    warps = constants.pop("num_warps")
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = "fp32" if name in FLOATS else "i32"
        signature[name] = f"*{POINTERS[name] or case.dtype}" if name in POINTERS else kind
        multiple = name[:2] in ("q_", "k_", "v_") or name in ("Sq", "Sk", "max_q", "max_k", "T", "P")
        if name in POINTERS or multiple:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes), warps
