"""The INT8 group codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from ciuic_compile.codecs._group import Backend, IntGroupCodec
from ciuic_compile.errors import OptionError


@dataclass(frozen=True)
class Int8Group(IntGroupCodec):
    """Symmetric INT8: q in [-127, 127], stored as int8 [groups, group_size]."""

    bits: ClassVar[int] = 8
    family: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            raise OptionError("int8 groups are symmetric; there is no affine form")

    def backend(self, impl: str) -> Backend:
        """See :meth:`IntGroupCodec.backend`."""
        if impl == "kernel":
            from ciuic_compile.codecs.int8_group import kernel

            return cast(Backend, kernel)
        from ciuic_compile.codecs.int8_group import reference

        return cast(Backend, reference)
