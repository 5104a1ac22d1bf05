"""functional.crf_*, nn.CRF, the strict class of pytorch-crf, and tag_constraints."""

from __future__ import annotations

from typing import Any

import torch
from harness import Call, Draw, draws
from torch import Tensor

from fastseq import functional, nn
from fastseq.integrations import torchcrf

OWN = ("transitions",)
"""What a module's messages name where emissions do not fit its parameters."""

STRICT = (
    *OWN,
    "the first two dimensions of emissions",
    "expected last dimension",
    "invalid reduction",
    "mask of the first",
)
"""What pytorch-crf's own messages begin with."""

REDUCTIONS = ("none", "sum", "mean", "token_mean")


def model(draw: Draw) -> tuple[dict[str, Any], torch.dtype]:
    """Emissions, parameters and mask, by name, and the dtype of results."""
    b, t, k = draw.sizes(0, 0, 1)
    dtype = draw.dtype()
    arguments = {
        "emissions": draw.floats((b, t, k), dtype),
        "transitions": draw.floats((k, k), draw.other(dtype)),
        "start": draw.floats((k,), draw.other(dtype)),
        "end": draw.floats((k,), draw.other(dtype)),
        "mask": draw.mask((b, t)),
    }
    return arguments, result_of(arguments)


def result_of(arguments: dict[str, Any]) -> torch.dtype:
    dtypes = [x.dtype for x in arguments.values() if isinstance(x, Tensor)]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def tags_of(draw: Draw, emissions: Tensor, *, partial: bool = True) -> Tensor:
    b, t, k = emissions.shape
    if partial and draw.chance(0.2):
        return draw.layout(torch.rand(b, t, k, generator=draw.generator) < draw.choice(0.5, 1.0, 0.0))
    ids = draw.integers((b, t), 0, k, draw.choice(torch.int64, torch.int32, torch.int16, torch.int8))
    return draw.off(ids, -100)


def loss_arguments(draw: Draw, emissions: Tensor, arguments: dict[str, Any]) -> None:
    tags = arguments["tags"] = tags_of(draw, emissions)
    arguments["reduction"] = draw.choice(*REDUCTIONS)
    if tags.dtype == torch.bool:
        draw.finite = False  # a set of no path has likelihood 0
        return
    for name, shape in (("token_weights", emissions.shape[:2]), ("tag_weights", emissions.shape[2:])):
        if draw.chance(0.2):
            arguments[name] = draw.floats(tuple(shape), draw.other(emissions.dtype))


@draws("functional.crf_log_likelihood")
def likelihood(draw: Draw) -> Call:
    arguments, result = model(draw)
    loss_arguments(draw, arguments["emissions"], arguments)
    shape = arguments["emissions"].shape[:1] if arguments["reduction"] == "none" else ()
    return Call(functional.crf_log_likelihood, arguments, [(shape, result)])


@draws("functional.crf_token_log_likelihood")
def token_likelihood(draw: Draw) -> Call:
    arguments, result = model(draw)
    arguments["tags"] = tags_of(draw, arguments["emissions"], partial=False)
    return Call(functional.crf_token_log_likelihood, arguments, [(arguments["tags"].shape, result)])


@draws("functional.crf_log_partition", "functional.crf_entropy", "functional.crf_marginals", "functional.crf_viterbi")
def sums(draw: Draw, name: str) -> Call:
    arguments, result = model(draw)
    return Call(getattr(functional, name), arguments, results_of(name, arguments["emissions"], result), exact=False)


def results_of(name: str, emissions: Tensor, result: torch.dtype) -> Any:
    b, t, k = emissions.shape
    return {
        "log_partition": [((b,), result)],
        "entropy": [((b,), result)],
        "marginals": [((b, t, k), result)],
        "viterbi": [((b, t), torch.int64), ((b,), result)],
    }[name.removeprefix("crf_")]


@draws("functional.crf_nbest")
def nbest(draw: Draw) -> Call:
    arguments, result = model(draw)
    n = arguments["n"] = draw.size(1)
    b, t, _ = arguments["emissions"].shape
    return Call(functional.crf_nbest, arguments, [((b, n, t), torch.int64), ((b, n), result)], exact=False)


@draws("functional.crf_sample")
def sample(draw: Draw) -> Call:
    arguments, _ = model(draw)
    count = arguments["num_samples"] = draw.size(1)
    arguments["generator"] = None
    shape = count, *arguments["emissions"].shape[:2]
    return Call(functional.crf_sample, arguments, [(shape, torch.int64)], exact=False)


def constraints(draw: Draw, k: int) -> dict[str, Any]:
    """Of transitions, of the first and of the last tag; each may be None."""
    allowed = {"transitions": (k, k), "start": (k,), "end": (k,)}
    share = draw.choice(0.9, 0.5, 0.0)
    found = {
        n: torch.rand(s, generator=draw.generator) < share if draw.chance(0.2) else None for n, s in allowed.items()
    }
    if any(x is not None for x in found.values()):
        draw.finite = draw.ordinary = False
    return found


