"""The command line of `lrd`.

Each command imports what it needs itself, so that `lrd --help` does not wait for torch.
"""

from __future__ import annotations

import sys
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
    from lrd.distributed import network
    from lrd.distributed.accelerator import check_launch_variables
    from lrd.train import run

    _run_or_exit(check_launch_variables)
    status = run(recipe, overrides or [])
    if network.has_abandoned_threads():
        network.exit_at_once(status)
    raise typer.Exit(status)


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
    from lrd.distributed import network

    status = _run_or_exit(lambda: launch_ranks(arguments or []))
    if network.has_abandoned_threads():
        network.exit_at_once(status)
    raise typer.Exit(status)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="a recipe file")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="settings to change in the recipe"),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print the times as a JSON object in place of the table"),
    ] = False,
) -> None:
    """Try a recipe out without training: data, shapes, a few steps, memory, time of an epoch.

    Nothing is written. Exit status 2 if something is wrong with the recipe or the data.
    """
    from lrd.cli.check import check as check_recipe

    _run_or_exit(lambda: check_recipe(recipe, overrides or [], as_json))


@app.command()
def study(
    file: Annotated[
        Path,
        typer.Argument(help="a study file: a base recipe, arms that change it, and seeds"),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="settings to change in all arms"),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="runs at a time; they share cores and GPUs")
    ] = 1,
    only: Annotated[
        str,
        typer.Option("--only", help="i/n: every n-th run from the i-th, for an array of jobs"),
    ] = "",
    runs_dir: Annotated[
        Path, typer.Option("--runs", help="the folder that gets the study's folder")
    ] = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option("--out", help="the folder of the report; default: the study's folder"),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="measure a few steps and show what is left to do")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="run nothing; report the runs that are done")
    ] = False,
) -> None:
    """Compare arms of a recipe over several seeds: run them, and report what came of it.

    The same command goes on where it was stopped. Exit status 0 done, 1 a run failed, 2 an error
    of the user, 75 stopped by a signal and saved.
    """
    from lrd.cli.study import study as run_study

    raise typer.Exit(
        _run_or_exit(
            lambda: run_study(file, overrides or [], jobs, only, runs_dir, out, plan, report)
        )
    )


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
    watch: Annotated[
        bool, typer.Option("--watch", help="show the table anew every two seconds")
    ] = False,
) -> None:
    """Show a table of runs: recipe, steps, test loss, best test accuracy, duration, date, state."""
    from lrd.cli.tables import runs_table, watch_runs

    if watch and as_json:
        console.error("runs: --json prints once; leave --watch out")
        raise typer.Exit(UserError.status)
    if watch:
        _run_or_exit(lambda: watch_runs(root, sort))
        return
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
        str,
        typer.Argument(help="a run directory, or a mirror: s3://bucket/prefix"),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="hash each file; exit status 1 if a checkpoint is damaged"),
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="write the weights of the newest valid checkpoint, with all that inference needs, "
            "to this .safetensors file, or to a folder as Hugging Face has it",
        ),
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="export the checkpoint of the best evaluation")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="export the moving averages of the weights")
    ] = False,
    step: Annotated[
        int | None, typer.Option("--step", help="export the checkpoint of this step")
    ] = None,
) -> None:
    """Show a table of a run's checkpoints, or export the weights of one."""
    from lrd.cli.tables import checkpoints_table, export_weights_and_report

    if export is not None and verify:
        console.error("checkpoints: --export verifies what it exports; leave --verify out")
        raise typer.Exit(UserError.status)
    if export is None and (best or ema or step is not None):
        console.error("checkpoints: --best, --ema and --step say what to --export")
        raise typer.Exit(UserError.status)
    if export is not None:
        out = export  # for mypy: within the lambda it cannot be None
        _run_or_exit(lambda: export_weights_and_report(run_dir, out, best, ema, step))
        return

    all_valid = _run_or_exit(lambda: checkpoints_table(run_dir, verify))
    if not all_valid:
        raise typer.Exit(1)


