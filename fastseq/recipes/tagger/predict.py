"""Tagging text with a trained tagger, as the text arrives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastseq.recipes import checkpoint, metrics
from fastseq.recipes.arrival import as_they_arrive
from fastseq.recipes.tagger.data import Encoder, collate
from fastseq.recipes.tagger.recipe import Config, make_model


class Predictor:
    """A trained tagger.

    Args:
        path: a run directory, or a checkpoint in it.

    Raises:
        CheckpointError: it is not a tagger's, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        state = checkpoint.load_best(path, "tagger")
        self.encoder = Encoder(**state["artefacts"]["encoder"])
        self.by_character: bool = state["artefacts"]["by_character"]
        # The weights hold the vectors, whose file need not be here any more.
        config = Config.model_validate(state["config"]).model.model_copy(update={"vectors": None})
        self.model = make_model(config, self.encoder, state["artefacts"]["scheme"])
        self.model.load_state_dict(state["model"])
        self.model.eval()

    def tokens(self, text: str) -> list[str]:
        """The tokens of a line: its characters, or its words parted by blanks."""
        return [c for c in text if not c.isspace()] if self.by_character else text.split()

    def tags(self, sentences: Sequence[list[str]]) -> list[list[str]]:
        """The tags of tokens."""
        result: list[list[str]] = [[] for _ in sentences]
        rows = [i for i, tokens in enumerate(sentences) if tokens]
        if not rows:
            return result
        batch = collate([(ids := self.encoder.tokens(sentences[i]), ids[:, 0]) for i in rows])
        with torch.inference_mode():
            best = self.model.predict(batch["tokens"], batch["lengths"]).tolist()
        for i, row in zip(rows, best, strict=True):
            result[i] = [self.encoder.labels[tag] for tag in row[: len(sentences[i])]]
        return result


def predict(path: Path, lines: Iterable[str], as_json: bool = False) -> Iterator[str]:
    """Tags one sentence a line, in batches of whatever has arrived.

    Args:
        path: a run directory, or a checkpoint in it.
        lines: the sentences.
        as_json: give a JSON object a sentence instead of CoNLL columns.

    Yields:
        For each sentence, in order, its output.
    """
    predictor = Predictor(path)
    for texts in as_they_arrive(lines):
        sentences = [predictor.tokens(text) for text in texts]
        for tokens, tags in zip(sentences, predictor.tags(sentences), strict=True):
            yield (_json(tokens, tags, "" if predictor.by_character else " ") if as_json else _conll(tokens, tags))


def _conll(tokens: Sequence[str], tags: Sequence[str]) -> str:
    return "".join(f"{token} {tag}\n" for token, tag in zip(tokens, tags, strict=True))


def _json(tokens: Sequence[str], tags: Sequence[str], joint: str) -> str:
    entities = [
        {"type": kind, "start": start, "end": end, "text": joint.join(tokens[start:end])}
        for kind, start, end in metrics.spans(metrics.to_bio([tags])[0])
    ]
    return json.dumps({"tokens": tokens, "tags": tags, "entities": entities}, ensure_ascii=False)
