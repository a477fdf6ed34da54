"""Reads a run's event files as TensorBoard does.

The module must not be called `tensorboard`: scripts in this folder would import it instead of the
package.
"""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def load_events(run_dir: Path) -> EventAccumulator:
    """Load all event files of a run, with no limit on the number of records."""
    events = EventAccumulator(
        str(run_dir), size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0)
    )
    events.Reload()
    return events


def read_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the (step, value) pairs of each tag."""
    events = load_events(run_dir)
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
