"""Training batches from images in memory, or from those that worker processes read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrd import recipe as recipes
from lrd.data.batches import Batches
from lrd.data.images import Images, Part
from lrd.data.mixing import build_mixing

if TYPE_CHECKING:
    from lrd.data.streaming.streamed import StreamedBatches

    AnyBatches = Batches | StreamedBatches
else:
    AnyBatches = Any  # what streams is imported only where it is used


def build_batches(
    images: Part, recipe: recipes.Recipe, num_classes: int, rank: int, world_size: int
) -> AnyBatches:
    """The training batches of one rank.

    Args:
        images: the training images, on the training device.
        recipe: the recipe.
        num_classes: size of the network's output.
        rank: the rank whose part of each batch this is.
        world_size: the number of ranks.

    Raises:
        UserError: the batch cannot be split evenly, or it is larger than the training set.
    """
    mixing = build_mixing(recipe.data, num_classes, recipe.seed)
    accumulation_steps = recipe.trainer.accumulation_steps
    if isinstance(images, Images):
        return Batches(
            images, recipe.data, recipe.seed, rank, world_size, accumulation_steps, mixing
        )

    from lrd.data.streaming.streamed import StreamedBatches, StreamedImages

    assert isinstance(images, StreamedImages)
    return StreamedBatches(
        images,
        recipe.data.batch_size,
        recipe.seed,
        rank,
        world_size,
        accumulation_steps,
        mixing,
    )
