"""The lr that any element had at any past step, from the recorded lr and the mask alone.

The lr of an element in a step is that of its parameter group, or zero where the mask dropped it.
The group's lr was recorded, or follows from the schedule; the mask is a function of the seed, the
update count and the element's place. So elements that nobody chose beforehand can be looked at, and
nothing is computed again.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import scalar

from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.errors import UserError
from lrd.optim import group_settings, mask
from lrd.optim.dropout import get_lr_dropout
from lrd.parts.models import build_model
from lrd.parts.optimizers import build_optimizer
from lrd.parts.schedules import lr_trajectory
from lrd.replay.history import RunHistory, read_history
from lrd.replay.records import Records, read_records
from lrd.tracking.event_file import EventFile
from lrd.tracking.metrics_file import read_rows
from lrd.tracking.recorder import SKIPPED_TAG

_ELEMENT = re.compile(r"(?P<name>.*?)(\[(?P<index>[0-9, ]*)\])?")
_MAX_ELEMENTS = 1_000


@dataclass(frozen=True)
class Parameter:
    """A parameter of a run, and what its masks are drawn with.

    Attributes:
        name: in the network.
        shape: of the parameter.
        group: the name of its parameter group.
        lr_group: the name under which the recipe's schedule has its lr.
        index: in the position of its masks.
        keep_prob, seed, granularity: of its masks; `seed` is None without learning rate dropout.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    lr_group: str
    index: int
    keep_prob: float
    seed: int | None
    granularity: str


@dataclass
class Segment:
    """Steps that were taken by one recipe.

    Attributes:
        first, last: steps done before and after them.
        recipe: the recipe.
        parameters: by name.
        updates: for each group, the update count at each step, int64 (last - first,): the masks'
            position.
    """

    first: int
    last: int
    recipe: recipes.Recipe
    parameters: dict[str, Parameter]
    updates: dict[str, NDArray[np.int64]] = field(default_factory=dict)


