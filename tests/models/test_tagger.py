from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastseq.models import SoftmaxDecoder, Tagger
from fastseq.models.tagger import BiLSTM
from fastseq.nn import CRF

LENGTHS = torch.tensor([7, 3, 1, 5])


def tagger(decoder: nn.Module | None = None, **options: object) -> Tagger:
    torch.manual_seed(0)
    return Tagger([20, 9], 5, embedding_dims=[6, 3], hidden_size=4, num_layers=2, decoder=decoder, **options)  # type: ignore[arg-type]


def batch(padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, lengths and tags; `padding` more columns of it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 9, (4, 7, 2), generator=generator)
    tags = torch.randint(0, 5, (4, 7), generator=generator)
    off = torch.arange(7) >= LENGTHS[:, None]
    tokens, tags = tokens.masked_fill(off[:, :, None], 0), tags.masked_fill(off, -100)
    tokens = nn.functional.pad(tokens, (0, 0, 0, padding))
    return tokens, LENGTHS, nn.functional.pad(tags, (0, padding), value=-100)


def test_the_lstm_is_pytorch_s_own_on_packed_sequences() -> None:
    ours = BiLSTM(6, 4, num_layers=2)
    theirs = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)
    for layer in range(2):
        for suffix, side in (("", ours.ahead), ("_reverse", ours.back)):
            for name, value in side[layer].state_dict().items():
                theirs.state_dict()[name.replace("_l0", f"_l{layer}{suffix}")].copy_(value)
    x = torch.randn(4, 7, 6)
    packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    wanted = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)[0]
    real = (torch.arange(7) < LENGTHS[:, None])[:, :, None]
    torch.testing.assert_close(ours(x, LENGTHS) * real, wanted * real)


@pytest.mark.parametrize("kind", ["crf", "softmax"])
def test_padding_changes_nothing(kind: str) -> None:
    model = tagger(CRF(5, batch_first=True) if kind == "crf" else SoftmaxDecoder()).eval()
    results = []
    for padding in (0, 6):
        model.zero_grad()
        tokens, lengths, tags = batch(padding)
        loss = model(tokens, lengths, tags)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), model.predict(tokens, lengths)[:, :7], gradients))
    torch.testing.assert_close(results[0], results[1])


def test_a_row_is_tagged_alone_as_in_a_batch() -> None:
    model = tagger().eval()
    tokens, lengths, _ = batch()
    together = model.predict(tokens, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = model.predict(tokens[i : i + 1, :n], lengths[i : i + 1])
        assert torch.equal(alone[0], together[i, :n])
        assert (together[i, n:] == -100).all()


def test_the_softmax_decoder_is_a_crf_without_transitions() -> None:
    crf = CRF(5, batch_first=True)
    for parameter in crf.parameters():
        nn.init.zeros_(parameter)
    emissions, mask = torch.randn(4, 7, 5), torch.arange(7) < LENGTHS[:, None]
    tags = batch()[2]
    softmax = SoftmaxDecoder()
    for reduction in ("sum", "mean"):
        torch.testing.assert_close(
            softmax(emissions, tags, mask, reduction),
            crf(emissions, tags, mask, reduction),
            rtol=1e-5,
            atol=1e-5,
        )
    assert torch.equal(softmax.viterbi(emissions, mask)[0], crf.viterbi(emissions, mask)[0])
    assert torch.equal(softmax(emissions, tags.int(), mask), softmax(emissions, tags, mask))


@pytest.mark.parametrize("freeze", [False, True])
def test_pretrained_vectors(freeze: bool) -> None:
    vectors = torch.randn(20, 6)
    model = tagger(vectors=vectors, freeze_vectors=freeze)
    assert torch.equal(model.embeddings[0].weight, vectors)
    model(*batch()).backward()
    assert (model.embeddings[0].weight.grad is None) == freeze


def test_it_learns_and_returns_emissions_without_tags() -> None:
    model = tagger(dropout=0.0)
    tokens, lengths, tags = batch()
    assert model(tokens, lengths).shape == (4, 7, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, lengths, tags).backward()
        optimizer.step()
    assert torch.equal(model.predict(tokens, lengths), tags)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="embedding_dims"):
        Tagger([20, 9], 5, embedding_dims=[6])
    with pytest.raises(ValueError, match="vectors"):
        tagger(vectors=torch.randn(19, 6))
    with pytest.raises(ValueError, match="tokens"):
        tagger().predict(torch.ones(4, 7, 3, dtype=torch.int64), LENGTHS)


def test_one_column_needs_no_last_dimension() -> None:
    model = Tagger([20], 5, embedding_dims=[6], hidden_size=4).eval()
    tokens = batch()[0][:, :, 0]
    assert torch.equal(model.predict(tokens, LENGTHS), model.predict(tokens[:, :, None], LENGTHS))
