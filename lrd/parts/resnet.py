"""ResNets with the CIFAR stem: torchvision's blocks behind a 3x3 convolution without max-pool.

Parameters have torchvision's names, so weights can be exchanged by name, except those of the stem
and, with another number of classes, of the last layer, whose shapes differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrd.host import require_memory
from lrd.torchvision_compat import torchvision

_resnet = torchvision.models.resnet

# Name -> residual block, and how many of them each of the four stages has.
ARCHITECTURES = {
    "resnet18": (_resnet.BasicBlock, (2, 2, 2, 2)),
    "resnet34": (_resnet.BasicBlock, (3, 4, 6, 3)),
    "resnet50": (_resnet.Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """Residual network for small images (He et al., arXiv 1512.03385, projection shortcuts).

    Input: float tensor (N, 3, H, W). Output: logits (N, num_classes).

    Args:
        arch: `resnet18`, `resnet34` or `resnet50`.
        num_classes: size of the output.
        width: channels of the stem; the four stages have 1, 2, 4 and 8 times as many planes.
    """

    def __init__(self, arch: str = "resnet34", num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        block, depths = ARCHITECTURES[arch]

        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

        self.layer1, channels = _build_stage(block, width, width, depths[0], stride=1)
        self.layer2, channels = _build_stage(block, channels, 2 * width, depths[1], stride=2)
        self.layer3, channels = _build_stage(block, channels, 4 * width, depths[2], stride=2)
        self.layer4, channels = _build_stage(block, channels, 8 * width, depths[3], stride=2)

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

        # As torchvision does it; the other layers keep torch's initial weights.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes)
        x = self.relu(self.bn1(self.conv1(x)))  # (N, width, H, W)

        x = self.layer1(x)
        x = self.layer2(x)  # (N, 2 * width * expansion, H / 2, W / 2), and so on
        x = self.layer3(x)
        x = self.layer4(x)

        x = torch.flatten(self.avgpool(x), 1)  # (N, 8 * width * expansion)
        logits: Tensor = self.fc(x)
        return logits


def _build_stage(
    block: Any, channels: int, planes: int, depth: int, stride: int
) -> tuple[nn.Sequential, int]:
    """A stage of `depth` blocks, and the number of channels that it puts out.

    Args:
        block: torchvision's class of residual block.
        channels: number of channels that come in.
        planes: channels of the block's 3x3 convolutions.
        depth: number of blocks.
        stride: of the first block; the others have stride 1.
    """
    out_channels = planes * block.expansion

    # The first block's shortcut is a projection if it changes the shape.
    shortcut = None
    if stride != 1 or channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    blocks = [block(channels, planes, stride, shortcut)]
    for _ in range(depth - 1):
        blocks.append(block(out_channels, planes))
    return nn.Sequential(*blocks), out_channels


def require_memory_of_resnet(arch: str, num_classes: int, width: int) -> None:
    """Refuse a network whose weights this host cannot hold, before they are drawn.

    Raises:
        UserError: there is not enough memory; it names the key that is too large.
    """
    # Blocks with p planes have at least 14 p^2 (BasicBlock) or 17 p^2 (Bottleneck) weights.
    block, depths = ARCHITECTURES[arch]
    weights_by_planes = 14 if block.expansion == 1 else 17
    blocks_bytes = 0
    for stage, depth in enumerate(depths):
        planes = width << stage
        blocks_bytes += 4 * depth * weights_by_planes * planes * planes
    fc_bytes = 4 * 8 * width * block.expansion * num_classes

    key = f"model.num_classes: is {num_classes}"
    if blocks_bytes > fc_bytes:
        key = f"model.width: is {width}"
    require_memory(2 * (blocks_bytes + fc_bytes), key, f"{arch} and its gradients")
