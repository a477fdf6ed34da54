"""The optimizer, schedule and loss of docs/parts.md pass the checks and train together."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from lrd import recipe
from lrd.parts.checks import check_optimizer, check_schedule
from lrd.parts.losses import build_loss, check_loss
from lrd.train import run

PAGE = Path(__file__).parents[2] / "docs" / "parts.md"


@pytest.fixture
def documented_sections(tmp_path, monkeypatch) -> dict[str, Any]:
    """The recipes of the page's sections, put together; their modules can be imported."""
    page = PAGE.read_text(encoding="utf-8")
    (tmp_path / "my_parts").mkdir()
    sections: dict[str, Any] = {}
    for heading, module in (("optimizer", "optim"), ("schedule", "schedule"), ("loss", "loss")):
        text = page.partition(f"## The {heading}\n")[2]
        code = re.search(rf"```python\n(# my_parts/{module}\.py\n.*?)```", text, re.DOTALL)
        (tmp_path / "my_parts" / f"{module}.py").write_text(code[1])
        example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
        sections = {**example, **sections}  # the optimizer is that of its own section

    names = ["my_parts", "my_parts.optim", "my_parts.schedule", "my_parts.loss"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)  # the folder in which a command starts is searched for modules
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield sections
    for name in names:
        sys.modules.pop(name, None)


def test_the_parts_of_the_documentation_pass_the_checks(documented_sections, capsys):
    parsed = recipe.parse(documented_sections, "test")
    assert parsed.optimizer.name == "my_parts.optim:Lion"

    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(4, 10)})
    check_optimizer(layers, parsed)
    check_schedule(layers, parsed, steps_per_epoch=20)
    check_loss(parsed.trainer, build_loss(parsed.trainer), num_classes=10)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("one_thread")
def test_the_parts_of_the_documentation_train(documented_sections, tmp_path):
    documented_sections["model"] = {"arch": "resnet18", "width": 4}
    documented_sections["schedule"]["warmup_steps"] = 3
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(documented_sections))

    assert run("recipe.yaml", ["trainer.device=cpu", "trainer.epochs=1", "run_dir=run"]) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