@dataclass
class Trajectories:
    """What is known of the steps of a run without computing them.

    Attributes:
        segments: in their order.
        num_steps: how many steps are known.
        lrs: for each group, the lr at each step, float64 (num_steps,); NaN where it is not known.
        is_skipped: bool (num_steps,).
        notes: lines on what is not known.
    """

    segments: list[Segment]
    num_steps: int
    lrs: dict[str, NDArray[np.float64]]
    is_skipped: NDArray[np.bool_]
    notes: list[str]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Those of the last recipe."""
        return self.segments[-1].parameters


@dataclass(frozen=True)
class Probed:
    """The lrs of one element.

    Attributes:
        name: of the parameter.
        element: its index.
        lrs: at each step, float32 (num_steps,): what a record of it has.
    """

    name: str
    element: tuple[int, ...]
    lrs: NDArray[np.float32]

    @property
    def label(self) -> str:
        return f"{self.name}[{','.join(map(str, self.element))}]"

    @property
    def num_moved(self) -> int:
        """In how many steps its lr was not zero. One that is not known is not zero."""
        return int((self.lrs != 0).sum())

    @property
    def longest_wait(self) -> int:
        """The most steps in a row in which its lr was zero."""
        longest = waited = 0
        for moved in (self.lrs != 0).tolist():
            waited = 0 if moved else waited + 1
            longest = max(longest, waited)
        return longest


@dataclass
class ProbeResult:
    """The lrs of some elements of a run."""

    run_dir: Path
    probed: list[Probed]
    trajectories: Trajectories

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            "steps": self.trajectories.num_steps,
            "notes": self.trajectories.notes,
            "elements": [
                {
                    "parameter": probed.name,
                    "element": list(probed.element),
                    "moved": probed.num_moved,
                    "longest_wait": probed.longest_wait,
                    "lrs": [None if np.isnan(lr) else float(lr) for lr in probed.lrs],
                }
                for probed in self.probed
            ],
        }


def probe(run_dir: Path, patterns: Sequence[str]) -> ProbeResult:
    """Find the lr that elements had at each step of a run.

    Args:
        run_dir: the run directory.
        patterns: names of parameters, with `*` as in file names, each with the index of an element
            or without one: `layer4.*.conv1.weight[256,0,0,0]`. Without one it is the middle one.

    Raises:
        UserError: a pattern matches nothing, or the run cannot be read.
    """
    trajectories = read_trajectories(run_dir)
    elements = find_elements(patterns, trajectories.parameters)
    probed = [
        Probed(name, element, element_lrs(trajectories, name, element))
        for name, element in elements
    ]
    return ProbeResult(run_dir, probed, trajectories)


def find_elements(
    patterns: Sequence[str], parameters: dict[str, Parameter]
) -> list[tuple[str, tuple[int, ...]]]:
    """The elements that patterns name.

    Raises:
        UserError: a pattern matches no parameter, or its index lies outside of one.
    """
    found: dict[tuple[str, tuple[int, ...]], None] = {}
    for pattern in patterns:
        match = _ELEMENT.fullmatch(pattern)
        assert match is not None  # it matches any text
        names = [name for name in parameters if fnmatchcase(name, match["name"])]
        if not names:
            raise UserError(f"probe: {pattern!r} matches no parameter of the run")
        for name in names:
            found[name, _element_of(match["index"], parameters[name], pattern)] = None
    if len(found) > _MAX_ELEMENTS:
        raise UserError(f"probe: {len(found):,} elements are asked for, at most {_MAX_ELEMENTS:,}")
    return list(found)


def _element_of(text: str | None, parameter: Parameter, pattern: str) -> tuple[int, ...]:
    """The index of an element, from the text between brackets."""
    shape = parameter.shape
    if text is None:
        middle = int(np.prod(shape, dtype=np.int64)) // 2
        return tuple(int(i) for i in np.unravel_index(middle, shape)) if shape else ()

    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() for word in words):
        raise UserError(f"probe: {pattern!r}: an index is numbers with commas between them")
    element = tuple(int(word) for word in words)
    is_inside = len(element) == len(shape) and all(
        i < size for i, size in zip(element, shape, strict=True)
    )
    if not is_inside:
        raise UserError(f"probe: {pattern!r}: {parameter.name} has shape {list(shape)}")
    return element


def element_lrs(
    trajectories: Trajectories, name: str, element: tuple[int, ...]
) -> NDArray[np.float32]:
    """The lr of an element at each step, float32 (num_steps,); NaN where it is not known."""
    lrs = []
    for segment in trajectories.segments:
        steps = slice(segment.first, segment.last)
        if name not in segment.parameters:  # another recipe had no such parameter
            lrs.append(np.full(segment.last - segment.first, np.nan, np.float32))
            continue
        parameter = segment.parameters[name]
        group_lrs = trajectories.lrs[parameter.group][steps]
        is_kept = draw_element(parameter, element, segment.updates[parameter.group])
        moves = is_kept & ~trajectories.is_skipped[steps]
        # A dropped element's lr is zero whatever that of its group is.
        lrs.append(np.where(moves, group_lrs, 0.0).astype(np.float32))
    return np.concatenate(lrs)


def draw_element(
    parameter: Parameter, element: tuple[int, ...], updates: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether the mask kept an element, bool (updates,), at some update counts."""
    if parameter.seed is None:
        return np.ones(len(updates), np.bool_)

    # As for `lrd.optim.last_update.is_kept`: elements that share a draw have 0 in its dimensions.
    drawn_shape = mask.draw_shape(parameter.shape, parameter.granularity)
    place = tuple(0 if size == 1 else i for i, size in zip(element, drawn_shape, strict=True))
    offset = int(np.ravel_multi_index(place, drawn_shape)) if drawn_shape else 0
    draws = [
        mask.Draw(1, parameter.seed, int(step), parameter.index, parameter.keep_prob, offset)
        for step in updates
    ]
    return np.array([bool(kept) for kept in mask.draw_many(draws)], np.bool_)


# What is known of a run


def read_trajectories(run_dir: Path) -> Trajectories:
    """Read what a run says of its lrs and masks.

    Raises:
        UserError: it has no checkpoint, or its network cannot be built here.
    """
    history = read_history(run_dir)
    if not history.checkpoints:
        raise UserError(f"{run_dir}: has no valid checkpoint, which says how its masks are drawn")
    records = read_records(run_dir)
    num_steps = max(max(records, default=0), history.last_step)
    notes: list[str] = []

    segments = _build_segments(history, num_steps)
    is_skipped = _find_skipped(records, num_steps, notes)
    lrs = _find_lrs(history, records, segments, num_steps, notes)
    previous = None
    for segment in segments:
        _count_updates(history, segment, previous, lrs, is_skipped, notes)
        previous = segment
    return Trajectories(segments, num_steps, lrs, is_skipped, notes)


def _build_segments(history: RunHistory, num_steps: int) -> list[Segment]:
    """The steps of a run by the recipes that took them."""
    bounds = [0]
    begins = {start.step for start in history.starts} | {history.last_step}
    bounds += [step for step in sorted(begins) if 0 < step < num_steps and history.changes_at(step)]
    segments = []
    for first, last in itertools.pairwise([*bounds, num_steps]):
        recipe = recipes.parse(history.recipe_at(first), history.name)
        parameters = build_parameters(recipe, history)
        segments.append(Segment(first, last, recipe, parameters))
    return segments


