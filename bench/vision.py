"""The vision models of :mod:`bench.models`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.language import GPTBlock, TransformerConfig


class ViT(nn.Module):
    """Vision transformer over ``seq`` patches and a class token: GPT-2's block without the mask."""

    def __init__(self, c: TransformerConfig, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, c.d, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, c.d))
        self.positions = nn.Parameter(torch.randn(1, c.seq + 1, c.d) * 0.02)
        self.blocks = nn.ModuleList(GPTBlock(c) for _ in range(c.layers))
        self.ln, self.head = nn.LayerNorm(c.d), nn.Linear(c.d, c.vocab)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.positions
        for block in self.blocks:
            x = block(x, causal=False)
        logits: Tensor = self.head(self.ln(x[:, 0]))
        return logits


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block."""

    def __init__(self, inner: int, outer: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.skip = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.skip(x))


class ResNet(nn.Module):
    """ResNet with bottleneck blocks; ``(3, 4, 6, 3)`` at width 64 is ResNet-50."""

    def __init__(self, depths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inner = [], width
        for stage, depth in enumerate(depths):
            planes = width << stage
            for i in range(depth):
                blocks.append(Bottleneck(inner, 4 * planes, planes, 2 if i == 0 and stage else 1))
                inner = 4 * planes
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(inner, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(images), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
