"""explore, collect, train, evaluate, export: the scripts of training/, which lies beside the package in its source."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import smartkv_ext

from .app import Json, app
from .errors import CliError, UsageError, command, first_line

Out = Annotated[Path, typer.Option(help="Folder for everything that the step writes.")]
RecipeName = Annotated[Path, typer.Option("--recipe", help="A YAML file, or small, smollm2, qwen2.5-coder-1.5b.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Instead of the recipe's model.")]
Data = Annotated[Path, typer.Option(help="Folder of collected shards.")]
Gates = Annotated[Path, typer.Option(help="Folder of gates.")]


def step(name: str) -> Any:
    """A module of training/. Raises CliError where the source or what it needs is not there."""
    root = Path(smartkv_ext.__file__).parents[1]
    if importlib.util.find_spec("training") is None and (root / "training").is_dir():
        sys.path.insert(0, str(root))
    if importlib.util.find_spec("training") is None:
        raise CliError("training is part of the source, not of the installed package: run this in a checkout")
    try:
        return importlib.import_module(f"training.{name}")
    except ModuleNotFoundError as error:
        raise CliError(f'{error.name} is missing: pip install "smartkv-ext[train]"') from error


def read_recipe(recipe: Path, model: str | None, sources: list[str] | None = None) -> Any:
    """A Recipe. Raises UsageError."""
    changes: dict[str, Any] = {"model": model} if model else {}
    if sources:
        changes["sources"] = {source: 1.0 / len(sources) for source in sources}
    try:
        return step("recipe").Recipe.load(recipe, **changes)
    except (ValueError, TypeError) as error:
        raise UsageError(first_line(error)) from error


@contextmanager
def told() -> Iterator[None]:
    """A step's ValueError, or a file that cannot be read or written, in one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CliError(first_line(error)) from error


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The same command goes on from here.") from None


@app.command()
@command
def explore(out: Out, recipe: RecipeName = Path("small"), model: ModelName = None, pieces: int = 4) -> None:
    """Attention statistics of a model per layer and head, with a picture."""
    with told():
        rows = step("explore").explore(read_recipe(recipe, model), out, pieces)
    typer.echo(f"{len(rows)} heads: {out / 'heads.csv'}, {out / 'heads.png'}")


@app.command()
@command
def collect(
    out: Out, recipe: RecipeName = Path("small"), model: ModelName = None,
    text: Annotated[list[str] | None, typer.Option(help="File or folder instead of the recipe's; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop after about this long; a later call goes on.")] = float("inf"),
) -> None:  # fmt: skip
    """Pre-RoPE keys and attention targets of a model, as resumable shards."""
    with told(), resumable():
        left = step("collect").collect_shards(read_recipe(recipe, model, text), out, seconds)
    typer.echo(f"{left} shards are still to be made" if left else f"{out} is complete")


@app.command()
@command
def train(
    model: ModelName = None, recipe: RecipeName = Path("small"),
    small: Annotated[bool, typer.Option("--small", help="The small recipe: minutes on two cores.")] = False,
    text: Annotated[list[str] | None, typer.Option(help="File or folder instead of the recipe's; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/MODEL.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Collect, train, evaluate and export gates for a model. Goes on where it was stopped."""
    if small and recipe != Path("small"):
        raise UsageError(f"--small is a recipe of its own: name either it or --recipe {recipe}")
    chosen = read_recipe(recipe, model, text)
    folder = out or Path("runs") / Path(chosen.model).name
    with told(), resumable():
        result = step("pipeline").run(chosen, folder)
    if as_json:
        typer.echo(json.dumps(result))
        return
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
    sure = result.get(f"auc by {result['judged by']}s")
    texts = [word for source in text or () for word in ("--text", source)]
    common = ["--model", chosen.model, "--gates", result["gates"]]
    steps: tuple[tuple[str, list[str]], ...] = (("key_basis", ["--recipe", str(recipe), *texts]), ("layer_shares", []))
    between = f" ({sure[0]:.3f} to {sure[1]:.3f} over held-out {result['judged by']}s)" if sure else ""
    typer.echo(
        f"{result['parameters']:,} parameters; median over heads: AUC {result.get('auc', float('nan')):.3f}{between}, "
        f"R2 {result.get('r2', float('nan')):.3f}; {took}\nUse them: a policy file that holds "
        f'{{"name": "auto", "gates": "{result["gates"]}"}}\n'
        "These gates treat every layer the same and hold keys in the model's own basis. To measure the layer shares "
        "and a basis in which keys lose less, and add them, run next:\n"
        + "\n".join(shlex.join(["python", "-m", f"training.{name}", *options, *common]) for name, options in steps)
    )


@app.command()
@command
def evaluate(
    gates: Gates, data: Data, out: Out, split: str = "valid",
    threshold: Annotated[float | None, typer.Option(help="Attention that matters. Default: the recipe's.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Replace the calibration of gates with one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the line of JSON alone, without the table.")] = False,
) -> None:  # fmt: skip
    """AUC, sensitivity, specificity, calibration of every head, with pictures; calibrates gates that are not."""
    with told():
        result = step("evaluate").evaluate_gates(gates, data, out, split, threshold=threshold, calibrate=calibrate)
        step("evaluate").show_evaluation(f"{gates}: {split}", result, as_json)


@app.command()
@command
def export(
    gates: Gates, out: Out, push: Annotated[str | None, typer.Option(help="Hub id to upload to as well.")] = None
) -> None:
    """Write gates for use, and upload them if a hub id is given."""
    with told():
        made = step("export").export_gates(gates, out)
        typer.echo(f"{out}: {made.num_parameters:,} parameters")
        if push:
            typer.echo(made.push_to_hub(push))
