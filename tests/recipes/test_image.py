"""The image recipe, from the outside: train, predict, compare, resume, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel
from typer.testing import CliRunner

from fastseq import cli
from fastseq.models import ImageClassifier
from fastseq.recipes import checkpoint, feature_cache, get
from fastseq.recipes.config import ConfigError, load
from fastseq.recipes.image import folder as folder_of_files
from fastseq.recipes.image.data import collate
from fastseq.recipes.image.plain import PlainImages
from fastseq.recipes.image.recipe import Config
from fastseq.recipes.train import run

PACKAGE, SIDE = "fastseq.recipes.image", 12
CLASSES = ("across", "down", "square")


def call(*arguments: str, text: str | None = None, wanted: int = 0) -> str:
    result = CliRunner().invoke(cli.app(), list(arguments), input=text)
    assert result.exit_code == wanted, result.output
    return result.output


def picture(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(H,W,3): a bar or a square of a random colour, somewhere."""
    pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    i, j = rng.integers(2, SIDE - 6, 2)
    height, width = {"across": (2, 6), "down": (6, 2), "square": (4, 4)}[kind]
    pixels[i : i + height, j : j + width] = rng.integers(150, 255, 3, dtype=np.uint8)
    return pixels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PNG files, a sub-folder for each class."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for kind in CLASSES:
        (folder / kind).mkdir()
        for i in range(100):
            Image.fromarray(picture(kind, rng)).save(folder / kind / f"{i}.png")
    (folder / "across" / "notes.txt").write_text("no image")
    (folder / "across" / ".hidden.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def settings(pictures: Path, quiet: list[str]) -> list[str]:
    """The settings of a run of two seconds."""
    return [
        "data.name=folder",
        f"data.folder={pictures}",
        "model.shape={embedding_size: 8, hidden_sizes: [16, 32], depths: [1, 1]}",
        "model.shift=1",
        "train.epochs=8",
        "train.batch_size=16",
        "train.lr=0.01",
        "train.warmup_steps=10",
        *quiet,
    ]


def config_of(*settings: str) -> Any:
    return load(get("image").Config, PACKAGE, None, settings)


@pytest.fixture(scope="module")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    output = call("train", "image", *settings, f"run_dir={folder / 'run'}", f"data.cache={folder / 'cache'}")
    assert "test: accuracy " in output
    return folder / "run"


def test_it_learns(trained: Path) -> None:
    found = json.loads((trained / "test.json").read_text())
    assert found["accuracy"] > 85
    assert found["macro_f1"] > 85


def test_predict(trained: Path, pictures: Path, tmp_path: Path) -> None:
    files = [pictures / kind / f"{i}.png" for kind in CLASSES for i in range(10)]
    Image.open(files[0]).convert("L").resize((40, 30)).save(tmp_path / "other.bmp")  # of another size and mode
    text = "".join(f"{file}\n" for file in [*files, "", tmp_path / "other.bmp"])
    labels = call("predict", "image", str(trained), text=text).splitlines()
    assert len(labels) == 31
    assert np.mean([label == file.parent.name for label, file in zip(labels[:30], files, strict=True)]) > 0.85
    found = [json.loads(line) for line in call("predict", "image", str(trained), "--json", text=text).splitlines()]
    assert [item["label"] for item in found] == labels
    for item in found:
        assert set(item["probabilities"]) == set(CLASSES)
        assert sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert "none.png: not an image that can be read" in call(
        "predict", "image", str(trained), text="none.png", wanted=1
    )
    assert "best.pt of the recipe image" in call("predict", "image", str(trained / "last.pt"), wanted=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_ends_with_the_same_weights(settings: list[str], tmp_path: Path, workers: int) -> None:
    def config(name: str) -> Any:
        short = ["train.max_steps=9", "train.eval_every=4", "train.accumulate=2", f"train.workers={workers}"]
        return config_of(*settings, f"run_dir={tmp_path / name}", *short)

    class Killed(BaseException):
        pass

    def write(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
        save(path, state, keep_previous)
        if path.name == "last.pt" and state["position"]["step"] == 4:
            raise Killed

    run(config("alone"), get("image").build)
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", write)
        with pytest.raises(Killed):
            run(config("killed"), get("image").build)
    run(config("killed"), get("image").build)
    one, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("alone", "killed"))
    assert one["position"] == other["position"]
    for name, value in one["model"].items():
        torch.testing.assert_close(value, other["model"][name], rtol=0, atol=0)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that have been decoded."""
    kept, load_image = list[Path](), folder_of_files.load_image

    def counted(file: Path, *arguments: Any) -> np.ndarray:
        kept.append(file)
        return load_image(file, *arguments)

    monkeypatch.setattr(folder_of_files, "load_image", counted)
    return kept


def test_decoded_images_are_cached(
    pictures: Path, settings: list[str], tmp_path: Path, decodings: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(pictures, tmp_path / "pictures")
    config = config_of(*settings, f"data.folder={copied}", f"data.cache={tmp_path / 'cache'}")
    tasks = [get("image").build(config)]
    assert len(decodings) == 300
    assert copied / "across" / ".hidden.png" not in decodings
    tasks.append(get("image").build(config))
    assert len(decodings) == 300
    for part in ("train", "dev", "test"):
        one, other = (getattr(task, part) for task in tasks)
        for name, value in collate([*one]).items():
            assert torch.equal(value, collate([*other])[name])
    Image.new("RGB", (SIDE, SIDE)).save(copied / "down" / "new.png")
    assert len(get("image").build(config).train) + len(tasks[0].dev) + len(tasks[0].test) >= 300
    assert len(decodings) == 601
    assert "feature cache: images-" in capsys.readouterr().out


def test_images_that_may_not_fit_into_memory(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = get("image").build(config_of(*settings))
    for module in (feature_cache, folder_of_files):
        monkeypatch.setattr(module, "MAPPED", 0)
    for _ in range(2):  # decoded, and read from the cache
        task = get("image").build(config_of(*settings, f"data.cache={tmp_path}"))
        assert isinstance(task.train.pixels, np.memmap)  # type: ignore[attr-defined]
        assert torch.equal(collate([*task.train])["pixels"], collate([*wanted.train])["pixels"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz"]


def test_equal_files_are_never_parted(pictures: Path, settings: list[str]) -> None:
    task = get("image").build(config_of(*settings))
    sizes = [len(part) for part in (task.train, task.dev, task.test)]
    assert sum(sizes) == 300
    assert 5 <= sizes[1] < sizes[2] <= 50
    again = get("image").build(config_of(*settings))
    assert torch.equal(collate([*task.test])["pixels"], collate([*again.test])["pixels"])


def test_folders_for_the_parts(pictures: Path, settings: list[str], tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "all" / "train", ignore=shutil.ignore_patterns("square"))
    shutil.copytree(pictures, tmp_path / "all" / "test", ignore=shutil.ignore_patterns("[0-8].png", "[1-9]?.png"))
    task = get("image").build(config_of(*settings, f"data.folder={tmp_path / 'all'}", "data.mode=grey"))
    assert task.artefacts["labels"] == ["across", "down"]
    assert len(task.train) + len(task.dev) == 200
    assert [example.label for example in task.test] == [0, 1, -100]  # the last is no class of training's
    assert task.test[0].pixels.shape == (SIDE, SIDE, 1)
    task.model.eval()
    assert task.evaluate(task.model, [collate([task.test[2]])])["accuracy"] == 0


def test_a_checkpoint_is_loaded_with_its_statistics(settings: list[str], pictures: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "bottleneck"}
    saved = ResNetModel(ResNetConfig(**sizes))
    saved.save_pretrained(tmp_path / "resnet")
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(statistics))
    pretrained = [*settings, f"model.checkpoint={tmp_path / 'resnet'}", "data.size=32", "train.max_steps=2"]
    task = get("image").build(config_of(*pretrained))
    model = task.model
    assert isinstance(model, ImageClassifier)
    for name, value in saved.state_dict().items():  # the first layer too
        torch.testing.assert_close(model.encoder.state_dict()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(model.mean.flatten(), 255 * torch.tensor(statistics["image_mean"]))
    torch.testing.assert_close(model.std.flatten(), 255 * torch.tensor(statistics["image_std"]))
    assert task.train[0].pixels.shape == (32, 32, 3)
    run_dir = f"run_dir={tmp_path / 'run'}"
    call("train", "image", *pretrained, run_dir, "data.mode=grey", "train.encoder_lr=0.0001")
    shutil.rmtree(tmp_path / "resnet")  # prediction needs it no more
    assert call("predict", "image", str(tmp_path / "run"), text=f"{pictures}/down/1.png").strip() in CLASSES


def test_plain_is_the_same_network(settings: list[str]) -> None:
    config = config_of(*settings, "model.shift=0", "model.flip=false")
    task = get("image").build(config)
    model = task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    usual = PlainImages(task.train, config, model)  # type: ignore[arg-type]
    plain = get("image").plain(config, task)
    ours = collate([task.train[i] for i in range(20)])
    theirs = torch.utils.data.default_collate([usual[i] for i in range(20)])
    torch.testing.assert_close(model(**ours), plain(**theirs))
    plain.eval()
    model.eval()
    torch.testing.assert_close(model(ours["pixels"]), plain(ours["pixels"]))
    assert torch.equal(model.predict(ours["pixels"]), plain.predict(ours["pixels"]))


def test_compare(settings: list[str], tmp_path: Path) -> None:
    output = call("compare", "image", *settings, "--sentences", "32", "--json", str(tmp_path / "c.json"))
    figures = json.loads((tmp_path / "c.json").read_text())
    names = [lever["name"] for lever in figures["levers"]]
    assert names[2:4] == ["+ batched augmentation", "+ channels-last"]
    assert names[4:] == ["+ fused optimizer", "+ freed memory kept"]
    assert all(lever["examples_per_s"] > 0 and lever["peak_bytes"] > 0 for lever in figures["levers"])
    assert [row["name"] for row in figures["quality"]] == ["plain", "fastseq"]
    assert "half the channels" in [row["name"] for row in figures["alone"]]
    assert "cached features" in [row["name"] for row in figures["around"]]
    assert {"bf16", "cuDNN benchmark"} <= {row["name"] for row in figures["not_tried"]} or torch.cuda.is_available()
    assert "disagree by" in output


def test_smoke_settings_train(settings: list[str], tmp_path: Path) -> None:
    output = call("train", "image", "--config", "smoke", *settings[:2], *settings[-4:], f"run_dir={tmp_path / 'run'}")
    assert "test: accuracy" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.folder=null", r"data: .*folder: one is wanted where name is folder or idx, got none for folder"),
        ("model.shape={model_type: bert}", r"model: .*shape: the model_type resnet is wanted, got bert"),
        (
            "model.shape={depths: [1]}",
            r"model.shape: as many depths as hidden_sizes are wanted, got \[1\] and \[16, 32\]",
        ),
        ("model.shape={layer_type: dense}", r"model.shape: layer_type=dense"),
        ("model.shape={num_channels: 2}", r"model.shape: it is for images of 2 channels \(data.mode\), got 3"),
        ("model.checkpoint=./none", r"model.checkpoint: a folder with a checkpoint"),
        ("data.mode=cmyk", r"data.mode: .*'grey' or 'rgb', got 'cmyk'"),
        ("model.crop=3", r"model.crop: no such key; the keys here are checkpoint, shape, small_stem"),
    ],
)
def test_configuration_errors_name_the_key(settings: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get("image").build(config_of(*settings, override))


def test_settings_that_exclude_each_other(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="small_stem: it would take the place of a layer that the checkpoint"):
        config_of("model.checkpoint=x", "model.small_stem=true")
    with pytest.raises(ConfigError, match="size: images of a folder can be brought to it, those of idx are used as"):
        config_of("data.name=idx", f"data.folder={pictures}", "data.size=3")
    assert Config.model_validate(config_of().model_dump(mode="json")) == config_of()


def test_data_errors_are_one_line(pictures: Path, settings: list[str], tmp_path: Path) -> None:
    copied = shutil.copytree(pictures, tmp_path / "pictures")

    def error(*more: str) -> str:
        return call("train", "image", *settings, f"data.folder={copied}", f"run_dir={tmp_path}/run", *more, wanted=1)

    bad = copied / "down" / "7.png"
    good = bad.read_bytes()
    for damaged in (good[: len(good) // 2], b"", b"no image", good[:60] + bytes(40) + good[100:]):
        bad.write_bytes(damaged)
        assert f"{bad}: not an image that can be read" in error()
    Image.new("RGB", (SIDE, SIDE + 1)).save(bad)
    assert f"{bad}: it has (13, 12) and {copied}/across/0.png has (12, 12) (height, width); data.size" in error()
    shutil.rmtree(copied / "down")
    (copied / "down").mkdir()
    assert f"{copied}/down: a class's images are wanted, got none" in error()
    for kind in ("down", "square"):
        shutil.rmtree(copied / kind)
    assert f"{copied}: two classes or more are wanted, got across" in error()
    assert "data.folder: no folder at" in error(f"data.folder={tmp_path}/none", f"run_dir={tmp_path}/other")
