"""The group codecs narrower than a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from ciuic_compile.codecs._group import Backend, IntGroupCodec


@dataclass(frozen=True)
class PackedGroup(IntGroupCodec):
    """Symmetric q in [-top, top] stored plus 2^(bits-1), or affine q in [0, top].

    Payload uint8 [groups, group_size * bits / 8]. Byte j of the first group_size / 2 holds the low four bits
    of element j in its own low four, and those of element j + group_size / 2 in its high four. Codes of more
    bits have the rest in one more plane: its byte j holds the upper bits of elements j, j + w, j + 2w, ...,
    the first in its lowest bits, where w = group_size / parts.

    All of it is made of ``parts`` runs of w elements (and w bytes) that never need to be shuffled.
    """

    parts: ClassVar[int]
    """Elements that share the byte of the upper bits; 2, those of a nibble byte, where there are none."""

    @property
    def width(self) -> int:
        """Elements of one part of a group, and bytes of one plane of its payload."""
        return self.group_size // self.parts

    @property
    def planes(self) -> int:
        """Planes of ``width`` bytes in a group's payload: ``parts / 2`` of nibbles, and the upper bits'."""
        return self.parts * self.bits // 8

    def backend(self, impl: str) -> Backend:
        """See :meth:`IntGroupCodec.backend`."""
        if impl == "kernel":
            from ciuic_compile.codecs.packed_group import kernel

            return cast(Backend, kernel)
        from ciuic_compile.codecs.packed_group import reference

        return cast(Backend, reference)


@dataclass(frozen=True)
class Int4Group(PackedGroup):
    """INT4: symmetric q in [-7, 7] (4.25 bits an element at group size 64), affine q in [0, 15] (4.5)."""

    bits: ClassVar[int] = 4
    parts: ClassVar[int] = 2
    family: ClassVar[str] = "int4"

    @classmethod
    def defaults(cls) -> tuple[Int4Group, ...]:
        """The codecs the planner considers unless told otherwise."""
        return (cls(64, symmetric=False), cls(64))


@dataclass(frozen=True)
class Int5Group(PackedGroup):
    """INT5: symmetric q in [-15, 15] (5.25 bits an element at group size 64), affine q in [0, 31] (5.5)."""

    bits: ClassVar[int] = 5
    parts: ClassVar[int] = 8
    family: ClassVar[str] = "int5"


@dataclass(frozen=True)
class Int6Group(PackedGroup):
    """INT6: symmetric q in [-31, 31] (6.25 bits an element at group size 64), affine q in [0, 63] (6.5)."""

    bits: ClassVar[int] = 6
    parts: ClassVar[int] = 4
    family: ClassVar[str] = "int6"
