from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

NAMES = {"PER": ["Ada", "Alan", "Grace"], "LOC": ["Paris", "Rome", "Oslo", "New York"]}
FILLERS = ["the", "a", "sees", "in", "near", "old", "small", "was", "with", "and", "went", "to"]


def sentence(rng: random.Random) -> list[tuple[str, str]]:
    """Words with BIO tags; the names make it learnable in seconds."""
    rows = []
    for _ in range(rng.randint(1, 6)):
        rows += [(rng.choice(FILLERS), "O") for _ in range(rng.randint(0, 3))]
        kind = rng.choice(list(NAMES))
        words = rng.choice(NAMES[kind]).split()
        rows += [(word, f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(words)]
    return rows


@pytest.fixture(scope="session")
def conll(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three CoNLL files."""
    folder, rng = tmp_path_factory.mktemp("conll"), random.Random(0)
    files = {}
    for part, count in (("train", 90), ("dev", 20), ("test", 20)):
        blocks = ["\n".join(f"{word} x {tag}" for word, tag in sentence(rng)) for _ in range(count)]
        files[part] = folder / f"{part}.txt"
        files[part].write_text("-DOCSTART- x O\n\n" + "\n\n".join(blocks) + "\n", "utf-8")
    return files


def tiny_settings(conll: dict[str, Path], run_dir: Path) -> list[str]:
    """The settings of a run of a second or two, in which every kind of state matters to the result."""
    return [
        f"run_dir={run_dir}",
        "data.name=conll",
        *[f"data.{part}={path}" for part, path in conll.items()],
        "model.features={token: {size: 12, min_count: 2}, bigram: null, last: {size: 4}}",
        "model.hidden_size=8",
        "train.epochs=3",
        "train.batch_size=4",
        "train.accumulate=2",
        "train.lr=0.02",
        "train.warmup_steps=5",
        "train.eval_every=7",
        "train.save_every=3",
        "train.patience=4",
        "train.precision=fp32",
        "train.threads=1",
        "train.tensorboard=false",
        "train.progress=false",
    ]


@pytest.fixture
def tiny(conll: dict[str, Path], tmp_path: Path) -> list[str]:
    """`tiny_settings` in a folder of the test's own."""
    return tiny_settings(conll, tmp_path / "run")


@pytest.fixture(scope="session")
def tiny_settings_of() -> Callable[[dict[str, Path], Path], list[str]]:
    """The function itself, for fixtures that outlive a test: a conftest cannot be imported by name."""
    return tiny_settings


WORDS = ["good", "bad", "fine", "poor", "film", "plot", "the", "a", "and", "with", "lib", "tool", "data", "doc"]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves one: a BERT of two small layers, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


QUIET = ["train.precision=fp32", "train.threads=1", "train.tensorboard=false", "train.progress=false"]


@pytest.fixture(scope="session")
def quiet() -> list[str]:
    """Settings of runs whose results are compared, and whose output is read."""
    return QUIET


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, list[str]]:
    """Settings of each recipe, without dropout, on 13 examples of 1 to 9 words: at 4 a batch, one is left over."""
    files = small_files(tmp_path_factory.mktemp("small"))
    common = [*QUIET, "train.batch_size=4", "train.accumulate=2", "train.warmup_steps=0", "train.lr=0.01"]
    common += ["train.clip=null", "model.dropout=0.0"]
    table = ["data.name=table", *files["table"]]
    deberta = (
        "model_type: deberta-v2, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24, "
        "relative_attention: true, position_buckets: 4, pos_att_type: [p2c, c2p], max_position_embeddings: 32"
    )
    columns = ["data.target=size", "data.text=[text]", "data.numeric=[size]", "data.categorical=[label]"]
    columns += ["data.bags=[text]", "model.bag_size=16", "model.bag_dropout=0.0", "model.encoder.dropout=0.0"]
    return {
        "tagger": [*common, "data.name=conll", *files["conll"], "model.hidden_size=8"],
        "summarizer": [*common, "data.name=jsonl", *files["jsonl"], "data.max_target=5", "model.hidden_size=8"],
        "classifier": [*common, *table, f"model.encoder.checkpoint={tiny_encoder}", "model.encoder.dropout=0.0"],
        "regressor": [*common, *table, f"model.encoder={{tokenizer: {tiny_encoder}, shape: {{{deberta}}}}}", *columns],
    }


def small_files(folder: Path) -> dict[str, list[str]]:
    """Sentences in each format that recipes read, and the settings that name the files."""
    rng, files = random.Random(0), {"conll": list[str](), "jsonl": list[str](), "table": list[str]()}
    for part, count in (("train", 13), ("dev", 6), ("test", 6)):
        texts = [rng.choices(WORDS[:6], k=rng.randint(1, 9)) for _ in range(count)]
        pairs = [{"source": " ".join(text), "target": " ".join(text[:3])} for text in texts]
        rows = [{"text": " ".join(text), "label": text[0], "size": len(text) + 0.5} for text in texts]
        contents = {
            "conll": "\n\n".join("\n".join(f"{word} B-{word[0]}" for word in text) for text in texts) + "\n",
            "jsonl": "".join(json.dumps(row) + "\n" for row in pairs),
            "table": "".join(json.dumps(row) + "\n" for row in rows),
        }
        for kind, content in contents.items():
            path = folder / f"{part}-{kind}.jsonl"
            path.write_text(content, "utf-8")
            files[kind].append(f"data.{part}={path}")
    return files
