"""A mixture of experts: each expert takes the tokens that score highest for it."""

import torch
import torch.nn.functional as F
from torch import nn

EXPERTS = 4
CAPACITY = 1.0


class Expert(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.enter = nn.Linear(width, hidden)
        self.leave = nn.Linear(hidden, width)

    def forward(self, tokens):
        hidden = F.relu(self.enter(tokens))
        return self.leave(hidden)


class Mixture(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(EXPERTS))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        take = int(CAPACITY * tokens.shape[0]) // EXPERTS
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            weights, chosen = scores[:, number].topk(take)
            mixed = expert(tokens[chosen])
            mixed = mixed * weights.unsqueeze(-1)
            result = result.index_add(0, chosen, mixed)
        return result.view_as(x)


class Layer(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mixture = Mixture(width, hidden)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mixture(self.norm2(x))


class MoE(nn.Module):
    def __init__(self, vocabulary=2048, width=512, hidden=2048, layers=1, heads=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocabulary)

    def forward(self, ids, labels):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.unembed(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss


def make():
    model = MoE().to(torch.bfloat16)
    ids = torch.zeros(8, 512, dtype=torch.long)
    return model, {"ids": ids, "labels": ids}
