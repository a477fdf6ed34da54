"""Random changes to one training image, by torchvision's transforms.

They draw from torch's global generator. It is seeded from the sample's position before each image,
so the changes are a function of (seed, epoch, index).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.decoding import Region
from lrd.torchvision_compat import declare_missing_operators


class Augmentation:
    """What `data.augment` and the keys beside it do to an image of any size.

    On the same draws the result is that of
    `Compose([RandomResizedCrop(size), RandomHorizontalFlip(), TrivialAugmentWide(),
    RandomErasing()])` of torchvision's `transforms.v2` on the decoded uint8 image, as far as the
    recipe asks for these. Only a crop that is decoded at a reduced scale differs.

    Args:
        section: the `data` section of the recipe.
        size: height and width of the result, in pixels.
        mean: of each channel, from 0 to 255; what is erased gets this colour.
    """

    def __init__(self, section: recipes.Data, size: int, mean: list[float]) -> None:
        declare_missing_operators()
        from torchvision.transforms import v2  # only here: its import takes a while

        self.size = size
        self.crops = section.augment == "resized_crop"
        self._crop = v2.RandomResizedCrop(size, scale=(section.crop_scale, 1.0), antialias=True)
        self._resize = v2.functional.resize

        changes: list[v2.Transform] = []
        if self.crops:
            changes.append(v2.RandomHorizontalFlip())
        if section.trivial_augment:
            changes.append(v2.TrivialAugmentWide())
        if section.random_erasing:
            colour = [float(round(value)) for value in mean]
            changes.append(v2.RandomErasing(section.random_erasing, value=colour))
        self._change = v2.Compose(changes) if changes else None

    def choose_region(self, height: int, width: int) -> Region:
        """Draw the region that is cut out of an image."""
        image = torch.empty((3, height, width), dtype=torch.uint8, device="meta")
        drawn = self._crop.make_params([image])
        return Region(drawn["top"], drawn["left"], drawn["height"], drawn["width"])

    def finish(self, pixels: Tensor) -> Tensor:
        """Resize a region to the size of the result, and change it further.

        Args:
            pixels: uint8 (3, height, width), of any height and width.

        Returns:
            uint8 (3, size, size).
        """
        if pixels.shape[1:] != (self.size, self.size):
            pixels = self._resize(pixels, [self.size, self.size], antialias=True)
        if self._change is not None:
            pixels = self._change(pixels)
        return pixels
