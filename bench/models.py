"""Models to measure on: random weights, plain torch, any size.

``MODELS[name](size)`` builds one; sizes are "tiny" (tests), "small" (a CPU), "full" (a GPU) and "medium" (a
GPU, few layers: compiles in seconds). ``batch`` and ``length`` (sequence, or image side) go before those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.diffusion import UNet, UNetConfig
from bench.language import GPT, Llama, TransformerConfig
from bench.routing import EncoderDecoder, MoE, MoEConfig
from bench.vision import ResNet, ViT

Batch = tuple[Tensor, Tensor]
BatchFn = Callable[[int, torch.device], Batch]  # seed, device -> inputs, targets
LossFn = Callable[[Tensor, Tensor], Tensor]
Built = tuple[nn.Module, BatchFn, LossFn]
C = TypeVar("C", bound=TransformerConfig)


class Builder(Protocol):
    """Builds a model; None leaves what the size says."""

    def __call__(self, size: str, batch: int | None = None, length: int | None = None) -> Built: ...


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over all positions, in float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, in float32."""
    return F.mse_loss(prediction.float(), target.float())


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


def translation_batches(c: TransformerConfig) -> BatchFn:
    """Random source and target side by side, and the target's next tokens."""
    text = text_batches(c)

    def batch(seed: int, device: torch.device) -> Batch:
        target, following = text(seed, device)
        return torch.cat((target.flip(1), target), 1), following

    return batch


def noise_batches(c: UNetConfig) -> BatchFn:
    """Smooth random images with noise in them and its amount as a fourth plane, and the noise."""

    def batch(seed: int, device: torch.device) -> Batch:
        source = torch.Generator().manual_seed(seed)
        images = F.interpolate(torch.randn(c.batch, 3, 4, 4, generator=source), c.side, mode="bilinear")
        time = torch.rand(c.batch, 1, 1, 1, generator=source)
        noise = torch.randn(c.batch, 3, c.side, c.side, generator=source)
        noisy = (1 - time).sqrt() * images + time.sqrt() * noise
        planes = torch.cat((noisy, time.expand(-1, -1, c.side, c.side)), 1)
        return planes.to(device), noise.to(device)

    return batch


T = TransformerConfig
GPT_SIZES = {
    "tiny": T(2, 64, 2, 2, 256, 128, 32, 2),
    "small": T(12, 256, 4, 4, 1024, 1024, 256, 2),
    "medium": T(3, 768, 12, 12, 3072, 8192, 1024, 8),
    "full": T(),
}
LLAMA_SIZES = {
    "tiny": T(2, 64, 4, 2, 192, 128, 32, 2),
    "small": T(12, 256, 8, 2, 704, 1024, 256, 2),
    "medium": T(3, 1024, 16, 4, 2816, 8192, 1024, 8),
    "full": T(12, 1024, 16, 4, 2816),
}
VIT_SIZES = {  # transformer, patch, side
    "tiny": (T(2, 64, 2, 2, 256, 16, 16, 2), 8, 32),
    "small": (T(12, 192, 3, 3, 768, 100, 64, 8), 8, 64),
    "medium": (T(4, 768, 12, 12, 3072, 1000, 196, 64), 16, 224),
    "full": (T(12, 768, 12, 12, 3072, 1000, 196, 64), 16, 224),
}
RESNET_SIZES = {  # depths, width, classes, batch, side
    "tiny": ((1, 1, 1, 1), 8, 16, 4, 32),
    "small": ((3, 4, 6, 3), 64, 100, 4, 96),
    "medium": ((1, 2, 2, 1), 64, 1000, 64, 224),
    "full": ((3, 4, 6, 3), 64, 1000, 64, 224),
}
UNET_SIZES = {
    "tiny": UNetConfig(8, (1, 2), 1, 2, 4, 16, 4),
    "small": UNetConfig(32, (1, 2, 4), 2, 4, 8, 64, 4),
    "medium": UNetConfig(64, (1, 2, 4), 1, 4, 8, 64, 64),
    "full": UNetConfig(128, (1, 2, 4, 4), 2, 8, 32, 64, 64),
}
MOE_SIZES = {
    "tiny": MoEConfig(2, 64, 2, 2, 128, 128, 32, 2, experts=4),
    "small": MoEConfig(6, 256, 4, 4, 512, 1024, 256, 2),
    "medium": MoEConfig(3, 512, 8, 8, 1024, 8192, 1024, 8),
    "full": MoEConfig(12, 768, 12, 12, 1536, 8192, 1024, 8),
}
ENCODER_DECODER_SIZES = {  # layers: of each half
    "tiny": T(1, 64, 2, 2, 256, 128, 32, 2),
    "small": T(6, 256, 4, 4, 1024, 1024, 256, 2),
    "medium": T(2, 768, 12, 12, 3072, 8192, 512, 16),
    "full": T(6, 768, 12, 12, 3072, 8192, 1024, 8),
}


def reshaped(c: C, batch: int | None, length: int | None) -> C:
    """The same transformer with another measuring batch."""
    return replace(c, batch=batch or c.batch, seq=length or c.seq)


def build_gpt(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """GPT-2-style."""
    c = reshaped(GPT_SIZES[size], batch, length)
    return GPT(c), text_batches(c), cross_entropy


def build_llama(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """Llama-style."""
    c = reshaped(LLAMA_SIZES[size], batch, length)
    return Llama(c), text_batches(c), cross_entropy


def build_vit(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """ViT-B at its full size."""
    c, patch, side = VIT_SIZES[size]
    side = length or side
    c = reshaped(c, batch, (side // patch) ** 2)
    return ViT(c, patch), image_batches(c.batch, side, c.vocab), cross_entropy


def build_resnet(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """ResNet-50 (at its tiny and medium sizes, fewer of its blocks)."""
    depths, width, classes, count, side = RESNET_SIZES[size]
    return (
        ResNet(depths, width, classes),
        image_batches(batch or count, length or side, classes),
        cross_entropy,
    )


def build_unet(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """A diffusion UNet, trained to predict the noise."""
    c = UNET_SIZES[size]
    c = replace(c, batch=batch or c.batch, side=length or c.side)
    return UNet(c), noise_batches(c), squared_error


def build_moe(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """GPT-2-style, with a Mixture of Experts for each MLP."""
    c = reshaped(MOE_SIZES[size], batch, length)
    return MoE(c), text_batches(c), cross_entropy


def build_encoder_decoder(size: str, batch: int | None = None, length: int | None = None) -> Built:
    """An encoder, and a decoder that attends to it; ``length`` tokens each."""
    c = reshaped(ENCODER_DECODER_SIZES[size], batch, length)
    return EncoderDecoder(c), translation_batches(c), cross_entropy


MODELS: dict[str, Builder] = {
    "gpt": build_gpt,
    "llama": build_llama,
    "vit": build_vit,
    "resnet50": build_resnet,
    "unet": build_unet,
    "moe": build_moe,
    "encdec": build_encoder_decoder,
}
