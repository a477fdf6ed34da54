"""`lrd lr`: pictures of the learning rates of recipes and runs."""

from pathlib import Path

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


@pytest.mark.parametrize("source", ["recipe.yaml", "run", "recipe.yaml and run"])
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

    (axes,) = plots.plot_sources(plots.read_sources(paths, [])).axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert [label for label in labels if not label.startswith("_")] == [str(path) for path in paths]


def test_a_recipe_shows_the_effective_lr_that_its_masks_lead_to(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    groups = "optimizer.groups=[{match: 'fc.*', name: head, keep_prob: 0.9}]"
    (source,) = plots.read_sources([path], [groups, "optimizer.lr=0.2", "schedule=null"])
    rest, head = source.trajectories
    assert rest.lrs == [0.2] * 30
    assert rest.effective == pytest.approx([0.1] * 30)
    assert head.effective == pytest.approx([0.18] * 30)

    (plain,) = plots.read_sources([path], ["lr_dropout=null"])
    assert plain.trajectories[0].effective is None


def test_recipes_and_runs_share_a_picture_over_steps(sources):
    paths = [Path(text) for text in sources["recipe.yaml and run"]]
    recipe, run = plots.read_sources(paths, [])
    assert run.trajectories[0].steps == list(range(1, 9))
    assert run.trajectories[0].effective is not None
    (axes,) = plots.plot_sources([recipe, run]).axes
    assert axes.get_xlabel() == "step"
    # lr and effective lr: of the recipe's group, and of the run's two.
    assert len(axes.get_lines()) == 6


def test_many_lines_can_be_told_apart(tmp_path):
    paths = []
    for i in range(12):
        path = tmp_path / f"r{i}.yaml"
        path.write_text(RECIPE.replace("lr: 0.1", f"lr: {0.1 + i}"))
        paths.append(path)

    groups = "optimizer.groups=[{match: 'fc.*', name: head, lr: 0.05}]"
    (axes,) = plots.plot_sources(plots.read_sources(paths, [groups])).axes
    looks = set()
    labelled = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    for line in labelled:
        looks.add((line.get_color(), str(line._dash_pattern), line.get_marker()))
    assert len(labelled) == 13  # the head's lr is the same in all
    assert len(looks) == len(labelled)


def test_overrides_of_runs_alone_are_refused(tmp_path, sources):
    arguments = ["lr", *sources["run"], "optimizer.lr=1", "-o", str(tmp_path / "lr.png")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "optimizer.lr=1: overrides are for recipes" in result.stderr


@pytest.mark.parametrize(
    ("source", "out", "expected"),
    [
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
    assert "elsewhere: data.root: " in result.stdout
    assert "drawn as if there were 50,000 images" in " ".join(result.stdout.split())
    assert out.stat().st_size > 10_000
