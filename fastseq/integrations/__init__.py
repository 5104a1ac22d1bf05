"""`patch` swaps, in place, the layers that fastseq knows inside any module tree; `unpatch` puts them back.

A swap changes a module's class and nothing else: the module, its parameters and its hooks stay the objects
that they were, so optimizers, shared modules and references held elsewhere go on working, and the root itself
can be swapped. To teach it a layer, add a line to `TABLE`; classes are looked for by name, so that nothing is
imported.

The new class is one of fastseq's, or a *mixture*: one of fastseq's before the module's own, under the name that it
had. So a mixture passes for the class that it was (isinstance, and the names that transformers saves and looks up).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastseq.integrations import dropout, self_attention, transformers
from fastseq.nn import CRF

__all__ = ["TABLE", "Line", "Replacement", "Report", "patch", "unpatch"]

Options = Mapping[str, Any]

RECORD = "_fastseq_patch"
"""The attribute of a swapped module that holds its `_Record`."""


@dataclasses.dataclass(frozen=True)
class Replacement:
    """How to swap the modules of one class.

    Attributes:
        cls: The class that they get; it must live on the parameters and submodules that they have. None: their own,
            for a class that is in the table only for its `why_not`.
        prepare: Adds what `cls` expects beside those, after the class has changed.
        why_not: The reason to leave a module as it is, or None.
        options: The names of `patch`'s options that it reads.
        mixed: Mix `cls` with the class that they have.
        whole: Where a module is left, all in it is left too.
    """

    cls: type[nn.Module] | None
    prepare: Callable[[Any, Options], None] = lambda module, options: None
    why_not: Callable[[nn.Module, Options], str | None] = lambda module, options: None
    options: frozenset[str] = frozenset()
    mixed: bool = False
    whole: bool = False


def _encoder(cls: type[nn.Module]) -> Replacement:
    options = frozenset({"packed"})
    return Replacement(cls, transformers.prepare, transformers.why_not_encoder, options, mixed=True, whole=True)


_HEAD = Replacement(None, why_not=transformers.why_not_head, options=frozenset({"packed"}), whole=True)
_BERT = "transformers.models.bert.modeling_bert"
_DISTILBERT = "transformers.models.distilbert.modeling_distilbert"
_DEBERTA = "transformers.models.deberta_v2.modeling_deberta_v2"

TABLE: dict[str, Replacement] = {
    "torchcrf.CRF": Replacement(CRF, prepare=lambda crf, _: crf.allow()),
    f"{_BERT}.BertModel": _encoder(transformers.Encoder),
    f"{_BERT}.BertSelfAttention": Replacement(self_attention.BertAttention, mixed=True),
    f"{_BERT}.BertSelfOutput": Replacement(dropout.Output, mixed=True),
    f"{_BERT}.BertOutput": Replacement(dropout.Output, mixed=True),
    f"{_BERT}.BertForQuestionAnswering": _HEAD,
    f"{_BERT}.BertForSequenceClassification": Replacement(transformers.Classifier, mixed=True),
    f"{_DISTILBERT}.DistilBertModel": _encoder(transformers.Encoder),
    f"{_DISTILBERT}.DistilBertSelfAttention": Replacement(self_attention.DistilBertAttention, mixed=True),
    f"{_DISTILBERT}.FFN": Replacement(dropout.FeedForward, mixed=True),
    f"{_DISTILBERT}.DistilBertForQuestionAnswering": _HEAD,
    f"{_DISTILBERT}.DistilBertForSequenceClassification": Replacement(transformers.Classifier, mixed=True),
    f"{_DEBERTA}.DebertaV2Model": _encoder(transformers.DebertaEncoder),
    f"{_DEBERTA}.DisentangledSelfAttention": Replacement(self_attention.DebertaAttention, mixed=True),
    f"{_DEBERTA}.DebertaV2SelfOutput": Replacement(dropout.Output, mixed=True),
    f"{_DEBERTA}.DebertaV2Output": Replacement(dropout.Output, mixed=True),
    f"{_DEBERTA}.DebertaV2ForQuestionAnswering": _HEAD,
    f"{_DEBERTA}.DebertaV2ForSequenceClassification": Replacement(transformers.Classifier, mixed=True),
}
"""The full name of a class: its replacement."""


class Line(NamedTuple):
    """One module of a `Report`: its name in the tree, the class that it had, and what became of it."""

    module: str
    cls: str
    result: str


@dataclasses.dataclass
class Report:
    """What was changed, and what was left and why; `str` of it is a table.

    Attributes:
        changed: The modules swapped, a shared one once, by its first name.
        left: The modules that looked like candidates, with the reason as the result.
    """

    changed: list[Line] = dataclasses.field(default_factory=list)
    left: list[Line] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [Line("module", "class", "result"), *self.changed]
        lines += [line._replace(result=f"left: {line.result}") for line in self.left]
        if len(lines) == 1:
            return "fastseq: nothing that it knows in this model"
        widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
        return "\n".join(f"{a:{widths[0]}s}  {b:{widths[1]}s}  {c}" for a, b, c in lines)


class _Record(NamedTuple):
    """What `unpatch` needs: names, so that a patched model pickles without the original package."""

    cls: str
    added: frozenset[str]


def patch(model: nn.Module, **options: Any) -> Report:
    """Swap, in place, every module of `model` that fastseq has a faster one for, `model` itself included.

    Knows:

    - `torchcrf.CRF` of pytorch-crf, which becomes `fastseq.nn.CRF` with the same results. Two things differ: what
      pytorch-crf refuses (a mask that is off at a first timestep) works, and `isinstance(module, torchcrf.CRF)`
      is no longer true.
    - BERT, DistilBERT, DeBERTa-v2 and DeBERTa-v3 of Hugging Face's transformers, bare or in a larger model: their
      encoders run on real tokens only, see `fastseq.integrations.transformers`. Hidden states are 0 at padding.

    Parameters stay the same objects. A second call changes nothing more.

    Args:
        model: Any module.
        options: Options of the replacements. `packed` (True): leave padding out of encoders. If False, padding runs
            along, and only their attention is swapped.

    Returns:
        What was changed, and what was left and why.

    Raises:
        TypeError: `model` is no module, or no replacement knows an option.
    """
    _check(model)
    unknown = options.keys() - frozenset[str]().union(*(r.options for r in TABLE.values()))
    if unknown:
        raise TypeError(f"options: got {', '.join(sorted(unknown))}, which no replacement knows")
    report, left_whole = Report(), set[nn.Module]()
    for name, module in list(model.named_modules()):
        cls = type(module)
        replacement = TABLE.get(_name(cls))
        reason = None if module in left_whole else _why_not(module, replacement, options)
        if reason is not None:
            report.left.append(Line(name or "(root)", _name(cls), reason))
            if replacement is not None and replacement.whole and RECORD not in module.__dict__:
                left_whole.update(module.modules())
        elif replacement is not None and replacement.cls is not None and module not in left_whole:
            _swap(module, replacement, options)
            report.changed.append(Line(name or "(root)", _name(cls), _name(replacement.cls)))
    return report


def _swap(module: nn.Module, replacement: Replacement, options: Options) -> None:
    cls: Any = type(module)
    ours: Any = replacement.cls
    before = _members(module)
    module.__class__ = _mixture(ours, cls) if replacement.mixed else ours
    replacement.prepare(module, options)
    setattr(module, RECORD, _Record(_name(cls), _members(module) - before))


@functools.cache
def _mixture(ours: Any, theirs: Any) -> Any:
    """`ours` before `theirs`, with the name and the module of `theirs`, by which it cannot be pickled: so how."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _unpickled, (ours, theirs), *object.__reduce_ex__(self, max(int(protocol), 2))[2:]

    names = {name: getattr(theirs, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(theirs.__name__, (ours, theirs), {**names, "__reduce_ex__": reduce})


def _unpickled(ours: Any, theirs: Any) -> Any:
    cls = _mixture(ours, theirs)
    return cls.__new__(cls)


def unpatch(model: nn.Module) -> Report:
    """Give every module that `patch` swapped its own class back, with the parameters that it has now.

    Args:
        model: A model that `patch` was called on, or a copy of one.

    Returns:
        What was changed; nothing is ever left.

    Raises:
        TypeError: `model` is no module.
        ImportError: The package of the original class is not installed.
    """
    _check(model)
    report = Report()
    for name, module in list(model.named_modules()):
        record = module.__dict__.get(RECORD)
        if record is not None:
            original = _find(record.cls)
            for member in (*record.added, RECORD):
                delattr(module, member)
            ours = type(module).__mro__[_name(type(module)) == record.cls]  # that of a mixture comes after it
            report.changed.append(Line(name or "(root)", _name(ours), record.cls))
            module.__class__ = original
    return report


def _why_not(module: nn.Module, replacement: Replacement | None, options: Options) -> str | None:
    """The reason to leave a module that is, or is derived from, a class of the table; None for all others."""
    if RECORD in module.__dict__:
        return "already patched"
    if replacement is None:
        bases = [_name(base) for base in type(module).__mro__[1:] if _name(base) in TABLE]
        return f"a subclass of {bases[0]} may rely on what it would lose" if bases else None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself"
    return replacement.why_not(module, options)


def _members(module: nn.Module) -> frozenset[str]:
    """The names of everything that is set on a module."""
    inside = ("_parameters", "_buffers", "_modules")
    return frozenset(module.__dict__).union(*(module.__dict__[group] for group in inside))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find(name: str) -> type:
    module, _, qualname = name.rpartition(".")
    return getattr(importlib.import_module(module), qualname)  # type: ignore[no-any-return]


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
