"""Models to measure on: random weights, plain torch, any size.

``MODELS[name](size)`` builds one; sizes are "tiny" (tests), "small" (a CPU) and "full" (a GPU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.language import GPT, Llama, TransformerConfig
from bench.vision import ResNet, ViT

Batch = tuple[Tensor, Tensor]
BatchFn = Callable[[int, torch.device], Batch]  # seed, device -> inputs, targets
LossFn = Callable[[Tensor, Tensor], Tensor]
Built = tuple[nn.Module, BatchFn, LossFn]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over all positions, in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


class WithLoss(nn.Module):
    """Inputs and targets to loss, so that one compiled graph holds both (and the logits never leave it)."""

    def __init__(self, model: nn.Module, loss: LossFn = cross_entropy) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model(inputs), targets)


def text_batches(c: TransformerConfig) -> BatchFn:
    """Random tokens and the next ones."""

    def batch(seed: int, device: torch.device) -> Batch:
        ids = torch.randint(c.vocab, (c.batch, c.seq + 1), generator=torch.Generator().manual_seed(seed))
        return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)

    return batch


def image_batches(count: int, side: int, classes: int) -> BatchFn:
    """Random images and classes."""

    def batch(seed: int, device: torch.device) -> Batch:
        source = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, side, side, generator=source)
        return images.to(device), torch.randint(classes, (count,), generator=source).to(device)

    return batch


T = TransformerConfig
GPT_SIZES = {
    "tiny": T(2, 64, 2, 2, 256, 128, 32, 2),
    "small": T(12, 256, 4, 4, 1024, 1024, 256, 2),
    "full": T(),
}
LLAMA_SIZES = {
    "tiny": T(2, 64, 4, 2, 192, 128, 32, 2),
    "small": T(12, 256, 8, 2, 704, 1024, 256, 2),
    "full": T(12, 1024, 16, 4, 2816),
}
VIT_SIZES = {  # transformer, patch, side
    "tiny": (T(2, 64, 2, 2, 256, 16, 16, 2), 8, 32),
    "small": (T(12, 192, 3, 3, 768, 100, 64, 8), 8, 64),
    "full": (T(12, 768, 12, 12, 3072, 1000, 196, 64), 16, 224),
}
RESNET_SIZES = {  # depths, width, classes, batch, side
    "tiny": ((1, 1, 1, 1), 8, 16, 4, 32),
    "small": ((3, 4, 6, 3), 64, 100, 4, 96),
    "full": ((3, 4, 6, 3), 64, 1000, 64, 224),
}


def build_gpt(size: str) -> Built:
    """GPT-2-style."""
    return GPT(GPT_SIZES[size]), text_batches(GPT_SIZES[size]), cross_entropy


def build_llama(size: str) -> Built:
    """Llama-style."""
    return Llama(LLAMA_SIZES[size]), text_batches(LLAMA_SIZES[size]), cross_entropy


def build_vit(size: str) -> Built:
    """ViT-B at its full size."""
    c, patch, side = VIT_SIZES[size]
    return ViT(c, patch), image_batches(c.batch, side, c.vocab), cross_entropy


def build_resnet(size: str) -> Built:
    """ResNet-50 (at its tiny size, a smaller one)."""
    depths, width, classes, batch, side = RESNET_SIZES[size]
    return ResNet(depths, width, classes), image_batches(batch, side, classes), cross_entropy


MODELS: dict[str, Callable[[str], Built]] = {
    "gpt": build_gpt,
    "llama": build_llama,
    "vit": build_vit,
    "resnet50": build_resnet,
}
