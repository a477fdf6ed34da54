"""`lrd eval` and `lrd predict`: the training run's own accuracy, exactly, in any process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import lrd
from lrd.checkpoint import store
from lrd.checkpoint.export import export_weights
from lrd.cli.app import app
from lrd.inference.evaluation import Evaluation
from tests.helpers.launching import launch, train_command


def run_lrd(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of lrd in a process of its own."""
    command = [sys.executable, "-m", "lrd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def evaluated(*arguments: object) -> dict[str, Any]:
    """What `lrd eval --json` prints in a process of its own."""
    ended = run_lrd("eval", *arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def evaluated_here(*arguments: object) -> dict[str, Any]:
    """What `lrd eval --json` prints, in this process."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    """The one line with which a command is refused."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("lrd: ")
    return line


def recorded(run_dir: Path) -> dict[str, float]:
    newest, _ = store.find_newest_valid(run_dir)
    return store.read_trainer(newest)["latest"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("ema", "evaluate"),
    [
        (False, evaluated_here),
        (True, evaluated_here),
        pytest.param(False, evaluated, marks=pytest.mark.slow),
    ],
)
def test_exported_weights_have_the_accuracy_of_the_run(run_dir, tmp_path, ema, evaluate):
    out = tmp_path / "w.safetensors"
    export_weights(run_dir, out, ema=ema)
    found = evaluate(out)
    prefix = "ema_" if ema else ""
    assert found["accuracy"] == recorded(run_dir)[f"{prefix}accuracy"]
    assert found["loss"] == pytest.approx(recorded(run_dir)[f"{prefix}loss"], rel=1e-6)
    assert found["recorded"]["accuracy"] == found["accuracy"]

    assert found["num_images"] == 360
    assert sum(sum(row) for row in found["confusion"]) == 360
    assert found["num_correct"] == sum(row[i] for i, row in enumerate(found["confusion"]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_folder_of_images_in_bf16_has_the_accuracy_of_the_run(folder_run_dir, tmp_path, part):
    export_weights(folder_run_dir, tmp_path / "exported", ema=True)
    found = evaluated_here(tmp_path / "exported", "--part", part)
    prefix = "" if part == "test" else "validation_"
    assert found["accuracy"] == recorded(folder_run_dir)[f"{prefix}ema_accuracy"]
    assert found["num_images"] == (150 if part == "test" else 30)


@pytest.mark.usefixtures("one_thread")
def test_predictions_add_up_to_the_accuracy_of_the_run(folder_run_dir, image_folder):
    command = ["predict", str(folder_run_dir), str(image_folder / "test"), "--top", "1", "--json"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    results = json.loads(ended.stdout)
    correct = [
        Path(result["image"]).parent.name == result["predictions"][0]["class"] for result in results
    ]
    assert len(correct) == 150
    assert sum(correct) / 150 == recorded(folder_run_dir)["accuracy"]


@pytest.mark.slow
def test_a_run_on_two_ranks_is_evaluated_in_the_batches_of_both(tmp_path):
    overrides = ["model.arch=resnet18", "model.width=2", "trainer.max_steps=4"]
    ended = launch(train_command(2, tmp_path / "run", *overrides))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = evaluated(tmp_path / "run")
    assert found["accuracy"] == recorded(tmp_path / "run")["accuracy"]
    assert lrd.load_model(tmp_path / "run").config.lrd.world_size == 2


@pytest.mark.usefixtures("one_thread")
def test_another_folder_of_images_is_matched_by_the_names_of_its_classes(
    folder_run_dir, image_folder, tmp_path
):
    for name in ("digit 7", "digit 3"):
        shutil.copytree(image_folder / "test" / name, tmp_path / "images" / "test" / name)
    whole = evaluated_here(folder_run_dir)
    part = evaluated_here(folder_run_dir, "--data", tmp_path / "images")
    assert part["confusion"][3] == whole["confusion"][3]
    assert part["confusion"][7] == whole["confusion"][7]
    assert part["num_images"] == sum(whole["confusion"][3]) + sum(whole["confusion"][7])
    assert part["recorded"] is None
    assert evaluated_here(folder_run_dir, "--data", tmp_path / "images" / "test") == (
        part | {"images": str(tmp_path / "images" / "test")}
    )

    (tmp_path / "images" / "test" / "digit 3").rename(tmp_path / "images" / "test" / "three")
    line = refused("eval", folder_run_dir, "--data", tmp_path / "images")
    assert "the network has no class 'three'; its classes are digit 0, " in line


@pytest.mark.usefixtures("one_thread")
def test_the_table_names_classes_mistakes_and_the_recorded_accuracy(run_dir, tmp_path):
    out = tmp_path / "confusion.png"
    result = CliRunner().invoke(app, ["eval", str(run_dir), "-o", str(out)])
    assert result.exit_code == 0, result.output
    accuracy = recorded(run_dir)["accuracy"]
    assert f"accuracy {accuracy:.4f} (" in result.stdout
    assert f"the training run recorded the same accuracy, {accuracy:.4f}" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if row[:1] and row[0].isdigit()] == list("0123456789")
    with Image.open(out) as image:
        assert min(image.size) > 500


@pytest.mark.usefixtures("one_thread")
def test_an_accuracy_that_differs_from_the_recorded_one_is_reported(run_dir, edited):
    source = store.find_newest_valid(run_dir)[0] / "model.safetensors"

    def change(config: dict) -> None:
        config["lrd"]["metrics"]["accuracy"] -= 3 / 360

    result = CliRunner().invoke(app, ["eval", str(edited(source, change))])
    assert result.exit_code == 0, result.output
    assert "recorded another accuracy" in result.stdout
    assert "(+3 images)" in result.stdout


def test_mistakes_are_counted_by_class():
    confusion = torch.tensor([[5, 1, 4], [0, 3, 0], [0, 0, 0]])
    evaluation = Evaluation(("a", "b", "c"), confusion, 0.5, {}, "images")
    assert evaluation.num_images == 13
    assert evaluation.accuracy == 8 / 13
    assert evaluation.most_confused_with(0) == ("c", 4)
    assert evaluation.most_confused_with(1) is None
    assert evaluation.most_confused_with(2) is None


@pytest.mark.usefixtures("one_thread")
def test_images_that_cannot_be_read_are_named_and_the_others_shown(
    folder_run_dir, image_folder, tmp_path
):
    images = sorted((image_folder / "test").glob("*/*.png"))[:2]
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(images[0].read_bytes()[:60])
    paths = [images[0], wrong, tmp_path / "no.png", images[1]]
    ended = CliRunner().invoke(app, ["predict", str(folder_run_dir), *map(str, paths)])
    assert ended.exit_code == 2
    assert [line.split(": ")[1] for line in ended.stderr.splitlines()] == [
        str(wrong),
        str(tmp_path / "no.png"),
    ]
    lines = ended.stdout.splitlines()
    assert len(lines) == 1 + 2 * 5
    assert lines[1].startswith(str(images[0]))
    assert lines[6].startswith(str(images[1]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("make_arguments", "expected"),
    [
        (lambda run, tmp: ["eval", tmp / "nowhere"], "no such file or folder"),
        (lambda run, tmp: ["eval", tmp], "no weights in it: no checkpoints of a run"),
        (lambda run, tmp: ["eval", run, "-o", tmp / "x.doc"], "must end in .png"),
        (lambda run, tmp: ["eval", run, "--part", "train"], "may be test or validation"),
        (lambda run, tmp: ["eval", run, "--part", "validation"], "data.validation is 0"),
        (lambda run, tmp: ["eval", run, "--data", tmp / "no"], "--data: "),
        (lambda run, tmp: ["eval", run, "--data", tmp], "--data: no image in"),
        (lambda run, tmp: ["eval", run, "optimizer.lr=1"], "only data.*, trainer.*"),
        (lambda run, tmp: ["eval", run, "data.image_size=abc"], "data.image_size"),
        (lambda run, tmp: ["eval", run, "data.image_size=9"], "was trained with 8 x 8"),
        (lambda run, tmp: ["eval", run, "data.dataset=synthetic"], "trained with 8 x 8"),
        (lambda run, tmp: ["eval", run, "model.arch=no_module:f"], "no module no_module"),
        (lambda run, tmp: ["predict", run, tmp], "no image in it"),
        (lambda run, tmp: ["predict", run, tmp / "x.png"], "x.png: no such image"),
        (lambda run, tmp: ["predict", run, "model.width=3"], "may be an image, model.arch="),
        (lambda run, tmp: ["predict", tmp, tmp / "x.png"], "no weights in it"),
        (lambda run, tmp: ["checkpoints", run, "--best"], "say what to --export"),
        (
            lambda run, tmp: ["checkpoints", run, "--export", tmp / "x.pt"],
            "a file that ends in .safetensors, or a folder",
        ),
        (
            lambda run, tmp: ["checkpoints", tmp, "--export", tmp / "x.safetensors"],
            "there is no valid checkpoint",
        ),
    ],
)
def test_a_wrong_input_is_refused_in_one_line(run_dir, tmp_path, make_arguments, expected):
    assert expected in refused(*make_arguments(run_dir, tmp_path))


@pytest.mark.usefixtures("one_thread")
def test_own_data_in_a_file_is_imported_only_if_the_user_says_it_too(
    run_dir, edited, tmp_path, monkeypatch
):
    (tmp_path / "trap_data.py").write_text(
        "from lrd import recipe\nfrom lrd.data.datasets import load_dataset\n\n"
        "def load():\n    return load_dataset(recipe.Data(), 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def change(config: dict) -> None:
        config["lrd"]["recipe"]["data"]["dataset"] = "trap_data:load"

    path = edited(store.find_newest_valid(run_dir)[0] / "model.safetensors", change)
    assert "say data.dataset=trap_data:load" in refused("eval", path)
    assert "trap_data" not in sys.modules

    result = CliRunner().invoke(app, ["eval", str(path), "data.dataset=trap_data:load"])
    assert result.exit_code == 0, result.output
    assert "recorded the same accuracy" in result.stdout
