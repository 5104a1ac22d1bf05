"""Metrics of tag sequences, summaries, labels and sizes, in per cent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tags = Sequence[Sequence[str]]


def entity_scores(gold: Tags, predicted: Tags) -> dict[str, float]:
    """Entity precision, recall and F1 of BIO tags, by seqeval: the type and both ends must be right."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        list(gold), list(predicted), average="micro", warn_for=(), zero_division=0
    )
    return {"f1": 100 * float(f1), "precision": 100 * float(precision), "recall": 100 * float(recall)}


def token_accuracy(gold: Tags, predicted: Tags) -> dict[str, float]:
    """The share of tokens whose tag is right."""
    pairs = [pair for row in zip(gold, predicted, strict=True) for pair in zip(*row, strict=True)]
    return {"accuracy": 100 * sum(a == b for a, b in pairs) / max(1, len(pairs))}


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of one BIO sequence as (type, first token, one past the last token)."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [(kind, first, last + 1) for kind, first, last in get_entities(list(tags))]


def to_bio(rows: Tags) -> list[list[str]]:
    """BIOES, BILOU and BMES tags as BIO; BIO and IOB1 tags as they are."""
    prefixes = {"S": "B", "U": "B", "E": "I", "L": "I", "M": "I"}
    return [[prefixes.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in rows]


def rouge(references: Sequence[str], outputs: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, by rouge-score: words in lower case, their endings cut off."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    return {kind: 100 * sum(score[kind].fmeasure for score in scores) / max(1, len(scores)) for kind in kinds}


def label_scores(gold: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """The share of labels that are right, and the mean over the gold labels of each one's F1."""
    hits = Counter(a for a, b in zip(gold, predicted, strict=True) if a == b)
    wanted, given = Counter(gold), Counter(predicted)
    f1 = [2 * hits[label] / (wanted[label] + given[label]) for label in wanted]
    return {"accuracy": 100 * sum(hits.values()) / max(1, len(gold)), "macro_f1": 100 * sum(f1) / max(1, len(f1))}


def smape(actual: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """The symmetric mean absolute percentage error, 0 to 200: the mean of 200 |a - p| / (|a| + |p|), and 0 for 0, 0."""
    errors = [200 * abs(a - p) / (abs(a) + abs(p)) if a or p else 0.0 for a, p in zip(actual, predicted, strict=True)]
    return {"smape": math.fsum(errors) / max(1, len(errors))}
