"""The command line of `lrd`: train, lr, runs, checkpoints, doctor.

Each command imports what it needs itself, so that `lrd --help` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lrd import console
from lrd.errors import UserError, describe_os_error

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learning rate dropout. For several ranks: accelerate launch ... -m lrd.train RECIPE",
)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="a recipe file, e.g. recipes/digits_resnet34_sgd_lrd.yaml"),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="settings to change in the recipe"),
    ] = None,
) -> None:
    """Train a recipe in one process. The same command resumes a run that was stopped."""
    from lrd.train import run

    raise typer.Exit(run(recipe, overrides or []))


@app.command()
def lr(
    sources: Annotated[
        list[Path],
        typer.Argument(help="recipe files, or run directories"),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="the image file to write"),
    ] = Path("lr.png"),
) -> None:
    """Plot learning rates: of recipes, without training; or of runs, as they were recorded."""
    from lrd.cli.plots import draw_trajectories

    _run_or_exit(lambda: draw_trajectories(sources, out))


@app.command()
def runs(
    root: Annotated[
        Path,
        typer.Argument(help="the folder that contains the run directories"),
    ] = Path("runs"),
) -> None:
    """Show a table of runs: recipe, steps, best accuracy, state."""
    from lrd.cli.tables import runs_table

    _run_or_exit(lambda: runs_table(root))


@app.command()
def checkpoints(
    run_dir: Annotated[
        Path,
        typer.Argument(help="a run directory"),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="hash each file; exit status 1 if a checkpoint is damaged"),
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="write the weights of the newest valid checkpoint to this .safetensors file",
        ),
    ] = None,
) -> None:
    """Show a table of a run's checkpoints."""
    from lrd.cli.tables import checkpoints_table, export_weights_and_report

    if export is not None and verify:
        console.error("checkpoints: --export verifies what it exports; leave --verify out")
        raise typer.Exit(UserError.status)
    if export is not None:
        out = export  # for mypy: within the lambda it cannot be None
        _run_or_exit(lambda: export_weights_and_report(run_dir, out))
        return

    all_valid = _run_or_exit(lambda: checkpoints_table(run_dir, verify))
    if not all_valid:
        raise typer.Exit(1)


@app.command()
def doctor(
    run_dir: Annotated[
        Path,
        typer.Argument(help="where a run would write; its disk is checked"),
    ] = Path("runs"),
) -> None:
    """Show what this host offers and what looks wrong.

    For several ranks: accelerate launch ... -m lrd.doctor
    """
    from lrd.doctor import run

    _run_or_exit(lambda: run(run_dir))


def _run_or_exit(action: Callable[[], T]) -> T:
    """Run an action; on an error that the user can fix, print it and exit with its status."""
    try:
        return action()
    except UserError as error:
        console.error(str(error))
        raise typer.Exit(error.status) from None
    except OSError as error:
        console.error(describe_os_error(error))
        raise typer.Exit(UserError.status) from None


def main() -> None:
    """The entry point of the `lrd` command."""
    app()
