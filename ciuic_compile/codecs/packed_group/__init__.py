"""INT4, INT5 and INT6 in groups, symmetric or affine: codes narrower than a byte, packed in planes."""

from ciuic_compile.codecs.packed_group.ops import Int4Group as Int4Group
from ciuic_compile.codecs.packed_group.ops import Int5Group as Int5Group
from ciuic_compile.codecs.packed_group.ops import Int6Group as Int6Group