_WEIGHTS_HELP = "a run directory, a checkpoint, or what --export wrote"


@app.command(name="eval")
def evaluate(
    weights: Annotated[Path, typer.Argument(metavar="RUN_OR_FILE", help=_WEIGHTS_HELP)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value]...",
            help="data.*, trainer.* or model.arch of the recipe, e.g. data.root=images",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="images in DIR/<class>/ or DIR/test/<class>/"),
    ] = None,
    part: Annotated[
        str,
        typer.Option("--part", help="test, or validation: the images that the recipe holds out"),
    ] = "test",
    best: Annotated[
        bool, typer.Option("--best", help="of a run, the checkpoint of the best evaluation")
    ] = False,
    ema: Annotated[bool, typer.Option("--ema", help="the moving averages of the weights")] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="draw the confusion matrix into this image file"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object in place of the table")
    ] = False,
) -> None:
    """Evaluate trained weights: accuracy, loss, a row for each class, the confusion matrix.

    By default on the test images of the recipe; the accuracy is then the training run's own.
    """
    from lrd.cli.evaluate import evaluate as evaluate_weights

    _run_or_exit(
        lambda: evaluate_weights(weights, overrides or [], data, part, best, ema, out, as_json)
    )


@app.command()
def predict(
    weights: Annotated[Path, typer.Argument(metavar="RUN_OR_FILE", help=_WEIGHTS_HELP)],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... [section.key=value]...",
            help="image files, and folders of them; model.arch or trainer.device to change",
        ),
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="number of classes")] = 5,
    best: Annotated[
        bool, typer.Option("--best", help="of a run, the checkpoint of the best evaluation")
    ] = False,
    ema: Annotated[bool, typer.Option("--ema", help="the moving averages of the weights")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a list of JSON objects in place of the table")
    ] = False,
) -> None:
    """Show the most probable classes of images, with their probabilities.

    Exit status 2 if an image cannot be read; the others are shown all the same.
    """
    from lrd.cli.predict import predict as predict_images

    raise typer.Exit(
        _run_or_exit(lambda: predict_images(weights, arguments, top, best, ema, as_json))
    )


_RUN_HELP = "a run directory"
_REPLAY_OVERRIDES_HELP = "what must differ here, e.g. data.root=images"


@app.command()
def probe(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP)],
    elements: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ELEMENT...",
            help="parameters with the index of an element: 'layer4.*.conv1.weight[0,0,0,0]'; "
            "without an index the middle one",
        ),
    ] = None,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage", help="how often all elements of the parameters moved, and their waits"
        ),
    ] = False,
    until: Annotated[
        int | None, typer.Option("--until", min=1, help="the last step of --coverage")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="draw a picture into this image file")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="record the lrs for TensorBoard too")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON in place of the table")
    ] = False,
) -> None:
    """Show the lr that any element had at each step of a run. Nothing is computed again."""
    from lrd.cli.time_machine import probe as show_probes

    _run_or_exit(
        lambda: show_probes(run_dir, elements or [], coverage, until, out, tensorboard, as_json)
    )


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP)],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="another one")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help=_REPLAY_OVERRIDES_HELP),
    ] = None,
    files_only: Annotated[
        bool,
        typer.Option("--files-only", help="compare what the runs have written; compute nothing"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object in place of the tables")
    ] = False,
) -> None:
    """Find the first step, tensor and element in which two runs differ, by computing both again.

    Exit status 1 if they differ.
    """
    from lrd.cli.time_machine import diff as show_diff

    are_equal = _run_or_exit(
        lambda: show_diff(first, second, not files_only, overrides or [], as_json)
    )
    if not are_equal:
        raise typer.Exit(1)