def module(draw: Draw, kind: type[nn.CRF] = nn.CRF) -> tuple[nn.CRF, dict[str, Any], torch.dtype]:
    """A CRF, and its emissions and mask in its layout."""
    b, t, k = draw.sizes(0, 0, 1)
    dtype = draw.dtype()
    torch.manual_seed(draw.random.randrange(100))
    crf = kind(k, batch_first=draw.chance(0.5), **{f"allowed_{n}": x for n, x in constraints(draw, k).items()})
    crf.to(draw.other(dtype))
    mask = draw.mask((b, t))
    if kind is torchcrf.CRF and mask is not None and t:
        mask = mask.contiguous()
        mask[:, 0] = 1
    if kind is torchcrf.CRF and not t:
        mask = None
    arguments = {"emissions": draw.floats((b, t, k), dtype), "mask": mask}
    double = torch.float64 in (dtype, crf.start_transitions.dtype)
    return crf, arguments, torch.float64 if double else torch.float32


def in_layout(crf: nn.CRF, arguments: dict[str, Any]) -> dict[str, Any]:
    """As the module wants them: with the first two dimensions exchanged, unless it is batch first."""
    return {
        name: x.transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 1 and not crf.batch_first else x
        for name, x in arguments.items()
    }


@draws("nn.CRF.forward")
def forward(draw: Draw, kind: type[nn.CRF] = nn.CRF) -> Call:
    crf, arguments, result = module(draw, kind)
    emissions = arguments["emissions"]
    loss_arguments(draw, emissions, arguments)
    shape = emissions.shape[:1] if arguments["reduction"] == "none" else ()
    return Call(crf.forward, in_layout(crf, arguments), [(shape, result)], words=OWN)


@draws("nn.CRF.log_partition", "nn.CRF.entropy", "nn.CRF.marginals", "nn.CRF.viterbi")
def module_sums(draw: Draw, name: str) -> Call:
    crf, arguments, result = module(draw)
    results = results_of(name, arguments["emissions"], result)
    return Call(getattr(crf, name), in_layout(crf, arguments), results, exact=False, words=OWN)


@draws("nn.CRF.decode")
def decode(draw: Draw, kind: type[nn.CRF] = nn.CRF) -> Call:
    crf, arguments, _ = module(draw, kind)
    return Call(crf.decode, in_layout(crf, arguments), exact=False, words=STRICT if kind is torchcrf.CRF else OWN)


@draws("nn.CRF.nbest")
def module_nbest(draw: Draw) -> Call:
    crf, arguments, result = module(draw)
    b, t, _ = arguments["emissions"].shape
    n = arguments["n"] = draw.size(1)
    results = [((b, n, t), torch.int64), ((b, n), result)]
    return Call(crf.nbest, in_layout(crf, arguments), results, exact=False, words=OWN)


@draws("nn.CRF.sample")
def module_sample(draw: Draw) -> Call:
    crf, arguments, _ = module(draw)
    count = arguments["num_samples"] = draw.size(1)
    arguments["generator"] = None
    shape = count, *arguments["emissions"].shape[:2]
    return Call(crf.sample, in_layout(crf, arguments), [(shape, torch.int64)], exact=False, words=OWN)


@draws("integrations.torchcrf.CRF.forward")
def strict_forward(draw: Draw) -> Call:
    call = forward(draw, torchcrf.CRF)
    call.words = STRICT
    return call


@draws("integrations.torchcrf.CRF.decode")
def strict_decode(draw: Draw) -> Call:
    return decode(draw, torchcrf.CRF)


@draws("nn.CRF.allow")
def allow(draw: Draw) -> Call:
    k = draw.size(1)
    words = "allowed_transitions", "allowed_start", "allowed_end"
    return Call(nn.CRF(k).allow, constraints(draw, k), words=words)


@draws("nn.CRF")
def make(draw: Draw) -> Call:
    k = draw.size(1)
    allowed = {f"allowed_{name}": x for name, x in constraints(draw, k).items()}
    arguments = {"num_tags": k, "batch_first": draw.chance(0.5), **allowed}
    return Call(nn.CRF, arguments, words=("invalid number of tags",))


@draws("nn.tag_constraints")
def tag_constraints(draw: Draw) -> Call:
    scheme = draw.choice("BIO", "IOB1", "BIOES", "BILOU", "BMES")
    prefixes = {"IOB1": "BI", "BIO": "BI"}.get(scheme, scheme.replace("O", ""))
    kinds = ("-PER", "-A-B", "", "-人")
    labels = ["O", *(draw.choice(*prefixes) + draw.choice(*kinds) for _ in range(draw.size()))]
    k = len(labels)
    shapes = [((k, k), torch.bool), ((k,), torch.bool), ((k,), torch.bool)]
    return Call(nn.tag_constraints, {"labels": labels, "scheme": scheme}, shapes)
