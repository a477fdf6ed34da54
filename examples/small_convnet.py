"""A network of few and wide layers for small images, which a recipe names as an own part:

    model: {arch: "examples.small_convnet:SmallConvNet", width: 64}

Start in the folder that contains `examples`. The shape is that of the networks of Jordan,
arXiv 2404.00498, without what they do beside it (whitening, test-time augmentation, and others).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Sequential):
    """Two convolutions; the first halves height and width by pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.GELU(),
        )


class SmallConvNet(nn.Module):
    """Input: float (N, 3, H, W), H and W at least 16. Output: logits (N, num_classes).

    Args:
        num_classes: size of the output.
        width: channels of the first block; the other two have four times as many.
        scale: of the logits, so that training starts with a small loss.
    """

    def __init__(self, num_classes: int, width: int = 64, scale: float = 1 / 9) -> None:
        super().__init__()
        # A 2x2 patch has 12 values, so 24 channels lose none of them.
        self.stem = nn.Sequential(nn.Conv2d(3, 24, kernel_size=2), nn.GELU())  # (N, 24, H - 1, ...)
        self.blocks = nn.Sequential(
            Block(24, width),  # (N, width, H / 2, W / 2), rounded down
            Block(width, 4 * width),
            Block(4 * width, 4 * width),
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes, bias=False)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.blocks(self.stem(images)))  # (N, 4 * width, 1, 1)
        logits: Tensor = self.fc(torch.flatten(features, 1)) * self.scale
        return logits
