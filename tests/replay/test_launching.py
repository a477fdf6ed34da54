"""The command of the user's own that starts a replay's ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lrd.errors import UserError
from lrd.replay.computing import ranks
from lrd.replay.computing.launching import LAUNCHER_VARIABLE, ReplayFailed, compute, scratch_folder
from lrd.replay.computing.plan import Leg, Plan, Watch

LAUNCHER = """
import json, os, sys
from pathlib import Path
Path("started.json").write_text(json.dumps([sys.argv[1:], os.environ["OMP_NUM_THREADS"]]))
sys.exit({status})
"""


def make_leg(num_ranks: int) -> Leg:
    return Leg(recipe={}, ranks=num_ranks, threads=3, on_cpu=True, first=4, last=6, checkpoint="c")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a run; commands start in the one above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    return Path("run")


@pytest.mark.parametrize("status", [0, 3])
def test_it_gets_module_and_plan_and_its_status_counts(run_dir, monkeypatch, status):
    Path("launcher.py").write_text(LAUNCHER.format(status=status))
    monkeypatch.setenv(LAUNCHER_VARIABLE, f"'{sys.executable}' launcher.py --machine_rank 0")

    with scratch_folder(run_dir) as out:
        assert out.parent == (run_dir / "replays").absolute()  # where other hosts see it, too
        if status:
            with pytest.raises(ReplayFailed, match="a run: the steps could not be computed again"):
                compute([make_leg(2)], Watch(), out, "a run")
        else:
            compute([make_leg(2)], Watch(), out, "a run")
        arguments, threads = json.loads(Path("started.json").read_text())
        plan = out / "plan-0.json"
        assert arguments == ["--machine_rank", "0", "-m", "lrd.replay.computing.ranks", str(plan)]
        assert threads == "3"
        assert Plan.read(plan).legs == [make_leg(2)]
    assert not out.exists()


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("no-such-command -x", "no-such-command: .*No such file"),
        ("a 'quote", "No closing quotation"),
    ],
)
def test_what_is_no_command_is_one_line(run_dir, monkeypatch, launcher, reason):
    monkeypatch.setenv(LAUNCHER_VARIABLE, launcher)
    with (
        scratch_folder(run_dir) as out,
        pytest.raises(UserError, match=f"^{LAUNCHER_VARIABLE}: .*{reason}"),
    ):
        compute([make_leg(2)], Watch(), out, "a run")


def test_other_ranks_than_the_runs_are_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "plan.json"
    Plan([make_leg(2)], Watch(), str(tmp_path)).write(path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.run_plan(path) == 2
    line = "lrd: the launcher has started 4 rank(s); steps 5 to 6 are computed on 2\n"
    assert capsys.readouterr().err == line


def test_a_plan_that_is_not_on_this_host_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        ranks.main([str(tmp_path / "plan.json")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("plan.json: no such file; the hosts of a replay share the run directory")
