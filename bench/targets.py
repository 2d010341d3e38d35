"""Targets of `ciuic` at real sizes."""

from __future__ import annotations

import torch
from torch import nn

from bench.language import GPT, TransformerConfig
from bench.models import LossFn, cross_entropy


def gpt2_medium() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], LossFn]:
    """GPT-2 medium: 24 layers, d 1024, 16 heads, vocabulary 50257; 8 sequences of 1024 tokens."""
    c = TransformerConfig(layers=24, d=1024, heads=16, kv_heads=16, ff=4096, vocab=50257, seq=1024, batch=8)
    tokens = torch.zeros(c.batch, c.seq, dtype=torch.int64)
    return GPT(c), (tokens, tokens), cross_entropy