def build_parameters(recipe: recipes.Recipe, history: RunHistory) -> dict[str, Parameter]:
    """Build network and optimizer, and read the settings of the masks from its groups."""
    config = store.read_config_file(history.checkpoints[history.last_step])
    num_classes = int(config.get("num_labels") or recipe.model.num_classes or 0)
    if not num_classes:
        raise UserError(
            f"{history.name}: was written by a version of lrd whose checkpoints do not say how "
            "many classes there are; set model.num_classes in its recipe.yaml"
        )
    network = build_model(recipe.model, num_classes, recipe.seed)
    optimizer = build_optimizer(network, recipe)
    return describe_parameters(network, optimizer)


def describe_parameters(network: nn.Module, optimizer: Optimizer) -> dict[str, Parameter]:
    """All parameters that an optimizer steps, by name."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = optimizer.param_groups
    has_dropout = get_lr_dropout(optimizer) is not None
    indices = [[0] * len(group["params"]) for group in groups]  # without masks they mean nothing
    if has_dropout:
        indices = group_settings.mask_indices(groups)

    parameters = {}
    for group, group_indices in zip(groups, indices, strict=True):
        for tensor, index in zip(group["params"], group_indices, strict=True):
            name = names[id(tensor)]
            parameters[name] = Parameter(
                name=name,
                shape=tuple(tensor.shape),
                group=group["name"],
                lr_group=group.get("split_from", group["name"]),
                index=index,
                keep_prob=float(group["keep_prob"]) if has_dropout else 1.0,
                seed=int(group["mask_seed"]) if has_dropout else None,
                granularity=group["mask_granularity"] if has_dropout else "element",
            )
    order = {name: number for number, name in enumerate(names.values())}
    return dict(sorted(parameters.items(), key=lambda item: order[item[0]]))


def _find_skipped(records: Records, num_steps: int, notes: list[str]) -> NDArray[np.bool_]:
    """Which steps were skipped because they were not finite, from the count in the records."""
    is_skipped = np.zeros(num_steps, np.bool_)
    count = 0.0
    counted_at = 0
    for step in sorted(step for step, values in records.items() if SKIPPED_TAG in values):
        num_new = int(records[step][SKIPPED_TAG] - count)
        if num_new > 0:
            is_skipped[step - 1] = True
        if num_new > 1 or (num_new == 1 and not _was_skipped(records[step])):
            notes.append(
                f"{num_new} of the steps {counted_at + 1} to {step} were skipped, and the records "
                "do not say which: they were written by a former version of lrd"
            )
        count = records[step][SKIPPED_TAG]
        counted_at = step
    return is_skipped


def _was_skipped(values: Mapping[str, float]) -> bool:
    """Whether the records of a step are those of one that was skipped."""
    loss = values.get("train/loss")
    norm = values.get("train/grad_norm", 0.0)
    # In steps whose other scalars are not recorded, the count is recorded where it changes.
    return loss is None or not math.isfinite(loss) or not math.isfinite(norm)


def _find_lrs(
    history: RunHistory,
    records: Records,
    segments: Sequence[Segment],
    num_steps: int,
    notes: list[str],
) -> dict[str, NDArray[np.float64]]:
    """The lr of each group at each step: as it was recorded, or as the schedule says."""
    groups = {parameter.group for segment in segments for parameter in segment.parameters.values()}
    lrs = {group: np.full(num_steps, np.nan) for group in sorted(groups)}
    for step, values in records.items():
        for group in groups:
            if f"lr/{group}" in values and 0 < step <= num_steps:
                lrs[group][step - 1] = values[f"lr/{group}"]

    for segment in segments:
        steps = slice(segment.first, segment.last)
        if not any(np.isnan(lrs[group][steps]).any() for group in groups):
            continue
        _fill_from_schedule(history, segment, lrs, notes)
    return lrs


def _fill_from_schedule(
    history: RunHistory,
    segment: Segment,
    lrs: dict[str, NDArray[np.float64]],
    notes: list[str],
) -> None:
    """Fill in the lrs of steps that were not recorded (`tracking.every_steps`)."""
    steps_per_epoch = _steps_per_epoch(history)
    # A start may have had a smaller `max_steps` than the one after it.
    trainer = segment.recipe.trainer.model_copy(update={"max_steps": None})
    recipe = segment.recipe.model_copy(update={"trainer": trainer})
    computed = None if steps_per_epoch is None else lr_trajectory(recipe, steps_per_epoch)
    lr_groups = {parameter.group: parameter.lr_group for parameter in segment.parameters.values()}
    for group, lr_group in lr_groups.items():
        window = lrs[group][segment.first : segment.last]  # a view
        is_missing = np.isnan(window)
        if computed is not None and lr_group in computed:
            values = np.array(computed[lr_group], np.float64)[segment.first : segment.last]
            values = np.pad(values, (0, len(window) - len(values)), constant_values=np.nan)
            known = ~is_missing
            if np.array_equal(window[known].astype(np.float32), values[known].astype(np.float32)):
                window[is_missing] = values[is_missing]
                continue
        # ReduceLROnPlateau never raises the lr.
        is_monotonic = segment.recipe.schedule.name == "ReduceLROnPlateau"
        if not (is_monotonic and _fill_between_equal(window)):
            notes.append(
                f"group {group}: between recorded steps the lr is not known, because it follows "
                "from results or was changed by hand; `lrd replay` computes it"
            )


def _fill_between_equal(window: NDArray[np.float64]) -> bool:
    """Fill in steps between two that have the same lr. Returns whether all are known then."""
    known = np.flatnonzero(~np.isnan(window))
    for before, after in itertools.pairwise(known.tolist()):
        if window[before] == window[after]:
            window[before:after] = window[before]
    return not np.isnan(window).any()


def _steps_per_epoch(history: RunHistory) -> int | None:
    """As the newest checkpoint says, or else as the epochs in `metrics.csv` do."""
    saved = history.trainers[history.last_step].get("steps_per_epoch")
    if isinstance(saved, int) and saved > 0:
        return saved
    rows = read_rows(history.run_dir / "metrics.csv", 1)
    second = [int(row["step"]) for row in rows if row["epoch"] == 2.0]
    first = [int(row["step"]) for row in rows if row["epoch"] == 1.0]
    if first and second and second[0] == first[-1] + 1:
        return first[-1]
    return None


def _count_updates(
    history: RunHistory,
    segment: Segment,
    previous: Segment | None,
    lrs: dict[str, NDArray[np.float64]],
    is_skipped: NDArray[np.bool_],
    notes: list[str],
) -> None:
    """Count the updates of each group before each step of a segment: the masks' position.

    A step does not count if it was skipped, nor in a group whose lr was zero.

    Args:
        previous: the segment before it, which is counted; None: it is the first.
    """
    groups = {parameter.group for parameter in segment.parameters.values()}
    steps = slice(segment.first, segment.last)
    for group in groups:
        counts = ~is_skipped[steps] & (lrs[group][steps] != 0.0)  # an unknown lr is taken to count
        before = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        total = int(counts.sum())

        base = 0  # updates before the segment
        if previous is not None and group in previous.updates:
            last = segment.first - 1
            last_counts = not is_skipped[last] and lrs[group][last] != 0.0
            base = int(previous.updates[group][-1]) + int(last_counts)
        elif previous is not None:  # a new group begins where it would be by now
            base = segment.first
        anchors = _saved_counts(history, segment, group)
        for step, saved in anchors.items():
            counted = int(before[step - segment.first]) if step < segment.last else total
            if step == min(anchors) and segment.first > 0:
                base = saved - counted  # a start with another recipe may have begun to count anew
            elif saved != base + counted:
                notes.append(
                    f"group {group}: the checkpoint of step {step} counts {saved} updates, by the "
                    f"records it is {base + counted}; its elements may be wrong from there on"
                )
        segment.updates[group] = base + before


def _saved_counts(history: RunHistory, segment: Segment, group: str) -> dict[int, int]:
    """The update counts of a group in the checkpoints of a segment, by step."""
    counts = {}
    for step, path in history.checkpoints.items():
        if not segment.first < step <= segment.last:
            continue
        for saved in store.read(path).optimizer["optimizer"]["param_groups"]:
            if saved.get("name") == group and "mask_step" in saved:
                counts[step] = int(saved["mask_step"])
    return counts


def write_probes(result: ProbeResult, out: Path) -> None:
    """Record the lrs for TensorBoard, with the tags that the run's own probes have."""
    out.mkdir(parents=True, exist_ok=True)
    events = EventFile(out, purge_step=0)
    for probed in result.probed:
        for number, lr in enumerate(probed.lrs, start=1):
            if not np.isnan(lr):
                events.add(scalar(f"probes/{probed.label}", float(lr)), number)  # type: ignore[no-untyped-call]
    events.flush()
