"""`patch` and `unpatch`: the same objects, the same results, and nothing that is left behind."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torchcrf
from torch import Tensor, nn

import fastseq
from fastseq.integrations import TABLE, Replacement, patch, unpatch

B, T, K = 3, 5, 4


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, K)
        self.heads = nn.ModuleDict({"ner": torchcrf.CRF(K, batch_first=True), "chunk": torchcrf.CRF(K, True)})
        self.again = self.heads["ner"]

    def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        emissions = self.encoder(x)
        return -sum(head(emissions, tags, mask, "mean") for head in (*self.heads.values(), self.again))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    return torch.randn(B, T, 6), torch.randint(K, (B, T)), mask


def state(module: nn.Module) -> dict[str, object]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}


def test_swaps_every_crf_once_and_reports() -> None:
    model = Tagger()
    report = patch(model)
    assert [line.module for line in report.changed] == ["heads.ner", "heads.chunk"]
    assert report.left == []
    assert str(report).splitlines() == [
        "module       class         result",
        "heads.ner    torchcrf.CRF  fastseq.nn.crf.CRF",
        "heads.chunk  torchcrf.CRF  fastseq.nn.crf.CRF",
    ]
    assert type(model.again) is fastseq.nn.CRF
    assert model.again is model.heads["ner"]
    assert "already patched" in str(patch(model))


def test_training_goes_on_through_patch_and_unpatch() -> None:
    plain, swapped = Tagger(), Tagger()
    swapped.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (plain, swapped)]
    for step in range(6):
        if step in (2, 5):
            patch(swapped)
        elif step == 4:
            unpatch(swapped)
        for model, optimizer in zip((plain, swapped), optimizers, strict=True):
            optimizer.zero_grad()
            model(*batch()).backward()
            optimizer.step()
        torch.testing.assert_close(swapped.state_dict(), plain.state_dict(), atol=1e-4, rtol=1e-4)


def test_root_hooks_and_flags_survive_and_unpatch_restores_all() -> None:
    crf = torchcrf.CRF(K, batch_first=True).eval().requires_grad_(False)
    calls: list[str] = []
    crf.register_forward_hook(lambda *_: calls.append("hook"))
    before, parameters = state(crf), list(crf.parameters())
    report = fastseq.patch(crf)
    assert report.changed[0].module == "(root)"
    crf(torch.randn(B, T, K), torch.randint(K, (B, T)))
    assert calls == ["hook"]
    assert not crf.training
    assert all(a is b for a, b in zip(crf.parameters(), parameters, strict=True))
    assert crf.viterbi(torch.randn(B, T, K))[0].shape == (B, T)  # the new class's own methods
    assert fastseq.unpatch(crf).changed[0].result == "torchcrf.CRF"
    assert type(crf) is torchcrf.CRF
    assert state(crf) == before
    assert unpatch(crf).changed == []


def test_copies_of_a_patched_model_work_and_can_be_unpatched() -> None:
    model = Tagger()
    patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(*batch()), model(*batch()))
        assert len(unpatch(other).changed) == 2
        assert type(other.again) is torchcrf.CRF


def test_what_is_left_and_why() -> None:
    class Mine(torchcrf.CRF):
        pass

    hooked = torchcrf.CRF(K)
    hooked.forward = hooked.forward
    report = patch(nn.ModuleDict({"mine": Mine(K), "hooked": hooked, "ours": fastseq.nn.CRF(K)}))
    assert report.changed == []
    assert [line.result for line in report.left] == [
        "a subclass of torchcrf.CRF may rely on what it would lose",
        "its forward was replaced on the object itself",
    ]
    assert "left: a subclass of torchcrf.CRF" in str(report)
    assert str(patch(nn.Linear(2, 2))) == "fastseq: nothing that it knows in this model"


def test_options_belong_to_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        factor: float

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * super().forward(x)

    def prepare(module: Doubled, options: dict[str, float]) -> None:
        module.factor = options.get("factor", 2.0)

    name = f"{nn.Linear.__module__}.{nn.Linear.__qualname__}"
    entry = Replacement(
        Doubled, prepare, lambda m, _: "too narrow" if m.in_features < 2 else None, frozenset({"factor"})
    )
    monkeypatch.setitem(TABLE, name, entry)
    model, x = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), torch.randn(3, 2)
    want = 3 * model[0](x)
    assert [line.result for line in patch(model, factor=3.0).left] == ["too narrow"]
    torch.testing.assert_close(model[0](x), want)
    unpatch(model)
    assert not hasattr(model[0], "factor")
    with pytest.raises(TypeError, match="options: got speed, which no replacement knows"):
        patch(model, speed=1)


@pytest.mark.parametrize("function", [patch, unpatch])
def test_only_modules(function: object) -> None:
    with pytest.raises(TypeError, match="model: got dict, wanted a torch"):
        function({})  # type: ignore[operator]


def test_does_not_import_pytorch_crf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchcrf")
    patch(nn.Linear(1, 1))
    assert "torchcrf" not in sys.modules
