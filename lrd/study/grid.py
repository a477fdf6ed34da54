"""The runs of a study, and what has been done of each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lrd import recipe as recipes
from lrd.checkpoint.run_dir import read_status
from lrd.data import datasets
from lrd.distributed import hardware
from lrd.errors import UserError
from lrd.parts.checks import check_optimizer, check_schedule
from lrd.parts.losses import build_loss
from lrd.parts.models import build_model
from lrd.parts.optimizers import build_optimizer
from lrd.parts.schedules import total_steps
from lrd.study.published import Published, read_published
from lrd.study.schema import Arm, StudyFile, read_study_file, slugify

# Settings that affect no result of a step, but which results a run has.
_LENGTH_SETTINGS = ("trainer.epochs", "trainer.max_steps", "trainer.eval_every")
_ASSUMED_CLASSES = 10  # to try a network out, of data whose classes are not known before a run


@dataclass(frozen=True, eq=False)
class GridRun:
    """One run of a study.

    Attributes:
        arm: name of its arm.
        seed: its seed.
        run_dir: its run directory.
        overrides: `section.key=value`, which make the base recipe that of this run.
        recipe: the result, where `auto` may still be left.
        steps_per_epoch: optimizer steps of an epoch; 0 if the study was only loaded for a report.
    """

    arm: str
    seed: int
    run_dir: Path
    overrides: list[str]
    recipe: recipes.Recipe
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.recipe, self.steps_per_epoch)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study with all of its runs.

    Attributes:
        file: what the study file says.
        base: path of the recipe.
        folder: the folder that has the run directories.
        runs: seed by seed, so that a part of a study has all arms.
        published: results of somebody else, to be shown beside.
    """

    file: StudyFile
    base: Path
    folder: Path
    runs: list[GridRun]
    published: list[Published]

    def runs_of(self, arm: str) -> list[GridRun]:
        """The runs of an arm, in the order of their seeds."""
        return [run for run in self.runs if run.arm == arm]


@dataclass(frozen=True)
class RunState:
    """What has been done of a run.

    Attributes:
        name: `new`, `begun` (stopped, killed, or running now), `finished`, `diverged` (a loss was
            not finite, and the recipe says stop), or `failed` (by anything else).
        step: steps done, as the run last reported.
        message: why it diverged or failed, in one line.
    """

    name: str
    step: int = 0
    message: str = ""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to run."""
        return self.name in ("finished", "diverged")

    @property
    def short_message(self) -> str:
        """The message without ranks and samples: `step 3: the loss is not finite`."""
        return re.split(r" \(| on rank|; ", self.message)[0]


def load_study(path: Path, runs_dir: Path, overrides: list[str], is_report: bool = False) -> Study:
    """Read a study file, its base recipe, and the recipe of each run.

    Args:
        path: the study file.
        runs_dir: the study's folder will be in it.
        overrides: `section.key=value`, for all arms.
        is_report: the data need not be here, because nothing is run.

    Raises:
        UserError: a key is unknown or has a wrong value, in the file or a recipe, or the recipe or
            its data cannot be found.
    """
    file = read_study_file(path)
    base = path.parent / file.base
    if not base.is_file():
        raise UserError(f"{path}: base: is {file.base!r}, but there is no such recipe: {base}")
    recipes.load(base)
    published = read_published(path, file.published)

    for override in overrides:
        _require_same_for_all_arms(file, override)
    common = _as_overrides(file.settings)
    with _name_source(f"{path}: set"):
        recipes.load(base, common)
    common += overrides
    recipes.load(base, common)

    folder = runs_dir / (slugify(path.stem) or "study")
    count_steps_per_epoch = _StepCounter()
    runs = []
    for name, arm in file.arms.items():
        arm_overrides = [*common, *_as_overrides(arm.settings)]
        for seed in arm.seeds or file.seeds:
            run_overrides = [*arm_overrides, f"seed={seed}"]
            with _name_source(f"{path}: arms.{name}"):
                recipe = recipes.load(base, run_overrides)
                steps_per_epoch = 0 if is_report else count_steps_per_epoch(recipe)

            run_dir = folder / slugify(name) / f"seed{seed}"
            runs.append(GridRun(name, seed, run_dir, run_overrides, recipe, steps_per_epoch))

    # Seed by seed; `sort` keeps the arms of a seed in their order.
    runs.sort(key=lambda run: _place_of_seed(file, run))
    return Study(file, base, folder, runs, published)


def _place_of_seed(file: StudyFile, run: GridRun) -> int:
    return (file.arms[run.arm].seeds or file.seeds).index(run.seed)


def _require_same_for_all_arms(file: StudyFile, override: str) -> None:
    """Refuse an override from the command line that an arm would undo, or that would undo an arm.

    Raises:
        UserError: it is of a key that an arm sets itself.
    """
    key = override.partition("=")[0]
    if key in ("seed", "run_dir"):
        raise UserError(f"{override}: the study chooses {key} for each run")

    for name, arm in file.arms.items():
        for arm_key in arm.settings:
            if f"{arm_key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{arm_key}."):
                raise UserError(f"{override}: the arm {name!r} sets {arm_key} itself")


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={_dump(value)}" for key, value in settings.items()]


def _dump(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def command_overrides(run: GridRun) -> list[str]:
    """The overrides with which `lrd.train` runs the base recipe as this run."""
    return [*run.overrides, f"run_dir={_dump(str(run.run_dir))}"]


@contextmanager
def _name_source(source: str) -> Iterator[None]:
    """A context in which each line of an error begins with where the setting is from."""
    try:
        yield
    except UserError as error:
        lines = [f"{source}: {line}" for line in str(error).splitlines()]
        raise UserError("\n".join(lines)) from None


class _StepCounter:
    """Counts the steps in an epoch of recipes, and the images of each data set once."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}  # training images by the `data` section

    def __call__(self, recipe: recipes.Recipe) -> int:
        # Which images are held out depends on the seed, their number does not.
        key = recipe.data.model_dump_json()
        if key not in self._counts:
            self._counts[key] = datasets.count_training_images(recipe.data, recipe.seed)

        steps_per_epoch = self._counts[key] // recipe.data.batch_size
        if steps_per_epoch == 0:
            raise UserError(
                f"data.batch_size: is {recipe.data.batch_size}, "
                f"but there are {self._counts[key]} training images"
            )
        return steps_per_epoch


