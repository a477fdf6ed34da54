"""Accuracy and loss on the images that are not trained on, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lrd.data.images import Part
from lrd.distributed.communication import broadcast_buffers, gather_stop_signal
from lrd.job import sharding
from lrd.job.state import Job

_BATCHES_BETWEEN_SIGNAL_CHECKS_ON_GPU = 20  # each check makes the CPU wait for the GPU


def evaluate_parts(job: Job, stop_signal: Callable[[], int]) -> dict[str, float] | None:
    """Evaluate the network, and the average of its weights if there is one, on each part.

    Args:
        job: its test images are evaluated, and the images that were held out.
        stop_signal: returns the stop signal that this rank has received; 0: none.

    Returns:
        The same on every rank: `loss` and `accuracy` on the test images, `validation_loss` and
        `validation_accuracy` on the images held out, and the same with `ema_` before `loss` and
        `accuracy` for the average. None where a rank received a stop signal.
    """
    networks = {"": job.raw_model}
    if job.weight_average is not None:
        networks["ema_"] = job.weight_average.network

    metrics = {}
    for part, images in job.dataset.evaluated_parts.items():
        for weights_prefix, network in networks.items():
            results = evaluate(
                accelerator=job.accelerator,
                model=network,
                images=images,
                normalize=job.batches.normalize,
                batch_size=job.batches.batch_size,
                stop_signal=stop_signal,
            )
            if results is None:
                return None

            part_prefix = "" if part == "test" else f"{part}_"
            for name, value in results.items():
                metrics[f"{part_prefix}{weights_prefix}{name}"] = value
    return metrics


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    images: Part,
    normalize: Callable[[Tensor], Tensor],
    batch_size: int,
    stop_signal: Callable[[], int] = lambda: 0,
    observe: Callable[[Tensor, Tensor], None] = lambda logits, labels: None,
) -> dict[str, float] | None:
    """Mean loss and accuracy over `images`; each image counts once.

    Each rank evaluates a contiguous part of the images; its last batch may be short. Only sums are
    exchanged.

    Args:
        model: the network without DDP, whose forward would wait for ranks that have a batch
            fewer. Its buffers are first made equal to rank 0's.
        normalize: uint8 (N, 3, H, W) -> network input, float32 (N, 3, H, W).
        batch_size: samples of one forward pass on one rank.
        stop_signal: returns the stop signal that this rank has received; 0: none.
        observe: gets the logits, (batch, classes), and the labels, int64 (batch,), of each batch of
            this rank.

    Returns:
        `loss` (mean cross-entropy, nats) and `accuracy` in [0, 1], the same on every rank. None
        where a rank received a stop signal; then all ranks gave up together.
    """
    broadcast_buffers(model)

    # This rank's images: from `begin` to before `end`.
    rank = accelerator.process_index
    world_size = accelerator.num_processes
    begin = len(images) * rank // world_size
    end = len(images) * (rank + 1) // world_size

    # All ranks check for signals together, so all go through the loop as often as the one with most
    # images.
    num_batches = -(-len(images) // (world_size * batch_size))
    device = accelerator.device
    check_every = 1 if device.type == "cpu" else _BATCHES_BETWEEN_SIGNAL_CHECKS_ON_GPU

    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, seen
    model.eval()
    # Closed at the end: there may be processes that read ahead.
    with closing(images.read(begin, end, batch_size)) as batches:
        for batch in range(num_batches):
            if batch % check_every == 0 and gather_stop_signal(accelerator, stop_signal()):
                model.train()
                return None

            pixels, labels = next(batches, images.empty_batch())
            # The shards of a network are gathered by all ranks, also for a rank without images.
            if len(labels) == 0 and not sharding.is_sharded(model):
                continue

            with accelerator.autocast():
                logits = model(normalize(pixels))  # (batch, classes)
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            seen = sums.new_full((), len(labels))
            sums += torch.stack([loss.double(), correct.double(), seen])
            observe(logits, labels)

    model.train()
    loss_sum, num_correct, num_seen = accelerator.reduce(sums, reduction="sum").tolist()
    assert num_seen == len(images)
    return {"loss": loss_sum / num_seen, "accuracy": num_correct / num_seen}
