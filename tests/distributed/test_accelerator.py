"""The variables of a launcher are checked before a rank waits for others."""

import os

import pytest

from lrd.distributed import accelerator, hardware
from lrd.errors import UserError

_LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def set_variables(monkeypatch):
    """A function that sets the variables of a launcher, and no others."""

    def set_only(variables):
        for name in (*_LAUNCHED, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        _LAUNCHED,
        {key: value for key, value in _LAUNCHED.items() if not key.startswith("LOCAL")},
    ],
)
def test_what_launchers_set_is_accepted(set_variables, variables):
    set_variables(variables)
    accelerator.check_launch_variables()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", value) for value in ("", "abc", "0", "-1", "1.5", " 4", "\u0664")),
        *(("RANK", value) for value in ("abc", "-1", "4", "1e0")),
        *(("LOCAL_RANK", value) for value in ("abc", "-1", "2")),
        *(("LOCAL_WORLD_SIZE", value) for value in ("abc", "0", "-2")),
        *(("MASTER_PORT", value) for value in ("abc", "-1", "65536", 30 * "9", "")),
        ("MASTER_ADDR", ""),
    ],
)
def test_a_value_that_no_launcher_sets_is_one_line_with_the_variable(set_variables, name, value):
    set_variables({**_LAUNCHED, name: value})
    with pytest.raises(UserError, match=f"^{name}: is ") as raised:
        accelerator.check_launch_variables()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(set_variables, name):
    set_variables({key: value for key, value in _LAUNCHED.items() if key != name})
    with pytest.raises(UserError, match=f"^{name}: is not set, but WORLD_SIZE is 4"):
        accelerator.check_launch_variables()


def test_a_rank_alone_is_out_of_range(set_variables):
    set_variables({"RANK": "3"})
    with pytest.raises(UserError, match=r"^RANK: is '3' .* less than WORLD_SIZE \(1\)"):
        accelerator.check_launch_variables()


@pytest.mark.parametrize(
    ("command", "value"),
    [
        (["accelerate", "launch", "--num_processes", "2", "-m", "lrd.train"], "2"),
        (["accelerate", "launch", "--num-processes=3", "-m", "lrd.train"], "3"),
        (["accelerate", "launch", "--num_processes"], ""),
        (["accelerate", "launch", "num_processes", "2"], ""),
        ([], ""),
    ],
)
def test_the_number_of_processes_is_found_on_the_launchers_command_line(command, value):
    assert accelerator._find_option(command, "--num_processes") == value


@pytest.mark.parametrize(
    ("variables", "command", "words"),
    [
        ({}, ["--num_processes", "2"], ""),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, [], ""),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], ""),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "mixed_precision: the launcher's fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["--num_processes", "1"], ""),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ["--num_processes", "2"], "num_processes: 2 were"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"}, ["--num_processes", "2"], ""),
    ],
)
def test_options_of_the_launcher_that_have_no_effect_are_reported(
    set_variables, monkeypatch, capsys, variables, command, words
):
    set_variables(variables)
    monkeypatch.setattr(accelerator, "_launcher_command", lambda: command)
    accelerator._report_ignored_options("bf16")
    output = capsys.readouterr().out
    assert words in output
    assert bool(output) == bool(words)


def test_the_launchers_command_line_is_that_of_the_parent():
    assert accelerator._launcher_command() == _command_line(os.getppid())


def _command_line(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as stream:
        return stream.read().decode().split("\0")[:-1]


@pytest.mark.parametrize("value", ["abc", "2", ""])
def test_use_cpu_is_true_or_false(set_variables, value):
    set_variables({"ACCELERATE_USE_CPU": value})
    with pytest.raises(UserError, match=r"^ACCELERATE_USE_CPU: is "):
        hardware.uses_cpu("auto")
