"""The CRF's Triton kernels as they are launched: types, constants and alignments, for triton_compile."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.compiler import ASTSource

from fastseq.ops.crf import triton as host
from fastseq.ops.crf import triton_log_domain, triton_posterior, triton_scaled, triton_search

COMPILE = host.COMPILE
KERNELS = {
    "sweep": triton_scaled.sweep,
    "posterior": triton_posterior.posterior,
    "exact": triton_log_domain.exact,
    "reduce": triton_posterior.reduce,
    "viterbi": triton_search.viterbi,
}
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
EMISSIONS = {"fp64": "fp64", "fp32": "fp32", "bf16": "i16", "fp16": "fp16"}
POINTERS = {"tags": "i64", "mask": "u8", "values": "fp64", "pointers": "u8", "paths": "i64"}
POINTERS |= dict.fromkeys(("positions", "slots", "lengths", "marks", "used"), "i32")
POINTERS |= dict.fromkeys(("alphas", "vectors", "exact_partials"), "fp64")
POINTERS |= dict.fromkeys(("messages", "scales"), "fp32")
MISSING = {  # the arguments that are None: in nll, which asks for no gradient, and in float64, which has no sweep
    ("sweep", "value"): ("weights", "messages", "scales", "slots", "lengths"),
    ("exact", "value"): ("gradient", "weights", "alphas", "slots", "partials", "used"),
    ("exact", "fp64"): ("marks",),
    ("reduce", "fp64"): ("partials",),
}


class Case(NamedTuple):
    """A kernel as it is compiled.

    `form` is grad, value (nll alone), odd (grad, K not a multiple of 16) or one (grad, K = 1, a constant to Triton).
    """

    kernel: str
    form: str
    dtype: str
    block: int
    architecture: int


def cases() -> list[Case]:
    """Float32 for every size and architecture; other types and forms where sizes and code differ most."""
    blocks = {name: (16,) if name == "reduce" else (16, 32, 64, 128) for name in KERNELS}
    found = [Case(name, "grad", "fp32", k, cc) for name in KERNELS for k in blocks[name] for cc in ARCHITECTURES]
    found += [Case(name, "one", "fp32", 16, 90) for name in KERNELS]
    for cc in (75, 90):
        for k in (16, 128):
            halves = ("sweep", "posterior", "exact", "viterbi")
            found += [Case(name, "grad", dtype, k, cc) for name in halves for dtype in ("bf16", "fp16")]
            found += [Case(name, "odd", "fp32", k, cc) for name in halves]
            found += [Case(name, "value", "fp32", k, cc) for name in ("sweep", "exact")]
        found += [Case(name, "grad", "fp64", k, cc) for name in ("exact", "reduce", "viterbi") for k in blocks[name]]
    return found


def source(case: Case) -> tuple[ASTSource, int]:
    """The kernel with the types, constants and alignments of a launch; and its warps."""
    function = KERNELS[case.kernel]
    result = "fp64" if case.dtype == "fp64" else "fp32"
    types = {**dict.fromkeys(("transitions", "start", "end", "weights", "scores", "total"), result), **POINTERS}
    types |= {"x": EMISSIONS[case.dtype], "gradient": EMISSIONS[case.dtype]}
    types["partials"] = "fp64" if case.kernel == "exact" else "fp32"
    if case.form == "value":
        types["values"] = result
    constants: dict[str, Any] = {"BLOCK": 256, "num_warps": 4}
    if case.kernel != "reduce":
        constants = dict(host.options(case.kernel, case.block))
    warps = constants.pop("num_warps")
    for key in (case.form, case.dtype):
        constants |= dict.fromkeys(MISSING.get((case.kernel, key), ()))
    ones = ("x_k", "g_k", *(("K", "x_t", "g_t") if case.form == "one" else ()))
    constants |= {name: 1 for name in ones if name in function.arg_names}
    aligned = () if case.form == "odd" else ("K", "x_t", "g_t")
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = f"*{types[name]}"
        else:
            signature[name] = "i64" if name == "scale" else "i32"
        if signature[name].startswith("*") or (name in aligned and name not in constants):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes), warps
