"""`lrd launch`: the launch file it chooses, what it prints, and the status it ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from lrd.cli import launch as lrd_launch
from lrd.errors import UserError
from tests.helpers.launching import ROOT, environment

LAUNCH_FILES = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
SMALL = ["model.arch=resnet18", "model.width=4", "data.batch_size=64"]
TEST_RECIPE = str(ROOT / "recipes" / "digits_resnet34_sgd_lrd.yaml")

# A rank that ends at once, in the way that its first argument says; `;` separates starts.
RANK = """
import os, signal, sys
rank = int(os.environ.get("LOCAL_RANK", "0"))
start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
ends = sys.argv[1].split(";")[start].split(",")
end = ends[rank]
if end.startswith("signal"):
    import time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(75))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    if rank == 0:
        time.sleep(0.5)
        os.kill(os.getppid(), getattr(signal, end.removeprefix("signal:")))
    time.sleep(30)
elif end == "wait":
    import time
    time.sleep(30)
elif end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    print(f"rank {rank} says {end}", flush=True)
    sys.exit(int(end))
"""


def run_launch(
    *arguments: object, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess:
    """Run `lrd launch` to its end."""
    command = [sys.executable, "-m", "lrd", "launch", *map(str, arguments)]
    env = {**environment(), **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def rank_module(tmp_path) -> Path:
    """A folder with the module `fake_rank`."""
    (tmp_path / "fake_rank.py").write_text(RANK)
    return tmp_path


@pytest.fixture
def launch_fake_ranks(rank_module, monkeypatch, capfd):
    """A function that launches `fake_rank` in this process; returns status and output."""
    monkeypatch.setenv("PYTHONPATH", str(rank_module))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launch(ends: str, *options: str) -> tuple[int, list[str]]:
        status = lrd_launch.launch(["--cpu", *options, "-m", "fake_rank", ends])
        captured = capfd.readouterr()
        return status, (captured.out + captured.err).splitlines()[1:]  # the first is the command

    return launch


@pytest.mark.parametrize(
    ("ends", "status", "extra_line"),
    [
        ("0,0", 0, None),
        ("2,2", 2, None),
        ("75,75", 75, None),
        ("1,wait", 1, None),
        ("kill,wait", 1, "lrd: local rank 0 was killed by SIGKILL"),
    ],
)
def test_it_ends_with_the_status_of_the_ranks(launch_fake_ranks, ends, status, extra_line):
    result, lines = launch_fake_ranks(ends)
    assert result == status
    others = [line for line in lines if "says" not in line]
    assert others == ([] if extra_line is None else [extra_line])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_signal_reaches_the_ranks_and_theirs_is_the_status(launch_fake_ranks, name, num_ranks):
    ends = f"signal:{name},signal:{name}"
    status, lines = launch_fake_ranks(ends, "--num_processes", str(num_ranks))
    assert status == 75
    assert lines == []


def test_a_signal_before_the_ranks_can_save_is_one_line(launch_fake_ranks, rank_module):
    # The ranks do not handle SIGUSR1, as ranks that still import torch do not.
    status, lines = launch_fake_ranks("signal:SIGUSR1,signal:SIGUSR1")
    assert status == 128 + 10
    assert lines == ["lrd: stopped by SIGUSR1 before the first step; nothing new is saved"]


def test_ranks_are_started_again_after_a_crash_but_not_after_a_users_error(launch_fake_ranks):
    status, lines = launch_fake_ranks("kill,wait;1,1;2,2;0,0", "--max_restarts", "3")
    assert status == 2
    reports = [line for line in lines if line.startswith("lrd: ")]
    assert len(reports) == 2
    assert "rank 0 was killed by SIGKILL" in reports[0]
    assert reports[0].endswith("restart 1 of 3")
    assert "rank 0 ended with status 1" in reports[1]
    assert not any("says 0" in line for line in lines)


def test_a_crash_of_the_launcher_itself_is_not_hidden(launch_fake_ranks, monkeypatch):
    from accelerate.commands import launch as accelerate_launch

    def crash(options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(accelerate_launch, "launch_command", crash)
    with pytest.raises(RuntimeError, match="out of order"):
        launch_fake_ranks("0,0")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no recipe"),
        (["--nonsense", "r.yaml"], "--nonsense"),
        (["--num_processes", "many", "r.yaml"], "--num_processes"),
        (["r.yaml", "--num_processes", "2"], "--num_processes: options go before the recipe"),
        (["--num_machines", "2", "r.yaml"], "--num_processes of all hosts"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, expected):
    with pytest.raises(UserError) as caught:
        lrd_launch.build_command(launch_command_parser(), arguments, has_default_config=False)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


LRD = ["--rdzv_backend", "lrd"]


@pytest.mark.parametrize(
    ("gpus", "options", "name", "more"),
    [
        (0, [], "cpu.yaml", [*LRD, "--num_processes", "2"]),
        (0, ["--num_processes", "1"], "cpu-1.yaml", []),
        (0, ["--num_processes", "4"], "cpu.yaml", LRD),
        (0, ["--num_processes", "4", "--rdzv_backend", "c10d"], "cpu.yaml", []),
        (1, [], "gpu.yaml", ["--num_processes", "1"]),
        (4, [], "gpus.yaml", [*LRD, "--num_processes", "4"]),
        (4, ["--cpu"], "cpu.yaml", [*LRD, "--num_processes", "2"]),
        (8, ["--num_machines", "2", "--num_processes", "16"], "hosts-gpu.yaml", LRD),
        (0, ["--num_machines", "2", "--num_processes", "4"], "hosts-cpu.yaml", LRD),
    ],
)
def test_the_launch_file_fits_the_host(monkeypatch, gpus, options, name, more):
    monkeypatch.setattr(lrd_launch, "_count_gpus", lambda: gpus)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    command = lrd_launch.build_command(
        launch_command_parser(), [*options, "r.yaml", "seed=1"], has_default_config=False
    )
    file = next(path for path in LAUNCH_FILES if path.name == name)
    assert command[0] == "--config_file"
    assert Path(command[1]).resolve() == file

    kept = [option for option in options if option != "--cpu"]
    assert command[2:] == [*more, *kept, "-m", "lrd.train", "r.yaml", "seed=1"]


@pytest.mark.parametrize("options", [["--config_file", "mine.yaml"], ["--multi_gpu"]])
def test_a_users_choice_is_left_alone(options):
    arguments = [*options, "r.yaml"]
    command = lrd_launch.build_command(launch_command_parser(), arguments, False)
    assert command == [*options, "-m", "lrd.train", "r.yaml"]


def test_the_users_default_config_is_left_alone():
    command = lrd_launch.build_command(launch_command_parser(), ["r.yaml"], True)
    assert command == ["-m", "lrd.train", "r.yaml"]


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=[path.name for path in LAUNCH_FILES])
def test_the_options_of_an_installed_lrd_are_those_of_the_files(path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    settings = yaml.safe_load(path.read_text())
    ranks_on_host = settings["num_processes"] // settings["num_machines"]
    options = lrd_launch.options_of_launch_file(path.name, ranks_on_host)

    keys = ["multi_gpu", "num_processes", "num_machines", "main_process_port", "mixed_precision"]
    keys += ["dynamo_backend", "num_cpu_threads_per_process"]
    resolved = []
    for arguments in (options, ["--config_file", str(path)]):
        parsed = launch_command_parser().parse_args([*arguments, "-m", "lrd.train", "r.yaml"])
        _validate_launch_command(parsed)
        # Accelerate hides no GPU for `all`, and for None neither.
        gpu_ids = "all" if parsed.gpu_ids is None else parsed.gpu_ids
        resolved.append([gpu_ids, *(getattr(parsed, key) for key in keys)])
    assert resolved[0] == resolved[1]


def test_a_typo_in_a_recipe_is_one_line(tmp_path):
    arguments = [TEST_RECIPE, "optimizer.momentun=0.5", f"run_dir={tmp_path / 'run'}"]
    done = run_launch(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("lrd: optimizer.momentun: ")
    (command,) = done.stdout.splitlines()
    assert command.startswith("accelerate launch --config_file ")


@pytest.mark.slow
def test_ctrl_c_prints_what_was_saved(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "lrd", "launch", TEST_RECIPE, *SMALL, "trainer.epochs=500"]
    launcher = subprocess.Popen(
        [*command, "checkpoint.every_steps=5", f"run_dir={run_dir}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    from tests.helpers.launching import wait_for

    wait_for(lambda: bool(list(run_dir.glob("checkpoints/step-*"))), launcher)
    launcher.send_signal(2)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    progress = ("images/s", "epoch ")
    lines = [line for line in output.splitlines() if line and not any(p in line for p in progress)]
    assert len(lines) == 2
    assert lines[1].startswith("stopped by signal 2 after step ")
