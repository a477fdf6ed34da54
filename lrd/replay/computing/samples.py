"""Which images each rank saw at a step, as the network saw them: functions of the position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrd.data.batches import TrainingBatches
from lrd.job.setup import build_batches
from lrd.job.state import Job

FILE_NAME = "samples.pt"
MAX_IMAGES = 32  # of a rank in a step


def save_samples(job: Job, samples: list[tuple[int, int]], out: Path) -> None:
    """Save the images of some steps, of all ranks.

    Args:
        job: of one rank, which makes the batches of all.
        samples: the numbers of the steps, from 1, each with the number of ranks that took it.
        out: the folder that gets `samples.pt`.
    """
    rows: list[dict[str, Any]] = []
    ranks = {(rank, size) for _, size in samples for rank in range(size)}
    for rank, world_size in sorted(ranks):
        batches = build_batches(
            job.dataset.train,
            job.recipe,
            num_classes=job.recipe.model.num_classes or len(job.dataset.classes),
            rank=rank,
            world_size=world_size,
        )
        try:
            for step in [step for step, size in samples if size == world_size]:
                rows.append({"step": step, "rank": rank, **_read(batches, step, job)})
        finally:
            batches.close()

    rows.sort(key=lambda row: (row["step"], row["rank"]))
    torch.save({"rows": rows, "classes": list(job.dataset.classes)}, out / FILE_NAME)


def _read(batches: TrainingBatches, step: int, job: Job) -> dict[str, Any]:
    """A rank's images of a step, all its micro steps together.

    Returns:
        `indices`, in the training set, and `labels` of all images; and `pixels`, uint8
        (at most MAX_IMAGES, 3, H, W), of the first.
    """
    indices: list[int] = []
    labels: list[int] = []
    pixels: list[Tensor] = []
    for micro_step in range(job.recipe.trainer.accumulation_steps):
        inputs, targets = batches.micro_batch(step - 1, micro_step)
        indices += batches.indices(step - 1, micro_step).tolist()
        if targets.is_floating_point():  # mixed: the class that has most of it
            targets = targets.argmax(1)
        labels += targets.tolist()

        shown = inputs[: MAX_IMAGES - sum(len(images) for images in pixels)]
        scaled = shown * batches.std + batches.mean  # float32 (images, 3, H, W), 0 to 255
        pixels.append(scaled.round().clamp(0, 255).to(torch.uint8).cpu())
    return {"indices": indices, "labels": labels, "pixels": torch.cat(pixels)}
