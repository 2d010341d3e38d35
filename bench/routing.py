"""The Mixture-of-Experts and the encoder-decoder transformer of :mod:`bench.models`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.language import GPTBlock, TransformerConfig

# ---------------------------------------------------------------- Mixture of Experts


@dataclass(frozen=True)
class MoEConfig(TransformerConfig):
    """``capacity``: places an expert has, in units of its even share of all choices."""

    experts: int = 8
    chosen: int = 2
    capacity: float = 1.25


class Experts(nn.Module):
    """Each token goes to its two best experts; the shapes do not depend on which.

    An expert has a fixed number of places, filled in the order of the tokens. Choices that find none go to
    one more place, whose output nobody uses: GShard's rule, with indices in place of its one-hot tensors.
    """

    def __init__(self, c: MoEConfig) -> None:
        super().__init__()
        self.experts, self.chosen, self.capacity = c.experts, c.chosen, c.capacity
        self.router = nn.Linear(c.d, c.experts, bias=False)
        self.up = nn.Parameter(torch.randn(c.experts, c.d, c.ff) * 0.02)
        self.down = nn.Parameter(torch.randn(c.experts, c.ff, c.d) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        count, d = tokens.shape
        places = int(self.capacity * self.chosen * count / self.experts)
        gates, experts = self.router(tokens).float().softmax(-1).topk(self.chosen)
        gates = gates / gates.sum(-1, keepdim=True)
        experts = experts.flatten()
        taken = F.one_hot(experts, self.experts).cumsum(0)
        place = taken.gather(1, experts[:, None]).squeeze(1) - 1
        fits = place < places
        slot = torch.where(fits, experts * places + place, self.experts * places)
        filled = tokens.new_zeros(self.experts * places + 1, d)
        filled = filled.index_add(0, slot, tokens.repeat_interleave(self.chosen, 0))
        h = torch.bmm(filled[:-1].view(self.experts, places, d), self.up)
        y = torch.bmm(F.gelu(h, approximate="tanh"), self.down).flatten(0, 1)
        y = y[slot.clamp(max=self.experts * places - 1)] * (gates.flatten() * fits).to(y.dtype)[:, None]
        out: Tensor = y.view(count, self.chosen, d).sum(1).view_as(x)
        return out


class MoEBlock(GPTBlock):
    """GPT-2's block with experts in place of its MLP."""

    def __init__(self, c: MoEConfig) -> None:
        super().__init__(c)
        del self.up, self.down
        self.experts = Experts(c)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        x = x + self.attention(self.ln1(x), causal)
        out: Tensor = x + self.experts(self.ln2(x))
        return out


class MoE(nn.Module):
    """A language model whose every block has experts."""

    def __init__(self, c: MoEConfig) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab, c.d), nn.Embedding(c.seq, c.d)
        self.blocks = nn.ModuleList(MoEBlock(c) for _ in range(c.layers))
        self.ln, self.head = nn.LayerNorm(c.d), nn.Linear(c.d, c.vocab, bias=False)
        _small_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.ln(x))
        return logits


# ---------------------------------------------------------------- encoder and decoder


class DecoderBlock(GPTBlock):
    """GPT-2's block with attention to what the encoder made, between its two halves."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__(c)
        self.ln3 = nn.LayerNorm(c.d)
        self.q, self.kv, self.out = nn.Linear(c.d, c.d), nn.Linear(c.d, 2 * c.d), nn.Linear(c.d, c.d)

    def cross(self, x: Tensor, memory: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(memory).view(b, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, t, d))
        return out

    def decode(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x), causal=True)
        x = x + self.cross(self.ln3(x), memory)
        out: Tensor = x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))
        return out


class EncoderDecoder(nn.Module):
    """``layers`` blocks each; inputs are the source and the target so far, side by side, equally long."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c.vocab, c.d), nn.Embedding(c.seq, c.d)
        self.encoder = nn.ModuleList(GPTBlock(c) for _ in range(c.layers))
        self.decoder = nn.ModuleList(DecoderBlock(c) for _ in range(c.layers))
        self.ln1, self.ln2 = nn.LayerNorm(c.d), nn.LayerNorm(c.d)
        self.head = nn.Linear(c.d, c.vocab, bias=False)
        _small_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        source, target = ids.chunk(2, 1)
        positions = self.positions(torch.arange(target.shape[1], device=ids.device))
        memory = self.tokens(source) + positions
        for block in self.encoder:
            memory = block(memory, causal=False)
        memory = self.ln1(memory)
        x = self.tokens(target) + positions
        for block in self.decoder:
            assert isinstance(block, DecoderBlock)
            x = block.decode(x, memory)
        logits: Tensor = self.head(self.ln2(x))
        return logits


def _small_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
