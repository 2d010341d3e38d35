"""GPT-2-style and Llama-style language models of :mod:`bench.models`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerConfig:
    """Shapes of a transformer; ``batch`` and ``seq`` are those of its measuring batch."""

    layers: int = 12
    d: int = 768
    heads: int = 12
    kv_heads: int = 12
    ff: int = 3072
    vocab: int = 8192
    seq: int = 1024
    batch: int = 8
    dropout: float = 0.0


# ---------------------------------------------------------------- GPT-2


class GPTBlock(nn.Module):
    """LayerNorm, fused qkv, causal attention, GELU."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.ln1, self.ln2 = nn.LayerNorm(c.d), nn.LayerNorm(c.d)
        self.qkv, self.proj = nn.Linear(c.d, 3 * c.d), nn.Linear(c.d, c.d)
        self.up, self.down = nn.Linear(c.d, c.ff), nn.Linear(c.ff, c.d)

    def attention(self, x: Tensor, causal: bool) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=drop)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(b, t, d)), self.dropout, self.training)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        x = x + self.attention(self.ln1(x), causal)
        y = self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """GPT-2: learned positions, tied to nothing, logits over ``vocab``."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.dropout = c.dropout
        self.tokens, self.positions = nn.Embedding(c.vocab, c.d), nn.Embedding(c.seq, c.d)
        self.blocks = nn.ModuleList(GPTBlock(c) for _ in range(c.layers))
        self.ln, self.head = nn.LayerNorm(c.d), nn.Linear(c.d, c.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, GPTBlock)
            for last in (block.proj, block.down):  # GPT-2's scaling of what adds to the residual stream
                nn.init.normal_(last.weight, std=0.02 / (2 * c.layers) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.ln(x))
        return logits


# ---------------------------------------------------------------- Llama


class RMSNorm(nn.Module):
    """In float32, as Llama computes it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return y.to(x.dtype) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (batch, heads, time, head size)."""
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)


class LlamaBlock(nn.Module):
    """RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        size = c.d // c.heads
        self.norm1, self.norm2 = RMSNorm(c.d), RMSNorm(c.d)
        self.q, self.o = nn.Linear(c.d, c.d, bias=False), nn.Linear(c.d, c.d, bias=False)
        self.k = nn.Linear(c.d, c.kv_heads * size, bias=False)
        self.v = nn.Linear(c.d, c.kv_heads * size, bias=False)
        self.gate, self.up = nn.Linear(c.d, c.ff, bias=False), nn.Linear(c.d, c.ff, bias=False)
        self.down = nn.Linear(c.ff, c.d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm1(x)
        q = rotate(self.q(h).view(b, t, self.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(b, t, self.kv_heads, -1).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, t, self.kv_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Llama(nn.Module):
    """Llama: rotary positions computed once, no biases."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(c.vocab, c.d)
        self.blocks = nn.ModuleList(LlamaBlock(c) for _ in range(c.layers))
        self.norm, self.head = RMSNorm(c.d), nn.Linear(c.d, c.vocab, bias=False)
        size = c.d // c.heads
        angles = torch.outer(torch.arange(c.seq), 1e4 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits
