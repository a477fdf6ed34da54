"""What the commands do with a user's module that fails, ends the process, prints or is hidden."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner, Result

from lrd.cli.app import app

MODULE = """
import sys

import numpy as np
from torch import nn

print("loaded")


class Net(nn.Module):
    def __init__(self, num_classes, fault=""):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, num_classes)
        self.fault = fault

    def forward(self, images):
        if self.training and len(images) > 2:
            if self.fault == "raise":
                raise ValueError("no such batch")
            if self.fault == "exit":
                sys.exit(0)
        return self.fc(images.flatten(1))


def load():
    return np.load("nowhere.npz")
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe in a folder with a module of the user's, which is on the Python path."""
    (tmp_path / "users_net.py").write_text(MODULE)
    (tmp_path / "users_broken.py").write_text("def build(num_classes:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_net", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run_dir: {tmp_path / 'run'}\n"
        "data: {dataset: digits, batch_size: 64}\n"
        "model: {arch: 'users_net:Net'}\n"
        "trainer: {max_steps: 1, device: cpu}\n"
    )
    return path


def invoke(*arguments: object) -> Result:
    """Run the `lrd` command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    return result


def test_check_names_the_users_line_for_a_fault_in_a_step(recipe):
    result = invoke("check", recipe, "model.fault=raise")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("lrd: this recipe fails here: ValueError: no such batch (users_net.py, ")


def test_a_network_that_ends_the_process_is_no_success(recipe):
    check = invoke("check", recipe, "model.fault=exit")
    assert check.exit_code == 2
    assert "SystemExit: 0 (users_net.py, line " in check.stderr
    assert invoke("train", recipe, "model.fault=exit").exit_code == 1


@pytest.mark.parametrize(
    ("fault", "error"), [("raise", "ValueError: no such batch"), ("exit", "SystemExit: 0")]
)
def test_a_fault_in_a_step_is_one_line_and_its_traceback_is_in_the_log(
    recipe, tmp_path, fault, error
):
    result = invoke("train", recipe, f"model.fault={fault}")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f": step 1: {error} (users_net.py, line " in line
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    assert '"failed"' in (tmp_path / "run" / "status.json").read_text()


@pytest.mark.parametrize(
    ("override", "end"),
    [
        (
            "model.arch=users_broken:build",
            "SyntaxError: '(' was never closed (users_broken.py, line 1)",
        ),
        (
            "data.dataset=users_net:load",
            "nowhere.npz: No such file or directory (users_net.py, line 26)",
        ),
        # A module of the standard library has the name that the user has chosen.
        ("model.arch=tokenize:ShapeNet", "tokenize.py) has no ShapeNet"),
    ],
)
def test_an_own_part_that_cannot_be_used_says_what_and_where(recipe, override, end):
    result = invoke("check", recipe, override)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith(end)


def test_what_a_module_prints_does_not_disturb_json(recipe, tmp_path, monkeypatch):
    assert invoke("train", recipe).exit_code == 0
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    for command in (["predict", tmp_path / "black.png"], ["eval"]):
        monkeypatch.delitem(sys.modules, "users_net")  # so that it prints again
        name, *images = command
        result = invoke(name, tmp_path / "run", *images, "model.arch=users_net:Net", "--json")
        assert result.exit_code == 0, result.stderr
        json.loads(result.stdout)
        assert "loaded" in result.stderr
