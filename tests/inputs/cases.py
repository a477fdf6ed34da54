"""An input, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# The recipe that inputs change: two steps of a tiny network take about half a second.
RECIPE = """\
data: {dataset: digits, batch_size: 240}
model: {arch: resnet18, width: 2}
optimizer: {lr: 0.01, momentum: 0.9}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 1, max_steps: 2, device: cpu}
"""
RECIPE_FILE = "recipe.yaml"
RUN_DIR = "run"


@dataclass(frozen=True)
class Expected:
    """What a command must do.

    Attributes:
        statuses: the exit statuses that it may end with.
        words: each must be in what it prints: in an error, if it fails; the key, file or rank.
        reason: why it may end with status 0 and say nothing; empty: it may not.
        is_usage: the message is typer's, which also prints how the command is used.
        is_in_output: the failure is shown in a table on standard output.
    """

    statuses: tuple[int, ...]
    words: tuple[str, ...] = ()
    reason: str = ""
    is_usage: bool = False
    is_in_output: bool = False


def refused(*words: str) -> Expected:
    """One line or more with these words, status 2, and nothing written."""
    return Expected((2,), words)


def fails(*words: str) -> Expected:
    """A run that began and cannot go on: one line with these words, and status 1."""
    return Expected((1,), words)


def accepted(reason: str) -> Expected:
    """A valid input, status 0."""
    return Expected((0,), reason=reason)


def told(*words: str) -> Expected:
    """Status 0, and a line with these words that says what is odd."""
    return Expected((0,), words)


def misused(*words: str) -> Expected:
    """typer's message about a command's arguments, and status 2."""
    return Expected((2,), words, is_usage=True)


def write_nothing(_: Path) -> None:
    pass


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        group: what kind of input it is.
        name: what it is; unique in its group.
        expected: what must come of it.
        command: `lrd.train` or `lrd` with arguments, run in a forked process; anything else is a
            program that is started as such.
        prepare: writes what the command needs into the folder in which it runs.
        environment: variables to set; an empty value unsets one.
        stdout: the file that standard output goes to; `closed`: none is open.
        is_launched: starts a launcher with ranks, which takes seconds by itself.
    """

    group: str
    name: str
    expected: Expected
    command: tuple[str, ...]
    prepare: Callable[[Path], None] = write_nothing
    environment: Mapping[str, str] = field(default_factory=dict)
    stdout: str = ""
    is_launched: bool = False

    @property
    def full_name(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def is_forked(self) -> bool:
        return self.command[0] in ("lrd", "lrd.train") and not self.stdout


def training(*overrides: str) -> tuple[str, ...]:
    """The command that trains RECIPE with overrides."""
    return ("lrd.train", RECIPE_FILE, f"run_dir={RUN_DIR}", *overrides)


def override_inputs(group: str, table: Mapping[str, Mapping[str, Expected]]) -> list[Input]:
    """One input for each value of each key.

    Args:
        group: of the inputs.
        table: key -> value as YAML -> what is expected.
    """
    return [
        Input(group, f"{key}={value}"[:120], expected, training(f"{key}={value}"))
        for key, values in table.items()
        for value, expected in values.items()
    ]
