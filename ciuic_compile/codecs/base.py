"""What a codec is: encode, decode, exact sizes and an error model.

A codec stores a floating point tensor in fewer bytes. The planner asks it for sizes (also as
sympy expressions) and for its error; the rewrite traces ``encode`` and ``decode`` into graphs.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ciuic_compile.errors import OptionError

Impl: TypeAlias = Literal["auto", "reference", "kernel"]
Encoded: TypeAlias = tuple[Tensor, ...]
# An int, a SymInt or a sympy.Expr; sympy has no types, so checkers see Any.
Size: TypeAlias = Any

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that codecs take; everything else is refused with OptionError."""


class KernelBytes(NamedTuple):
    """Bytes moved to and from device memory, for the time model (int or sympy expression)."""

    encode: Size
    decode: Size


@dataclass(frozen=True)
class Codec(ABC):
    """A way to store a tensor in fewer bytes. Instances are immutable, hashable values.

    Subclasses are frozen dataclasses; ``name`` must say everything that changes the stored bytes,
    because plans and cache keys hold the name alone.
    """

    bits: ClassVar[int]
    """Payload bits per element; the planner compares it with ``Storage.min_bits``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Canonical and stable, e.g. ``"int4_group64_affine"``."""

    @abstractmethod
    def encode(self, x: Tensor, impl: Impl = "auto") -> Encoded:
        """Encode ``x`` (float32/bfloat16/float16, any shape and strides) into (payload, *qparams).

        Call it with gradients disabled. Tracing it adds no guards on symbolic sizes.

        Args:
            impl: "reference" is plain aten, "kernel" is Triton, "auto" picks the kernel on CUDA.

        Raises:
            OptionError: for another dtype, or "kernel" where Triton cannot run.
        """

    @abstractmethod
    def decode(
        self,
        encoded: Encoded,
        shape: Sequence[int | torch.SymInt],
        dtype: torch.dtype,
        impl: Impl = "auto",
    ) -> Tensor:
        """Decode into a new contiguous tensor of ``shape`` and ``dtype``.

        ``shape`` must hold as many elements as were encoded; ``dtype`` may differ from the encoded
        one (values beyond float16's range clamp to its largest; beyond bfloat16's they become Inf).

        Raises:
            OptionError: as ``encode``.
        """

    @abstractmethod
    def encoded_bytes(self, numel: Size, itemsize: int) -> Size:
        """Exact bytes of what ``encode`` returns, qparams and tail padding included.

        ``numel`` is an int or a sympy expression, and so is the answer. ``itemsize`` is the size of
        one original element in bytes (the integer codecs ignore it).
        """

    @property
    @abstractmethod
    def relative_mse(self) -> float:
        """E|decode(encode(x)) - x|^2 / E|x|^2 for independent standard normal x."""

    def kernel_bytes(self, numel: Size, itemsize: int) -> KernelBytes:
        """Bytes that one encode and one decode kernel move: everything read or written once."""
        moved = numel * itemsize + self.encoded_bytes(numel, itemsize)
        return KernelBytes(encode=moved, decode=moved)


def resolve_impl(impl: Impl, device: torch.device) -> Literal["reference", "kernel"]:
    """Turn "auto" into what runs on ``device``, and refuse what cannot run there.

    Raises:
        OptionError: unknown ``impl``, or "kernel" without CUDA and without Triton's interpreter.
    """
    if impl == "reference":
        return impl
    if impl not in ("auto", "kernel"):
        raise OptionError(f"impl={impl!r} is none of 'auto', 'reference', 'kernel'")
    if impl == "auto":
        return "kernel" if device.type == "cuda" and TRITON_INSTALLED else "reference"
    if not TRITON_INSTALLED:
        raise OptionError("impl='kernel' needs triton, which is not installed; use impl='reference'")
    if device.type != "cuda":
        from ciuic_compile.codecs._triton import INTERPRETED

        if not INTERPRETED:
            raise OptionError(
                f"impl='kernel' needs a CUDA tensor (this one is on {device}) or TRITON_INTERPRET=1; "
                "use impl='reference'"
            )
    return "kernel"


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise OptionError unless a codec takes ``dtype``."""
    if dtype not in DTYPES:
        raise OptionError(f"codec {name} takes {', '.join(str(d) for d in DTYPES)}, not {dtype}")
