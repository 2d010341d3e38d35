"""What integer group codecs share: the layout in groups, sizes, names and dispatch."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul, or_
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ciuic_compile.codecs import _gaussian
from ciuic_compile.codecs._quantize import Levels, dequantize
from ciuic_compile.codecs.base import Codec, Encoded, Impl, Size, check_dtype, resolve_impl
from ciuic_compile.errors import OptionError

GROUP_SIZES = (32, 64, 128, 256)
GROUP_ORDER = ("cpu",)
"""Device types on which the aten decoder computes in group order; :func:`dequantize_groups` says why."""


class Backend(Protocol):
    """One implementation of a codec (its reference module or its kernel module)."""

    def encode(self, flat: Tensor, codec: IntGroupCodec) -> Encoded:
        """Encode a flat tensor."""

    def decode(
        self, encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: IntGroupCodec
    ) -> Tensor:
        """Decode into a flat contiguous tensor of ``numel`` elements."""


@dataclass(frozen=True)
class IntGroupCodec(Codec):
    """Integers that share one bfloat16 scale (and, affine, one offset) a group.

    The tensor is flattened; ``group_size`` consecutive elements are a group; the last group is padded
    with zeros. Encoded: payload [groups, group_size * bits / 8], scale [groups], affine also offset [groups].
    """

    family: ClassVar[str]

    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise OptionError(f"{self.family}: group size {self.group_size} is none of {GROUP_SIZES}")

    @property
    def name(self) -> str:
        """E.g. ``"int8_group64"``, ``"int4_group64_affine"``."""
        return f"{self.family}_group{self.group_size}" + ("" if self.symmetric else "_affine")

    @classmethod
    def from_name(cls, name: str) -> IntGroupCodec | None:
        """The codec of this family called ``name``, or None when it is not one of this family's names."""
        match = re.fullmatch(rf"{cls.family}_group([1-9]\d*)(_affine)?", name)
        if match is None or int(match[1]) not in GROUP_SIZES:
            return None
        try:
            return cls(int(match[1]), match[2] is None)
        except OptionError:  # a variant that this family does not have
            return None

    @classmethod
    def defaults(cls) -> tuple[IntGroupCodec, ...]:
        """The codecs the planner considers unless told otherwise: symmetric groups of 64."""
        return (cls(64),)

    @property
    def levels(self) -> Levels:
        """The integer codes."""
        return Levels.of(self.bits, self.symmetric)

    @property
    def group_bytes(self) -> int:
        """Encoded bytes of one group: payload, and 2 bytes for each qparam."""
        return self.group_size * self.bits // 8 + (2 if self.symmetric else 4)

    def encoded_bytes(self, numel: Size, itemsize: int) -> Size:
        """See :meth:`Codec.encoded_bytes`; ``itemsize`` makes no difference here."""
        return (numel + self.group_size - 1) // self.group_size * self.group_bytes

    @property
    def relative_mse(self) -> float:
        """See :meth:`Codec.relative_mse`; _gaussian.py has the model."""
        return _gaussian.relative_mse(self.bits, self.group_size, self.symmetric)

    @abstractmethod
    def backend(self, impl: str) -> Backend:
        """The module for "reference" or "kernel"; the latter imports triton."""

    def encode(self, x: Tensor, impl: Impl = "auto") -> Encoded:
        """See :meth:`Codec.encode`."""
        check_dtype(self.name, x.dtype)
        return self.backend(resolve_impl(impl, x.device)).encode(x.reshape(-1), self)

    def decode(
        self,
        encoded: Encoded,
        shape: Sequence[int | torch.SymInt],
        dtype: torch.dtype,
        impl: Impl = "auto",
    ) -> Tensor:
        """See :meth:`Codec.decode`."""
        check_dtype(self.name, dtype)
        numel = reduce(mul, shape, 1)
        backend = self.backend(resolve_impl(impl, encoded[0].device))
        return backend.decode(encoded, numel, dtype, self).view(tuple(shape))


def group_count(numel: int | torch.SymInt, group_size: int) -> int | torch.SymInt:
    """Groups that hold ``numel`` elements; adds no guard, and stays simple when they divide evenly."""
    if statically_known_true(numel % group_size == 0):
        return numel // group_size
    return (numel + group_size - 1) // group_size


def to_groups(flat: Tensor, group_size: int) -> Tensor:
    """View a flat tensor as [groups, group_size], zero padded if need be."""
    numel = flat.shape[0]
    groups = group_count(numel, group_size)
    padding = groups * group_size - numel
    if not statically_known_true(padding == 0):
        flat = torch.constant_pad_nd(flat, (0, padding), 0.0)
    return flat.view(groups, group_size)


def from_groups(values: Tensor, numel: int | torch.SymInt, group_size: int) -> Tensor:
    """The first ``numel`` elements of contiguous groups, flat and contiguous."""
    groups = values.shape[0]
    flat = values.view(groups * group_size)
    return flat if statically_known_true(groups * group_size == numel) else flat[:numel]


def dequantize_groups(
    bits: Sequence[Tensor],
    qparams: Sequence[Tensor],
    numel: int | torch.SymInt,
    dtype: torch.dtype,
    codec: IntGroupCodec,
) -> Tensor:
    """The first ``numel`` values, flat, in ``dtype``, of the codes that ``bits`` are together.

    On CUDA the arithmetic runs in the tensor's flat order: in group order Inductor stored the decoded
    values (as float32) instead of fusing them with what reads them. On the CPU it runs in group order:
    in flat order Inductor 2.13 read beyond the qparams in the vector loop's tail.

    Args:
        bits: int32 [groups, ...], to be or-ed. Each is made flat by itself: flattened together, an index
            became ``x % 64 % 16``, where Triton sees no contiguity (a SwiGLU took 124 instructions, not 77).
    """
    size = codec.group_size
    if bits[0].device.type in GROUP_ORDER:
        codes = bits[0]
        if len(bits) > 1:
            codes = reduce(or_, (b.view(b.shape[0], size) for b in bits))
        shape = (-1, *[1] * (codes.dim() - 1))
        scale, *offset = (q.view(shape) for q in qparams)
        values = dequantize(codes, scale, offset[0] if offset else None, codec.levels, dtype)
        return from_groups(values, numel, size)
    scale, *offset = (from_groups(q[:, None].expand(-1, size).contiguous(), numel, size) for q in qparams)
    codes = reduce(or_, (from_groups(b, numel, size) for b in bits))
    return dequantize(codes, scale, offset[0] if offset else None, codec.levels, dtype)
