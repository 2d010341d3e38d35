"""INT8 in groups: symmetric, one bfloat16 scale a group, 8.25 bits an element at group size 64."""

from ciuic_compile.codecs.int8_group.ops import Int8Group as Int8Group