@app.command()
def fork(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP)],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="run_dir=NEW [section.key=value]...",
            help="the directory of the new run, and settings to change from there on",
        ),
    ],
    at: Annotated[int, typer.Option("--at", help="the step after which the new run begins")],
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object in place of the lines")
    ] = False,
) -> None:
    """Make a new run that goes on from any step of another one."""
    from lrd.cli.time_machine import fork as fork_run

    _run_or_exit(lambda: fork_run(run_dir, at, overrides, as_json))


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help=_REPLAY_OVERRIDES_HELP),
    ] = None,
    first: Annotated[int | None, typer.Option("--from", help="the first step to look at")] = None,
    last: Annotated[int | None, typer.Option("--to", help="the last one")] = None,
    around: Annotated[
        int | None, typer.Option("--around", help="a step; five before and after it are shown too")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="draw the images that each rank saw, with labels")
    ] = False,
    norms: Annotated[
        bool,
        typer.Option("--norms", help="norms of each parameter's gradient, update and weights"),
    ] = False,
    nonfinite: Annotated[
        bool,
        typer.Option(
            "--stop-at-nonfinite", help="find the first value that is not finite, and its module"
        ),
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="write a trace of each rank")] = False,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="on as many ranks; default: as many as the run had"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="folder of pictures, norms and traces; default: in RUN"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object in place of the tables")
    ] = False,
) -> None:
    """Compute steps of a run again, bit for bit, with more to see than when it was trained.

    Exit status 1 if a record does not come out as it was.
    """
    from lrd.cli.time_machine import replay as replay_steps

    is_same = _run_or_exit(
        lambda: replay_steps(
            run_dir,
            first,
            last,
            around,
            samples,
            norms,
            nonfinite,
            profile,
            ranks,
            out,
            overrides or [],
            as_json,
        )
    )
    if not is_same:
        raise typer.Exit(1)


@app.command(name="verify")
def verify_run(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN_HELP)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help=_REPLAY_OVERRIDES_HELP),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=1, help="as many windows between checkpoints; default: all"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="draws these windows")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON object in place of the table")
    ] = False,
) -> None:
    """Compute a run again between its checkpoints: do weights and records follow, bit for bit?

    Exit status 1 if something does not.
    """
    from lrd.cli.time_machine import verify as verify_and_report

    is_valid = _run_or_exit(
        lambda: verify_and_report(run_dir, windows, seed, overrides or [], as_json)
    )
    if not is_valid:
        raise typer.Exit(1)


data_app = typer.Typer(no_args_is_help=True)
app.add_typer(data_app, name="data", help="Pack a folder of images, so that training reads faster.")


@data_app.command()
def pack(
    root: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="images in DIR/train/<class>/ and DIR/test/<class>/"),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="the folder that gets the pack, in .lrd-pack; default: DIR"),
    ] = None,
    size: Annotated[
        int,
        typer.Option(
            "--size",
            min=2,
            max=65_535,
            help="pixels of the shorter side; smaller images stay as they are",
        ),
    ] = 256,
    skip_corrupt: Annotated[
        bool,
        typer.Option("--skip-corrupt", help="name files that cannot be decoded, and go on"),
    ] = False,
) -> None:
    """Decode and resize all images once, into files that are read without decoding.

    data.storage=packed then trains from them. The same command goes on where it was stopped.
    """
    from lrd.data.streaming.packing import pack_folder

    _run_or_exit(lambda: pack_folder(root, out or root, size, skip_corrupt))


@data_app.command()
def verify(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="the folder that contains the pack")],
) -> None:
    """Read a whole pack and compare it with its hashes. Exit status 1 if a file is damaged."""
    from lrd.cli.tables import pack_table

    all_valid = _run_or_exit(lambda: pack_table(root))
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
    try:
        app()
    except OSError as error:  # the help of a command that nobody can read, on a full disk
        console.error(describe_os_error(error))
        console.stdout.file.flush()  # Python would report it once more at its end
        sys.exit(UserError.status)
