"""`lrd study`: arms and seeds of a recipe, what they will cost, and what came of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lrd import console
from lrd.errors import EXIT_OK, EXIT_STOPPED, UserError
from lrd.study import cost, grid, pictures, report, results, runner


def study(
    path: Path,
    overrides: list[str],
    jobs: int = 1,
    only: str = "",
    runs_dir: Path = Path("runs"),
    out: Path | None = None,
    is_plan: bool = False,
    is_report: bool = False,
) -> int:
    """Run what is left of a study, and report what is known so far.

    Args:
        path: the study file.
        overrides: `section.key=value`, for all arms.
        jobs: how many runs run at a time.
        only: `i/n`, to run every n-th run, beginning with the i-th; empty: all.
        runs_dir: the study's folder is in it.
        out: the folder of the report; None: the study's folder.
        is_plan: measure what it will cost, and run nothing.
        is_report: report only.

    Returns:
        The exit status.

    Raises:
        UserError: see `lrd.study.grid.load_study` and `lrd.study.runner.run_grid`.
    """
    if is_plan and is_report:
        raise UserError("study: give --plan or --report, not both")
    loaded = grid.load_study(path, runs_dir.expanduser(), overrides, is_report=is_report)
    chosen = _choose_runs(loaded.runs, only)
    states = grid.read_states(loaded, is_report=is_report)

    if not is_report:
        grid.check_arms(loaded, path)
    if is_plan:
        cost.print_costs(cost.measure_costs(loaded, chosen, states, jobs), jobs)
        return EXIT_OK

    status = EXIT_OK
    if not is_report:
        status = runner.run_grid(loaded, chosen, states, jobs)
        # Others may have done theirs meanwhile.
        states = grid.read_states(loaded, is_report=True)

    is_any_done = any(state.is_done for state in states.values())
    if is_report and not is_any_done:
        raise UserError(f"{loaded.folder}: no run of this study is done yet")
    if is_any_done and status != EXIT_STOPPED:
        _report(loaded, states, path, overrides, out)
    return status


def _choose_runs(runs: list[grid.GridRun], only: str) -> list[grid.GridRun]:
    """Every n-th run, beginning with the i-th, for `i/n`.

    Raises:
        UserError: it has another form, or i is not from 1 to n.
    """
    if not only:
        return runs
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", only)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"study: --only: is {only!r}, should be i/n with i from 1 to n, e.g. 2/8")
    return runs[int(match[1]) - 1 :: int(match[2])]


def _report(
    loaded: grid.Study,
    states: dict[grid.GridRun, grid.RunState],
    path: Path,
    overrides: list[str],
    out: Path | None,
) -> None:
    """Print the report and write its files.

    Raises:
        UserError: a file cannot be written.
    """
    arms = results.read_results(loaded, states)
    origin = report.find_origin()
    command = shlex.join(["lrd", "study", str(path), *overrides])

    folder = loaded.folder if out is None else out.expanduser()
    report.write_json(folder / "study.json", report.as_json(loaded, arms, origin))
    report.write_text(folder / "study.md", report.make_markdown(loaded, arms, origin, command))
    pictures.draw_curves(loaded, arms, folder / "study.png")

    report.print_report(loaded, arms)
    console.info(f"{folder}: study.md, study.json and study.png")
