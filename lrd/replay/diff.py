"""What differs between two runs, down to the first step, tensor and element.

Recipes, versions, data and records are compared by the files of the runs. Then both are computed
again from the newest checkpoint in which they are equal, with a digest of each tensor after each
step. Nothing needs to have been written down when they were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.starts import RECIPE_SECTIONS
from lrd.replay import records as run_records
from lrd.replay.computing import state as states
from lrd.replay.computing.launching import Found, compute, read_dump, scratch_folder
from lrd.replay.computing.plan import Watch
from lrd.replay.computing.state import Difference
from lrd.replay.history import RunHistory, differing_values, read_history
from lrd.replay.records import RecordDifference, read_records

# Settings in which two runs always differ.
_OF_EACH_RUN = {"run_dir"}


@dataclass
class RunDiff:
    """What differs between two runs.

    Attributes:
        settings: key of the recipe -> both values.
        circumstances: what else differs: versions, ranks, threads, processor, own source files.
        data: both fingerprints, if they differ; else None.
        record: the first record that differs; None if none does.
        checkpoint: the first step whose checkpoints differ; None if none do.
        equal_until: steps after which both are known to be equal, by checkpoints or by ancestry;
            from there they are computed again.
        common_steps: how many steps both have done.
        replayed: the last step up to which both were computed again; None: neither was.
        step: the first step after which the computed states differ; None if none does.
        difference: the first tensor and element that differs then.
        not_reproduced: a line for each run whose records are not what it computes now.
        notes: what the runs lack.
    """

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    circumstances: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    data: tuple[str, str] | None = None
    record: RecordDifference | None = None
    checkpoint: int | None = None
    equal_until: int = 0
    common_steps: int = 0
    replayed: int | None = None
    step: int | None = None
    difference: Difference | None = None
    not_reproduced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def are_equal(self) -> bool:
        """Whether records and states are the same as far as both runs go."""
        return self.record is None and self.checkpoint is None and self.step is None

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["equal"] = self.are_equal
        values["record"] = None if self.record is None else self.record.as_json()
        values["difference"] = None if self.difference is None else self.difference.as_json()
        return values


def diff(first: Path, second: Path, replays: bool = True, overrides: Sequence[str] = ()) -> RunDiff:
    """Compare two runs.

    Args:
        first, second: the run directories.
        replays: whether steps are computed again where records or checkpoints differ.
        overrides: settings that must differ here, such as `data.root`.

    Raises:
        UserError: a run cannot be read, or cannot be computed here.
    """
    histories = (read_history(first, overrides), read_history(second, overrides))
    result = RunDiff()
    compare_files(histories, result)
    result.checkpoint = _compare_checkpoints(histories, result)

    bounds = [step for step in (result.checkpoint, _step_of(result.record)) if step is not None]
    if not bounds or not replays:
        return result
    last = min(bounds)
    begin = max(history.first_step for history in histories)
    if last <= begin:
        result.notes.append(
            f"steps up to {begin} are not computed again: a run was forked there, and its first "
            "steps are those of its parent"
        )
        return result
    if last <= result.equal_until:  # a record of a step that both have in common was changed
        earlier = [step for step in _common_checkpoints(histories) if step < last]
        result.equal_until = max([begin, *earlier])
    locate(histories, last, result)
    return result


def _step_of(record: RecordDifference | None) -> int | None:
    return None if record is None else record.step


def compare_files(histories: tuple[RunHistory, RunHistory], result: RunDiff) -> None:
    """Compare recipes, circumstances, data and records."""
    one, other = histories
    result.notes = [*one.notes, *other.notes, *one.damaged, *other.damaged]

    settings = [_flat_settings(history) for history in histories]
    result.settings = differing_values(*settings)
    circumstances = [_last_circumstances(history) for history in histories]
    result.circumstances = differing_values(*circumstances)

    fingerprints = [_fingerprint(history) for history in histories]
    if None not in fingerprints and fingerprints[0] != fingerprints[1]:
        result.data = (str(fingerprints[0]), str(fingerprints[1]))

    all_records = [read_records(history.run_dir) for history in histories]
    last_steps = [max(records, default=0) for records in all_records]
    result.common_steps = min(last_steps)
    result.record = run_records.find_difference(
        all_records[0],
        all_records[1],
        range(1, result.common_steps + 1),
        # Runs that record or evaluate at other steps may take the same ones.
        only_common=bool(result.settings),
    )


def _flat_settings(history: RunHistory) -> dict[str, Any]:
    """All settings of the recipe of the last start, as `section.key` -> value."""
    values = recipes.parse(history.recipe_at(history.last_step), history.name).model_dump(
        mode="json"
    )
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": setting for name, setting in value.items()}
        elif key not in _OF_EACH_RUN:
            flat[key] = value
    return flat


def _last_circumstances(history: RunHistory) -> dict[str, Any]:
    start = history.start_at(history.last_step)
    if start is None:
        return {}
    facts = dict(start.circumstances)
    versions = facts.pop("versions", {})
    sources = facts.pop("sources", {})
    facts = {key: value for key, value in facts.items() if key not in RECIPE_SECTIONS}
    return {**facts, **versions, **sources}


def _fingerprint(history: RunHistory) -> str | None:
    if not history.checkpoints:
        return None
    identity = history.trainers[history.last_step].get("identity", {})
    fingerprint = identity.get("data.fingerprint")
    return None if fingerprint is None else str(fingerprint)


def _common_checkpoints(histories: tuple[RunHistory, RunHistory]) -> list[int]:
    return sorted(histories[0].checkpoints.keys() & histories[1].checkpoints.keys())


def _compare_checkpoints(histories: tuple[RunHistory, RunHistory], result: RunDiff) -> int | None:
    """Find up to where checkpoints are equal.

    Returns:
        The first step whose checkpoints differ; None if none do.
    """
    # A fork has its ancestors' records: where they equal those of the other run, so does its state.
    result.equal_until = max(history.first_step for history in histories)
    for step in _common_checkpoints(histories):
        named = [
            states.keep_tensors(states.name_values(store.read(history.checkpoints[step])))
            for history in histories
        ]
        if states.find_difference(*named) is not None:
            return step
        result.equal_until = max(result.equal_until, step)
    return None


def locate(histories: tuple[RunHistory, RunHistory], last: int, result: RunDiff) -> None:
    """Compute both runs again up to a step, and find where their states begin to differ.

    The step is found by digests. Once it is known, both are computed again up to it: to keep all
    tensors of all steps would take far more memory.
    """
    result.replayed = last
    first = result.equal_until
    watch = Watch(digests=True, records=True)
    found = [_replay(history, first, last, watch)[0] for history in histories]

    for step in range(first + 1, last + 1):
        digests = [each.digests[step] for each in found]
        if digests[0] != digests[1]:
            result.step = step
            break
    else:
        result.not_reproduced = [
            line
            for history, each in zip(histories, found, strict=True)
            for line in _describe_unreproduced(history, each, first, last)
        ]
        return

    watch = Watch(dump_at=result.step)
    dumps = [_replay(history, first, result.step, watch)[1] for history in histories]
    result.difference = states.find_difference(*map(states.keep_tensors, dumps))


def _replay(
    history: RunHistory, first: int, last: int, watch: Watch
) -> tuple[Found, dict[str, Any]]:
    """Compute steps of a run again.

    Returns:
        What was found, and the state that was asked for, if one was.
    """
    legs = history.legs(first, last)
    if last in history.checkpoints:
        legs[-1].expected = str(history.checkpoints[last])
    with scratch_folder(history.run_dir) as out:
        found = compute(legs, watch, out, history.name)
        return found, read_dump(out) if watch.dump_at is not None else {}


def _describe_unreproduced(history: RunHistory, found: Found, first: int, last: int) -> list[str]:
    """A line for what a run has recorded or saved and does not compute now."""
    lines = []
    recorded = read_records(history.run_dir)
    record = run_records.find_difference(recorded, found.records, range(first + 1, last + 1))
    if record is not None:
        lines.append(f"{history.name}: {record.describe()}, recorded and computed again")
    for compared in found.compared:
        if compared["text"] is not None:
            lines.append(
                f"{history.name}: checkpoint of step {compared['step']}: {compared['text']}, "
                "computed again and saved"
            )
    return lines
