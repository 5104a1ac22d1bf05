"""The pointer-generator's Triton kernels as they are launched: types, constants and alignments, for triton_compile."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.compiler import ASTSource

from fastseq.ops.pointer.nll import triton as host
from fastseq.ops.pointer.nll import triton_kernels

COMPILE = host.COMPILE
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
KERNELS = ("scores", "rows", "hidden_gradient", "weight_gradient")
PRODUCTS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLOATS = {"fp32": "fp32", "bf16": "i16", "fp16": "fp16"}
INTEGERS = ("targets", "source_ids")


class Case(NamedTuple):
    """A kernel as it is compiled.

    `form` is pointer or copynet; the matrices are of `dtype`, with float32 weights where it ends in a "+".
    """

    kernel: str
    form: str
    dtype: str
    hidden: int
    architecture: int


def cases() -> list[Case]:
    """Float32 and bfloat16 for all sizes; what is for one row, in both forms."""
    products = [k for k in KERNELS if k != "rows"]
    found = [Case(k, "pointer", d, 256, cc) for k in products for d in ("fp32", "bf16+") for cc in ARCHITECTURES]
    found += [Case(k, "pointer", "fp32", h, cc) for k in products for h in (64, 128, 512) for cc in (80, 90)]
    found += [Case(k, "pointer", d, 256, cc) for k in products for d in ("bf16", "fp16") for cc in (80, 90)]
    return found + [Case("rows", form, "fp32", 256, cc) for form in ("pointer", "copynet") for cc in ARCHITECTURES]


def source(case: Case) -> tuple[ASTSource, int]:
    """The kernel with the types, constants and alignments of a launch; and its warps."""
    function = getattr(triton_kernels, case.kernel)
    constants: dict[str, Any] = dict(host.options(case.kernel, case.hidden, case.dtype != "fp32"))
    warps = constants.pop("num_warps")
    dtype = case.dtype.rstrip("+")
    if case.kernel == "rows":
        constants |= {"PROBABILITIES": case.form == "pointer", "BP": 16}
        constants |= {"gate": None, "grad_gate": None} if case.form == "copynet" else {}
    else:
        constants |= {"PRODUCTS": PRODUCTS[dtype], "PRECISION": "tf32x3"}
    wide = "fp32" if case.dtype.endswith("+") else FLOATS[dtype]
    types = {"x": FLOATS[dtype]} | dict.fromkeys(("w", "grad_w"), wide) | dict.fromkeys(INTEGERS, "i64")
    types |= dict.fromkeys(("bias", "grad_bias"), "fp32")
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        number = name in ("N", "V", "H", "S", "T", "P", "ignore_index", "z_loss")
        if name in constants:
            signature[name] = "constexpr"
        elif number:
            signature[name] = "fp32" if name == "z_loss" else "i32"
        else:
            signature[name] = f"*{types.get(name, 'fp32')}"
        if signature[name].startswith("*") or (name == "H" and case.hidden % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes), warps
