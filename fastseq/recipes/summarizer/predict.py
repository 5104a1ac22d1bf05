"""Summarizing text with a trained summarizer, as the text arrives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastseq.recipes import checkpoint
from fastseq.recipes.arrival import as_they_arrive
from fastseq.recipes.summarizer.data import Encoder, Pair, collate, detokenize, tokenize
from fastseq.recipes.summarizer.recipe import Config, make_model, search_settings


class Predictor:
    """A trained summarizer.

    Args:
        path: a run directory, or a checkpoint in it.

    Raises:
        CheckpointError: it is not a summarizer's, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        state = checkpoint.load_best(path, "summarizer")
        config = Config.model_validate(state["config"])
        self.settings: dict[str, Any] = search_settings(config, config.decoding.beam_size)
        self.encoder = Encoder(**state["artefacts"]["encoder"])
        self.model = make_model(config.model, len(self.encoder))
        self.model.load_state_dict(state["model"])
        self.model.eval()

    def summaries(self, texts: Sequence[str], sources: bool = False) -> list[dict[str, Any]]:
        """The summary of each text: what `predict` writes as JSON.

        Args:
            texts: in any number; they are decoded together.
            sources: also say which words were copied, and from where.
        """
        result = [_summary([], [], []) for _ in texts]
        rows = [i for i, text in enumerate(texts) if tokenize(text)]
        if not rows:
            return result
        examples = self.encoder.examples([Pair(texts[i], "") for i in rows])
        batch = collate(examples)
        with torch.inference_mode():
            found = self.model.summarize(
                batch["source_ids"],
                batch["source_extended"],
                batch["source_lengths"],
                return_attention=sources,
                **self.settings,
            )
        for k, (i, example) in enumerate(zip(rows, examples, strict=True)):
            tokens = self.encoder.words(found.ids[k], example.oov)
            result[i] = _summary(tokens, found.copied_from[k] if found.copied_from else [], tokenize(texts[i]))
        return result


def predict(path: Path, lines: Iterable[str], as_json: bool = False) -> Iterator[str]:
    """Summarizes one text a line, in batches of whatever has arrived.

    Args:
        path: a run directory, or a checkpoint in it.
        lines: the texts.
        as_json: give a JSON object a text instead of a line: the summary, its tokens, the source's tokens, and of
            each word that was copied, its place among the summary's tokens and among the source's.

    Yields:
        For each text, in order, its output.
    """
    predictor = Predictor(path)
    for texts in as_they_arrive(lines):
        for summary in predictor.summaries(texts, sources=as_json):
            yield json.dumps(summary, ensure_ascii=False) if as_json else summary["summary"]


def _summary(tokens: list[str], copied_from: Sequence[int], source: list[str]) -> dict[str, Any]:
    copied = [{"word": tokens[i], "token": i, "source": j} for i, j in enumerate(copied_from) if j >= 0]
    return {"summary": detokenize(tokens), "tokens": tokens, "copied": copied, "source": source}
