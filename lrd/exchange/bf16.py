"""Gradients in bfloat16 on the wire: half the bytes of an all-reduce."""

from typing import Any

import torch
import torch.distributed as dist

# DDP compares a hook's annotations with these very types, so this file must not turn annotations
# into strings by `from __future__ import annotations`.


def bf16_all_reduce_hook(
    _: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DDP: the mean over the ranks, summed and rounded in bfloat16.

    torch's own `bf16_compress_hook` does the same, but DDP refuses it by its name on gloo.

    Args:
        bucket: a bucket of gradients, float32; they are replaced by the mean.
    """
    gradients = bucket.buffer()  # float32 (bucket's elements,)
    compressed = gradients.to(torch.bfloat16).div_(dist.get_world_size())

    work = dist.all_reduce(compressed, async_op=True)
    reduced: torch.futures.Future[list[torch.Tensor]] = work.get_future()
    return reduced.then(lambda future: gradients.copy_(future.value()[0]))
