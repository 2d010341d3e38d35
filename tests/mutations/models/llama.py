"""A Llama: rotary positions, grouped queries, SwiGLU; the feed-forward is checkpointed."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        scale = x.float().square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        return (x * scale.to(x.dtype)).to(self.weight.dtype) * self.weight


def rotary(length, size, device):
    frequencies = 10000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads, groups):
        super().__init__()
        self.size = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, -1, self.size).transpose(1, 2)
        k = self.k(x).view(batch, length, -1, self.size).transpose(1, 2)
        v = self.v(x).view(batch, length, -1, self.size).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate = self.gate(x)
        up = self.up(x)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, width, heads, groups, hidden):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, heads, groups)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        x = x + checkpoint(self.mlp, self.norm2(x), use_reentrant=False)
        return x


class Llama(nn.Module):
    def __init__(self, vocabulary=4096, width=512, layers=2, heads=8, groups=2, hidden=1536):
        super().__init__()
        self.size = width // heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            self.blocks.append(Block(width, heads, groups, hidden))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        cos, sin = rotary(ids.shape[1], self.size, ids.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def loss(logits):
    targets = logits.detach().argmax(-1).flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets)


def make():
    model = Llama()
    model.to(torch.bfloat16)
    batch, length = 4, 1024
    return model, (torch.randint(0, 4096, (batch, length)),), loss
