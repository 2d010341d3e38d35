"""The diffusion model of :mod:`bench.models`: a UNet that predicts the noise in an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """Shapes of a UNet; ``batch`` and ``side`` are those of its measuring batch."""

    width: int = 64
    levels: tuple[int, ...] = (1, 2, 4)  # channels at each resolution, as multiples of ``width``
    depth: int = 2  # residual blocks at each resolution, on the way down
    heads: int = 4
    groups: int = 8
    side: int = 64
    batch: int = 16


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the time embedding is added in between."""

    def __init__(self, inner: int, outer: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(y))) + self.skip(x)
        return out


class ImageAttention(nn.Module):
    """Self-attention over all pixels."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        y = F.scaled_dot_product_attention(*qkv.unbind(1))
        out: Tensor = x + self.proj(y.transpose(-1, -2).reshape(b, c, h, w))
        return out


def twice(x: Tensor) -> Tensor:
    """Every pixel four times."""
    b, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


class UNet(nn.Module):
    """Down and up again, what went down concatenated on the way up; attention at the lowest resolution.

    Inputs are four planes: the noisy image, and the time in [0, 1] at every pixel.
    """

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        widths = [c.width * level for level in c.levels]
        time, low = 4 * c.width, widths[-1]
        self.width = c.width
        self.time = nn.Sequential(nn.Linear(c.width, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, c.width, 3, padding=1)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        kept, inner = [c.width], c.width
        for level, width in enumerate(widths):
            for _ in range(c.depth):
                down.append(ResBlock(inner, width, time, c.groups))
                inner = width
                kept.append(width)
            if level < len(widths) - 1:
                down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle1, self.middle2 = (ResBlock(low, low, time, c.groups) for _ in range(2))
        self.attention = ImageAttention(low, c.heads, c.groups)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(c.depth + 1):
                up.append(ResBlock(inner + kept.pop(), width, time, c.groups))
                inner = width
            if level:
                up.append(nn.Conv2d(width, width, 3, padding=1))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm, self.head = nn.GroupNorm(c.groups, inner), nn.Conv2d(inner, 3, 3, padding=1)

    def forward(self, planes: Tensor) -> Tensor:
        x, when = planes[:, :3], planes[:, 3, 0, 0]
        frequencies = torch.exp(torch.arange(self.width // 2, device=x.device) * (-8 / self.width))
        angles = 2 * math.pi * when[:, None].float() * frequencies
        time = self.time(torch.cat((angles.sin(), angles.cos()), 1).to(x.dtype))
        x = self.stem(x)
        kept = [x]
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
            kept.append(x)
        x = self.middle2(self.attention(self.middle1(x, time)), time)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                x = layer(torch.cat((x, kept.pop()), 1), time)
            else:
                x = layer(twice(x))
        noise: Tensor = self.head(F.silu(self.norm(x)))
        return noise
