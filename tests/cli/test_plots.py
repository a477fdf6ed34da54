"""`lrd lr`: pictures of the learning rates of recipes and runs."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from lrd.cli import plots
from lrd.cli.app import app
from tests.helpers.tracked_run import TrackedRun

RECIPE = """
data: {dataset: synthetic, num_samples: 640, batch_size: 64}
optimizer: {lr: 0.1}
lr_dropout: {keep_prob: 0.5}
schedule: {name: StepLR, step_size: 1, gamma: 0.5, warmup_steps: 5}
trainer: {epochs: 3}
"""


@pytest.fixture
def sources(tmp_path) -> dict[str, list[str]]:
    """The command's arguments, by the names that the tests use."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "empty").mkdir()
    run = TrackedRun(tmp_path / "run")
    for step in range(1, 9):
        run.update(step)
    run.tracker.flush()

    names = ["recipe.yaml", "run", "empty", "nowhere.yaml"]
    arguments = {name: [str(tmp_path / name)] for name in names}
    arguments["recipe.yaml and run"] = arguments["recipe.yaml"] + arguments["run"]
    return arguments


@pytest.mark.parametrize("source", ["recipe.yaml", "run"])
def test_lr_draws_a_picture(tmp_path, sources, source):
    out = tmp_path / "lr.png"
    result = CliRunner().invoke(app, ["lr", *sources[source], "-o", str(out)])
    assert result.exit_code == 0

    num_coloured = 0
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        for count, colour in image.convert("RGB").getcolors(1 << 24):
            if max(colour) - min(colour) > 80:
                num_coloured += count
    assert num_coloured > 500


def test_recipes_of_one_name_in_two_folders_are_two_curves(tmp_path):
    paths = []
    for folder, lr in (("a", 0.1), ("b", 0.3)):
        path = tmp_path / folder / "recipe.yaml"
        path.parent.mkdir()
        path.write_text(RECIPE.replace("lr: 0.1", f"lr: {lr}"))
        paths.append(path)

    (axes,) = plots._plot_recipes(paths).axes
    assert [line.get_label() for line in axes.get_lines()] == [str(path) for path in paths]


@pytest.mark.parametrize(
    ("source", "out", "expected"),
    [
        ("recipe.yaml and run", "lr.png", "one picture"),
        ("empty", "lr.png", "empty"),
        ("nowhere.yaml", "lr.png", "nowhere.yaml"),
        ("recipe.yaml", "nowhere/lr.png", "nowhere"),
        ("recipe.yaml", "lr.nonsense", "lr.nonsense"),
    ],
)
def test_lr_refuses_in_one_line(tmp_path, sources, source, out, expected):
    result = CliRunner().invoke(app, ["lr", *sources[source], "-o", str(tmp_path / out)])
    assert result.exit_code == 2

    (line,) = result.stderr.splitlines()
    assert line.startswith("lrd: ")
    assert expected in line
    assert not (tmp_path / out).exists()


def test_lr_draws_a_recipe_whose_images_are_missing(tmp_path, sources):
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(f"data: {{dataset: imagefolder, root: {tmp_path / 'nowhere'}}}")
    out = tmp_path / "lr.png"
    arguments = ["lr", *sources["recipe.yaml"], str(elsewhere), "-o", str(out)]

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "elsewhere: no images in" in result.stdout
    assert out.stat().st_size > 10_000
