"""INT4 in groups, symmetric (4.25 bits an element at group size 64) or affine (4.5 bits)."""

from ciuic_compile.codecs.int4_group.ops import Int4Group as Int4Group
