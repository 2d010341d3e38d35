"""A vision transformer: patches, pre-norm, GELU, layer scale, classified from the mean token."""

import torch
import torch.nn.functional as F
from torch import nn


class Patches(nn.Module):
    def __init__(self, width, size=16, image=224):
        super().__init__()
        self.project = nn.Conv2d(3, width, size, stride=size)
        self.positions = nn.Parameter(torch.zeros(1, (image // size) ** 2, width))

    def forward(self, images):
        patches = self.project(images).flatten(2).transpose(1, 2)
        return patches + self.positions


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.output(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width, ratio=4):
        super().__init__()
        self.rise = nn.Linear(width, ratio * width)
        self.fall = nn.Linear(ratio * width, width)

    def forward(self, x):
        x = self.rise(x)
        x = F.gelu(x, approximate="tanh")
        return self.fall(x)


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.scale1 = nn.Parameter(torch.full((width,), 1e-2))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.scale2 = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x):
        x = x + self.scale1 * self.attention(self.norm1(x))
        x = x + self.scale2 * self.mlp(self.norm2(x))
        return x


class ViT(nn.Module):
    def __init__(self, width=384, depth=2, heads=6, classes=1000):
        super().__init__()
        self.patches = Patches(width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images, labels):
        tokens = self.patches(images)
        tokens = self.layers(tokens)
        features = self.norm(tokens).mean(1)
        scores = self.head(features)
        return F.cross_entropy(scores, labels)


def make():
    batch = 64
    images = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16)
    labels = torch.zeros(batch, dtype=torch.long)
    return ViT().bfloat16(), (images, labels)
