"""The command line of `lrd`.

Each command imports what it needs itself, so that `lrd --help` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Annotated, TypeVar

import typer

from lrd import __version__, console
from lrd.errors import UserError, describe_os_error

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Learning rate dropout. For several ranks: lrd launch RECIPE, "
    "or accelerate launch ... -m lrd.train RECIPE",
)


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        console.info(f"lrd {__version__}, torch {version('torch')}, Python {python_version()}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the versions of lrd, torch and Python.",
        ),
    ] = False,
) -> None:
    """Options that come before the command."""


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


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def launch(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTIONS OF accelerate launch]... RECIPE [section.key=value]...",
            help="e.g. --num_processes 4 recipes/digits_resnet34_sgd_lrd.yaml seed=1",
        ),
    ] = None,
) -> None:
    """Train a recipe on several ranks: a thin wrapper around accelerate launch.

    It chooses the launch file where none is named, and ends with the ranks' own status: 0 done,
    1 failed, 2 an error of the user, 75 stopped by a signal and saved.
    """
    from lrd.cli.launch import launch as launch_ranks

    raise typer.Exit(_run_or_exit(lambda: launch_ranks(arguments or [])))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="a recipe file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="settings to change in the recipe"),
    ] = None,
) -> None:
    """Try a recipe out without training: data, shapes, a few steps, memory, time of an epoch.

    Nothing is written. Exit status 2 if something is wrong with the recipe or the data.
    """
    from lrd.cli.check import check as check_recipe

    _run_or_exit(lambda: check_recipe(recipe, overrides or []))


@app.command()
def lr(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... [section.key=value]...",
            help="recipe files and run directories; settings to change in the recipes",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="the image file to write"),
    ] = Path("lr.png"),
) -> None:
    """Plot learning rates: of recipes, without training; and of runs, as they were recorded."""
    from lrd.cli.plots import draw_trajectories

    _run_or_exit(lambda: draw_trajectories(sources, out))


@app.command()
def runs(
    root: Annotated[
        Path,
        typer.Argument(help="the folder that contains the run directories"),
    ] = Path("runs"),
    sort: Annotated[
        str,
        typer.Option("--sort", help="run, steps, loss, accuracy, duration, date or state"),
    ] = "run",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print a list of JSON objects in place of the table"),
    ] = False,
) -> None:
    """Show a table of runs: recipe, steps, test loss, best test accuracy, duration, date, state."""
    from lrd.cli.tables import runs_table

    _run_or_exit(lambda: runs_table(root, sort, as_json))


@app.command()
def compare(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="two run directories or more"),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="the picture (.png) or page (.html) to write"),
    ] = Path("compare.png"),
) -> None:
    """Compare runs: a table, and curves side by side.

    Runs that differ only in the seed are shown as their mean and spread.
    """
    from lrd.cli.compare import compare as compare_runs

    _run_or_exit(lambda: compare_runs(run_dirs, out))


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
