"""Codecs: ways to store a saved tensor in fewer bytes.

To add one: a folder here with a :class:`Codec` subclass, and its class in ``FAMILIES``. Formats and
their error bounds: docs/numerics-codecs.md.
"""

from __future__ import annotations

import functools

from ciuic_compile.codecs.base import Codec as Codec
from ciuic_compile.codecs.base import Impl as Impl
from ciuic_compile.codecs.base import KernelBytes as KernelBytes
from ciuic_compile.codecs.bitmask import Bitmask as Bitmask
from ciuic_compile.codecs.int8_group import Int8Group as Int8Group
from ciuic_compile.codecs.packed_group import Int4Group as Int4Group
from ciuic_compile.codecs.packed_group import Int5Group as Int5Group
from ciuic_compile.codecs.packed_group import Int6Group as Int6Group
from ciuic_compile.errors import OptionError, nearest

FAMILIES = (Int8Group, Int6Group, Int5Group, Int4Group, Bitmask)

CODECS: tuple[Codec, ...] = tuple(codec for family in FAMILIES for codec in family.defaults())
"""The codecs that a planner considers unless told otherwise, most precise first."""


@functools.cache
def get_codec(name: str) -> Codec:
    """The codec called ``name``, e.g. ``"int4_group64_affine"``, also one outside ``CODECS``.

    Raises:
        OptionError: no codec has that name.
    """
    for family in FAMILIES:
        codec = family.from_name(name)
        if codec is not None:
            return codec
    names = [codec.name for codec in CODECS]
    raise OptionError(f"unknown codec {name!r}{nearest(name, names)} (by default: {', '.join(names)})")
