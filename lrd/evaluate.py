"""The test set over all ranks, each sample counted once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lrd.data import Images
from lrd.distributed import any_signal, make_buffers_equal


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    images: Images,
    normalized: Callable[[Tensor], Tensor],
    batch_size: int,
    received: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """Mean loss and accuracy over `images`.

    Each rank takes a contiguous part, the last batch as short as it comes; only sums travel. The network is unwrapped:
    DDP's forward would wait for ranks that have a batch fewer.

    Args:
        model: the network; its buffers are made equal to rank 0's first.
        normalized: pixels uint8 (N, 3, H, W) -> network input.
        batch_size: samples of one forward pass on one rank.
        received: the stop signal that this rank got; 0: none.

    Returns:
        `loss` (mean cross-entropy, nats) and `accuracy` in [0, 1], the same on every rank; None where a rank got a stop
        signal and all gave up together.
    """
    network = accelerator.unwrap_model(model)
    make_buffers_equal(network)
    network.eval()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    first, last = (len(images) * r // world_size for r in (rank, rank + 1))
    rounds = -(-len(images) // (world_size * batch_size))  # of the rank that has most
    every = 1 if images.labels.device.type == "cpu" else 20  # to ask for signals stalls a GPU
    sums = torch.zeros(3, dtype=torch.float64, device=images.labels.device)  # loss, correct, seen
    for number, start in enumerate(range(first, first + rounds * batch_size, batch_size)):
        if number % every == 0 and any_signal(accelerator, received()):
            network.train()
            return None
        part = slice(start, min(start + batch_size, last))
        labels = images.labels[part]
        if len(labels) == 0:
            continue
        with accelerator.autocast():
            logits = network(normalized(images.pixels[part]))
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack(
            [loss.double(), (logits.argmax(1) == labels).sum().double(), sums.new_full((), len(labels))]
        )
    network.train()
    loss_sum, correct, seen = accelerator.reduce(sums, reduction="sum").tolist()
    assert seen == len(images)
    return {"loss": loss_sum / seen, "accuracy": correct / seen}
