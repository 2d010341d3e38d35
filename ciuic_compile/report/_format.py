"""Numbers, paths and codec names as short ASCII words."""

from __future__ import annotations

import math
import os
import re

from ciuic_compile.types import Plan, Track

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_INDEX = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")


def ascii_line(text: str) -> str:
    """``text`` on one line of printable ASCII: runs of white space become one space, the rest escapes."""
    plain = " ".join(text.split())
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode("ascii") for c in plain)


def crop(text: str, width: int) -> str:
    """Cut ``text`` to ``width`` columns, ending in ``...`` where something was cut."""
    if len(text) <= width:
        return text
    return text[: width - 3] + "..." if width > 3 else text[: max(width, 0)]


def crop_left(text: str, width: int) -> str:
    """Cut ``text`` to its last ``width`` columns, beginning with ``...`` where something was cut."""
    if len(text) <= width:
        return text
    return "..." + text[len(text) - width + 3 :] if width > 3 else text[: max(width, 0)]


def size(nbytes: int) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more: ``1.30 GiB``, ``512 B``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    power = min((abs(nbytes).bit_length() - 1) // 10, len(_UNITS) - 1)
    number = nbytes / 1024**power
    if abs(number) >= 1023.5 and power < len(_UNITS) - 1:
        power, number = power + 1, number / 1024
    digits = 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:.{digits}f} {_UNITS[power]}"


def duration(microseconds: float) -> str:
    """A signed time with a unit: ``+4.10 ms``, ``-12.0 us``."""
    if not math.isfinite(microseconds):
        return "an unknown time"
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if abs(microseconds) >= factor:
            return (
                f"{microseconds / factor:+.3g} {unit}"
                if abs(microseconds) < 1e9
                else f"{microseconds / 1e6:+.0f} s"
            )
    return f"{microseconds:+.3g} us" if microseconds else "0 us"


def percent(fraction: float) -> str:
    """A fraction as a percentage with two significant digits: ``1.3%``."""
    if not math.isfinite(fraction):
        return "unknown"
    return f"{fraction * 100:.0f}%" if 1 <= abs(fraction) < 100 else f"{fraction * 100:.2g}%"


def factor(before: int, after: int) -> str:
    """How ``after`` stands to ``before``: ``4.13x less``, ``1.20x MORE``, ``the same``, ``nothing left``."""
    if before == after:
        return "the same"
    if after <= 0:
        return "nothing left"
    if before <= 0:
        return "MORE"
    return f"{before / after:.3g}x less" if after < before else f"{after / before:.3g}x MORE"


def codec_label(codec: str | None) -> str:
    """``int4_group64_affine`` -> ``INT4``: the payload's type, which is what a reader compares by."""
    name = codec or "codec?"
    match = re.match(r"[A-Za-z]+\d+(?:[em]\d+)*", name)
    return crop(ascii_line(match[0] if match else name).upper(), 10)


def codec_bits(label: str) -> int:
    """Payload bits in a label, for sorting; 0 where it names none."""
    match = re.search(r"\d+", label)
    return int(match[0]) if match and len(match[0]) < 6 else 0


def op_label(op: str) -> str:
    """``aten.mm.default`` -> ``aten.mm``, ``<built-in function getitem>`` -> ``getitem``."""
    name = ascii_line(op)
    if name.startswith("<built-in function ") and name.endswith(">"):
        name = name[len("<built-in function ") : -1]
    return name.removesuffix(".default")


def star(path: str) -> str:
    """A module path with its layer indices as stars: ``blocks.3.mlp`` -> ``blocks.*.mlp``."""
    return _INDEX.sub("*", path)


def short_file(path: str) -> str:
    """A path as a reader knows it: relative to the working directory or site-packages, else its end."""
    slashed = path.replace("\\", "/")
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in slashed:
            return slashed.rsplit(marker, 1)[1]
    try:
        here = os.getcwd().replace("\\", "/").rstrip("/") + "/"
    except OSError:  # the working directory was removed
        here = ""
    if here and slashed.startswith(here):
        return slashed[len(here) :]
    parts = slashed.split("/")
    return slashed if len(parts) <= 3 else ".../" + "/".join(parts[-2:])


def price_sentence(plan: Plan) -> str:
    """What more or less of the budget would change: ``1.0 GiB more saves 3.1 ms a step, ...``."""
    if plan.price is None:
        return ""
    step, less = size(plan.price.step_bytes), plan.price.less_costs_us
    more = duration(plan.price.more_saves_us).lstrip("+")
    costs = "is more than any plan found can do" if less is None else f"costs {duration(less).lstrip('+')}"
    weighed = ", gradient error weighed in" if plan.gradient_error else ""
    return f"{step} more saves {more} a step, {step} less {costs}{weighed}"


def step_name(track: Track, step: int) -> str:
    """``forward 3 of 9``, ``between forward and backward`` or ``backward 2 of 8``: the HTML page's words."""
    if step < track.forward_steps:
        return f"forward {step + 1} of {track.forward_steps}"
    inside = step - track.forward_steps  # at the first of them no kernel runs
    count = len(track.steps) - track.forward_steps - 1
    return f"backward {inside} of {count}" if inside else "between forward and backward"
