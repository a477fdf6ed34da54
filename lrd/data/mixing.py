"""Mixup and CutMix: each sample of a batch is mixed with the one before it.

torchvision's transforms do the work. They draw from torch's global generator, once for a whole
batch. It is seeded from the step before, so all ranks and micro steps draw the same, and a resume
draws what the run before it drew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrd import recipe as recipes
from lrd.data import positions
from lrd.errors import UserError
from lrd.torchvision_compat import declare_missing_operators

# Beyond these, torch's float32 draws from a Beta distribution are wrong, at last without an error:
# from Beta(1e-10, 1e-10) each is 0.5, which should be near 0 or 1.
_SMALLEST_ALPHA = 1e-3
_LARGEST_ALPHA = 1e3


class Mixing:
    """Mixes samples by mixup, by CutMix, or by one of the two, which is drawn for each step.

    On the same draws the result is that of torchvision's `transforms.v2.MixUp` or `CutMix` on the
    global batch of the step, or of `RandomChoice([MixUp, CutMix])`, cut into the parts of ranks
    and micro steps.

    Papers: mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899).

    Args:
        section: the `data` section of the recipe; its `mixup` or its `cutmix` is above 0.
        num_classes: size of the network's output.
        seed: the seed of the recipe.

    Raises:
        UserError: `mixup` or `cutmix` is a number from whose Beta distribution torch cannot draw.
    """

    def __init__(self, section: recipes.Data, num_classes: int, seed: int) -> None:
        _check_alpha("data.mixup", section.mixup)
        _check_alpha("data.cutmix", section.cutmix)

        declare_missing_operators()
        from torchvision.transforms import v2  # only here: its import takes a while

        transforms: list[v2.Transform] = []
        if section.mixup:
            transforms.append(v2.MixUp(alpha=section.mixup, num_classes=num_classes))
        if section.cutmix:
            transforms.append(v2.CutMix(alpha=section.cutmix, num_classes=num_classes))
        self._transform = transforms[0] if len(transforms) == 1 else v2.RandomChoice(transforms)
        self._seed = seed

    def mix(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix each sample but the first with the one before it.

        Args:
            inputs: normalized images, float32 (B + 1, 3, H, W).
            labels: int64 (B + 1,).
            step: from 0; it decides how much is mixed and, by CutMix, where.

        Returns:
            The mixed inputs, float32 (B, 3, H, W), and the probability of each class in them,
            float32 (B, classes).
        """
        with torch.random.fork_rng(devices=[]):  # all is drawn on the host
            # torch.manual_seed would also seed the GPUs, whose states are not restored here.
            torch.default_generator.manual_seed(positions.step_generator_seed(self._seed, step))
            mixed_inputs, mixed_labels = self._transform(inputs, labels)

        # torchvision sees the batch as a ring, and so mixed the first sample with the last.
        return mixed_inputs[1:], mixed_labels[1:]


def build_mixing(section: recipes.Data, num_classes: int, seed: int) -> Mixing | None:
    """What mixes the training samples as a recipe says; None if they stay as they are.

    Args:
        section, num_classes, seed: as for `Mixing`.

    Raises:
        UserError: as for `Mixing`.
    """
    if not section.mixup and not section.cutmix:
        return None
    return Mixing(section, num_classes, seed)


def _check_alpha(key: str, alpha: float) -> None:
    if alpha and not _SMALLEST_ALPHA <= alpha <= _LARGEST_ALPHA:
        raise UserError(
            f"{key}: is {alpha:g}, must be 0, or from {_SMALLEST_ALPHA:g} to {_LARGEST_ALPHA:g}"
        )
