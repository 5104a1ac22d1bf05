from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


def review(rng: random.Random) -> dict[str, Any]:
    """A row of which a recipe on text can learn something: two words say the label and the target."""
    up, words = rng.random() < 0.5, rng.choices(["film", "plot", "the", "a", "and", "with"], k=rng.randint(1, 9))
    words.insert(rng.randrange(len(words)), rng.choice(["good", "fine"] if up else ["bad", "poor"]))
    parts, kind = rng.randint(0, 30), rng.choice("xyz")
    return {
        "text": " ".join(words),
        "label": "up" if up else "down",
        "source": f"{' '.join(words)} is a film.",
        "target": " ".join(["film", *words[: 1 + len(words) % 3]]),
        "parts": parts,
        "kind": kind,
        "price": math.exp(parts / 10 + "xyz".index(kind) + up),
    }


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files of JSON lines, which serve every recipe on text."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    files = {}
    for part, count in (("train", 90), ("dev", 20), ("test", 20)):
        files[part] = folder / f"{part}.jsonl"
        files[part].write_text("".join(json.dumps(review(rng)) + "\n" for _ in range(count)), "utf-8")
    return files


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small PNG files, a sub-folder for each of two classes."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, kind in enumerate(("dark", "light")):
        (folder / kind).mkdir()
        for i in range(60):
            pixels = rng.integers(100 * number, 100 * number + 150, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def small_run(
    conll: dict[str, Path], reviews: dict[str, Path], images: Path, tiny_encoder: Path
) -> Callable[[str, Path], list[str]]:
    """The settings of a run of a second or two of any recipe, in which every kind of state matters to the result."""
    rows = [f"data.{part}={path}" for part, path in reviews.items()]
    loop = ["train.epochs=3", "train.batch_size=4", "train.accumulate=2", "train.lr=0.01", "train.warmup_steps=5"]
    loop += ["train.eval_every=7", "train.save_every=3", "train.patience=4", *QUIET]
    shape = "{model_type: deberta-v2, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    shape += " intermediate_size: 24, relative_attention: true, pos_att_type: [p2c, c2p], position_buckets: 4}"
    encoder = [f"model.encoder.checkpoint={tiny_encoder}", "model.encoder.max_length=16"]
    small = "{embedding_size: 4, hidden_sizes: [4, 8], depths: [1, 1]}"
    fresh = f"{{tokenizer: {tiny_encoder}, max_length: 16, shape: {shape}}}"
    of = {
        "summarizer": ["data.name=jsonl", "data.min_count=2", "data.max_target=5", "decoding.beam_size=2"],
        "classifier": ["data.name=table", "data.text=text", "data.label=label", *encoder],
        "regressor": ["data.name=table", "data.target=price", "data.text=[text]", f"model.encoder={fresh}"],
        "image": ["data.name=folder", f"data.folder={images}", "model.shift=1", f"model.shape={small}"],
    }
    of["summarizer"] += ["model.embedding_dim=8", "model.hidden_size=8", "model.dropout=0.1"]
    of["regressor"] += ["data.numeric=[parts]", "data.categorical=[kind]", "data.bags=[text]", "model.bag_size=64"]
    for recipe in ("summarizer", "classifier", "regressor"):
        of[recipe] += rows

    def settings(recipe: str, run_dir: Path) -> list[str]:
        if recipe == "tagger":
            return tiny_settings(conll, run_dir)
        cache = [] if recipe == "summarizer" else [f"data.cache={run_dir}-cache"]
        return [f"run_dir={run_dir}", *of[recipe], *loop, *cache]

    return settings


@pytest.fixture(scope="session")
def recipes(conll: dict[str, Path], reviews: dict[str, Path], images: Path, tiny_encoder: Path) -> dict[str, list[str]]:
    """Settings of each recipe, with no dropout and on 13 examples: at 4 a batch, one is left over."""
    from fastseq.recipes.image.folder import read_folder

    pictures = len(read_folder(images, "rgb", None, None).train)
    rows = [f"data.{part}={path}" for part, path in reviews.items()]
    loop = [*QUIET, "train.batch_size=4", "train.accumulate=2", "train.warmup_steps=0", "train.lr=0.01"]
    loop += ["train.clip=null", "model.dropout=0.0"]
    text = [*loop, "train.fraction=0.144", *rows]
    deberta = (
        "model_type: deberta-v2, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24, "
        "relative_attention: true, position_buckets: 4, pos_att_type: [p2c, c2p], max_position_embeddings: 32"
    )
    return {
        "tagger": [
            *[*loop, "train.fraction=0.144", *[f"data.{part}={path}" for part, path in conll.items()]],
            *["data.name=conll", "model.features={token: {size: 8}, bigram: null}", "model.hidden_size=8"],
        ],
        "summarizer": [*text, "data.name=jsonl", "data.max_target=5", "model.embedding_dim=8", "model.hidden_size=8"],
        "classifier": [
            *[*text, "data.name=table", f"model.encoder.checkpoint={tiny_encoder}", "model.encoder.dropout=0.0"],
        ],
        "regressor": [
            *[*text, "data.name=table", "data.target=price", "data.text=[text]", "data.numeric=[parts]"],
            *["data.categorical=[kind]", "data.bags=[text]", "model.bag_size=16", "model.bag_dropout=0.0"],
            *[f"model.encoder={{tokenizer: {tiny_encoder}, shape: {{{deberta}}}}}", "model.encoder.dropout=0.0"],
        ],
        "image": [
            *[*loop, f"train.fraction={13 / pictures}", "data.name=folder", f"data.folder={images}", "model.shift=0"],
            *["model.flip=false", "model.shape={embedding_size: 4, hidden_sizes: [8], depths: [1], layer_type: basic}"],
        ],
    }