def check_arms(study: Study, path: Path) -> None:
    """Try out the network, optimizer, loss and schedule of each arm, as a run does at its start.

    Args:
        study: the study.
        path: of the study file, for messages.

    Raises:
        UserError: a network, optimizer, schedule or learning rate dropout refuses its arguments,
            or there is no such device.
    """
    models: dict[str, nn.Module] = {}
    for name in study.file.arms:
        run = study.runs_of(name)[0]
        with _name_source(f"{path}: arms.{name}"):
            key = run.recipe.model.model_dump_json()
            if key not in models:
                models[key] = build_model(run.recipe.model, _ASSUMED_CLASSES, run.seed)
            model = models[key]
            with warnings.catch_warnings(action="ignore"):  # the runs say them too
                build_optimizer(model, run.recipe)
            check_optimizer(model, run.recipe)
            check_schedule(model, run.recipe, run.steps_per_epoch)
            build_loss(run.recipe.trainer)
            hardware.uses_cpu(run.recipe.trainer.device)  # refuses a device that is not there


def read_states(study: Study, is_report: bool) -> dict[GridRun, RunState]:
    """What has been done of each run.

    Args:
        study: the study.
        is_report: the report may be made on another machine than the runs were, where `auto` in a
            recipe means something else; what the runs made of it then counts.

    Raises:
        UserError: a run directory contains a run of another recipe, or cannot be read.
    """
    resolver = _AutoResolver()
    states = {}
    for run in study.runs:
        recorded = _read_recorded_recipe(run.run_dir)
        if recorded is not None:
            recipe = _adopt_auto(run.recipe, recorded) if is_report else resolver(run.recipe)
            _require_same_recipe(run, recipe, recorded)
        states[run] = read_state(run.run_dir)
    return states


def read_state(run_dir: Path) -> RunState:
    """What has been done of the run in a directory."""
    status = read_status(run_dir)
    if status is None:
        return RunState("new")

    step = status.get("step", 0)
    message = str(status.get("message", "")).partition("\n")[0]
    if status["state"] == "failed":
        is_diverged = "not finite" in message  # as lrd.job.nonfinite has it
        return RunState("diverged" if is_diverged else "failed", step, message)
    if status["state"] == "finished":
        return RunState("finished", step)
    return RunState("begun", step)


def _read_recorded_recipe(run_dir: Path) -> recipes.Recipe | None:
    """The recipe that a run directory was started with; None if no run has begun in it."""
    path = run_dir / "recipe.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UserError(
            f"{path}: cannot be read; delete the run directory to run it anew"
        ) from None
    return recipes.parse(values if isinstance(values, dict) else {}, str(path))


class _AutoResolver:
    """Resolves `auto` on this host, and says what it is once."""

    def __init__(self) -> None:
        self._resolved: dict[Any, dict[str, Any]] = {}

    def __call__(self, recipe: recipes.Recipe) -> recipes.Recipe:
        trainer = recipe.trainer
        key = (trainer.precision, trainer.channels_last, trainer.device)
        if key not in self._resolved:
            resolved = hardware.resolve_auto(recipe).trainer
            self._resolved[key] = {
                "precision": resolved.precision,
                "channels_last": resolved.channels_last,
            }
        return _update_trainer(recipe, self._resolved[key])


def _adopt_auto(recipe: recipes.Recipe, recorded: recipes.Recipe) -> recipes.Recipe:
    """The recipe with what a run made of `auto`."""
    if recipe.trainer.precision != "auto":
        return recipe
    return _update_trainer(recipe, {"precision": recorded.trainer.precision})


def _update_trainer(recipe: recipes.Recipe, values: dict[str, Any]) -> recipes.Recipe:
    return recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update=values)})


def _require_same_recipe(run: GridRun, recipe: recipes.Recipe, recorded: recipes.Recipe) -> None:
    """Refuse a run directory that has a run of another recipe.

    Raises:
        UserError: a setting that affects the results, or the run's length, differs. The line names
            the first one.
    """
    current = _compared_settings(recipe)
    before = _compared_settings(recorded)
    for key in [*current, *before]:
        if current.get(key) != before.get(key):
            raise UserError(
                f"{run.run_dir}: is a run of another recipe: {key} is {before.get(key)!r} there "
                f"and {current.get(key)!r} in this study; name another --runs, "
                "or delete that folder"
            )


def _compared_settings(recipe: recipes.Recipe) -> dict[str, Any]:
    trainer = recipe.trainer.model_dump(mode="json")
    lengths = {key: trainer[key.removeprefix("trainer.")] for key in _LENGTH_SETTINGS}
    return {**recipe.result_settings(), **lengths}


def describe_arm(arm: Arm) -> str:
    """What an arm changes: `optimizer.lr=0.05`."""
    return ", ".join(_as_overrides(arm.settings))
