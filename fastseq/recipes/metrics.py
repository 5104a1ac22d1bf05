"""Metrics of tag sequences and of summaries, in per cent."""

from __future__ import annotations

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
