"""ResNets with the CIFAR stem: torchvision's residual blocks behind a 3x3 stride-1 convolution and no max-pool.

Parameters have torchvision's names, so weights go back and forth by name (but for the stem and, with another number of
classes, the last layer, whose shapes differ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrd import recipe as recipes
from lrd.vision import torchvision

_blocks = torchvision.models.resnet
ARCHITECTURES = {
    "resnet18": (_blocks.BasicBlock, (2, 2, 2, 2)),
    "resnet34": (_blocks.BasicBlock, (3, 4, 6, 3)),
    "resnet50": (_blocks.Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """Residual network for small images (He et al., arXiv 1512.03385, with projection shortcuts).

    Args:
        arch: `resnet18`, `resnet34` or `resnet50`.
        num_classes: size of the output.
        width: channels of the stem; the four stages have width, 2, 4 and 8 times as many planes.

    Input: float tensor (N, 3, H, W). Output: logits (N, num_classes).
    """

    def __init__(self, arch: str = "resnet34", num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        block, depths = ARCHITECTURES[arch]
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1, channels = _stage(block, width, width, depths[0], stride=1)
        self.layer2, channels = _stage(block, channels, 2 * width, depths[1], stride=2)
        self.layer3, channels = _stage(block, channels, 4 * width, depths[2], stride=2)
        self.layer4, channels = _stage(block, channels, 8 * width, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(block: Any, channels: int, planes: int, depth: int, stride: int) -> tuple[nn.Sequential, int]:
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    blocks = [block(channels, planes, stride, shortcut), *(block(out, planes) for _ in range(depth - 1))]
    return nn.Sequential(*blocks), out


def build_model(section: recipes.Model, num_classes: int, seed: int) -> nn.Module:
    """The network a recipe names, on the CPU, its weights a function of `seed` alone."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's generator too
    model: nn.Module = ResNet(section.arch, section.num_classes or num_classes, section.width)
    torch.set_rng_state(state)
    return model
