"""The `lrd` command: train, lr, runs, checkpoints, doctor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lrd import console
from lrd.errors import UserError

T = TypeVar("T")
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learning rate dropout on many ranks. Several ranks: accelerate launch ... -m lrd.train RECIPE",
)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe, e.g. recipes/digits_resnet34_sgd_lrd.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
) -> None:
    """Train a recipe in this one process; the same command again goes on where it stopped."""
    from lrd.train import run

    raise typer.Exit(run(recipe, overrides or []))


@app.command()
def lr(
    sources: Annotated[list[Path], typer.Argument(help="recipes, or run directories")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the picture")] = Path("lr.png"),
) -> None:
    """Draw lr trajectories: of recipes without training, of runs as recorded."""
    from lrd.plots import draw_trajectories

    _guarded(lambda: draw_trajectories(sources, out))


@app.command()
def runs(root: Annotated[Path, typer.Argument(help="where the run directories are")] = Path("runs")) -> None:
    """Table of runs: recipe, steps, best accuracy, state."""
    from lrd.report import runs_table

    _guarded(lambda: runs_table(root))


@app.command()
def checkpoints(
    run_dir: Annotated[Path, typer.Argument(help="a run directory")],
    verify: Annotated[bool, typer.Option("--verify", help="hash each file; status 1 where one is damaged")] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="write the newest whole one's weights to this .safetensors file")
    ] = None,
) -> None:
    """Table of a run's checkpoints."""
    from lrd.report import checkpoints_table, export_weights

    if export is not None:
        out = export
        _guarded(lambda: export_weights(run_dir, out))
        return
    if not _guarded(lambda: checkpoints_table(run_dir, verify)):
        raise typer.Exit(1)


@app.command()
def doctor(
    run_dir: Annotated[Path, typer.Argument(help="where the run would write: its disk is looked at")] = Path("runs"),
) -> None:
    """What this host offers, and what looks wrong. Of many: accelerate launch ... -m lrd.doctor"""
    from lrd.doctor import run

    raise typer.Exit(_guarded(lambda: run(run_dir)))


def _guarded(action: Callable[[], T]) -> T:
    try:
        return action()
    except UserError as error:
        for line in str(error).splitlines():
            console.complain(f"lrd: {line}")
        raise typer.Exit(error.status) from None


def main() -> None:
    app()
