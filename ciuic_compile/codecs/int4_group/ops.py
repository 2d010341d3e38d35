"""The INT4 group codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from ciuic_compile.codecs._group import Backend, IntGroupCodec


@dataclass(frozen=True)
class Int4Group(IntGroupCodec):
    """INT4: symmetric q in [-7, 7] stored plus 8, or affine q in [0, 15].

    Payload uint8 [groups, group_size / 2]: byte j holds element j in its low four bits and element
    j + group_size / 2 in its high four.
    """

    bits: ClassVar[int] = 4
    family: ClassVar[str] = "int4"

    @classmethod
    def defaults(cls) -> tuple[Int4Group, ...]:
        """The codecs the planner considers unless told otherwise."""
        return (cls(64, symmetric=False), cls(64))

    def backend(self, impl: str) -> Backend:
        """See :meth:`IntGroupCodec.backend`."""
        if impl == "kernel":
            from ciuic_compile.codecs.int4_group import kernel

            return cast(Backend, kernel)
        from ciuic_compile.codecs.int4_group import reference

        return cast(Backend, reference)
