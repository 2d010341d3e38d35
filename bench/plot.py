"""Loss curves as a small PNG, with nothing but numpy and zlib; Pillow, where installed, adds the labels."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Curve = Sequence[tuple[float, float]]
Pixels = NDArray[np.uint8]
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 34  # margins


def write_curves(path: str | Path, title: str, curves: Mapping[str, Curve], axis: str = "step") -> None:
    """Draw each named curve of (x, y) points, the y range cut at its 98th percentile, and write a PNG.

    Raises:
        ValueError: no finite point at all.
    """
    points = {name: [p for p in curve if np.isfinite(p).all()] for name, curve in curves.items()}
    xs = [x for curve in points.values() for x, _ in curve]
    ys = [y for curve in points.values() for _, y in curve]
    if not xs:
        raise ValueError("nothing finite to draw")
    low, high = min(ys), float(np.percentile(ys, 98))
    bounds = (min(xs), max(max(xs), min(xs) + 1e-9), low, max(high, low + 1e-9))
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    ticks = np.linspace(bounds[2], bounds[3], 5)
    for y in ticks:
        pixels[_place(0, y, bounds)[1], LEFT : WIDTH - RIGHT] = 225
    pixels[TOP : HEIGHT - BOTTOM, LEFT] = pixels[HEIGHT - BOTTOM, LEFT : WIDTH - RIGHT] = 90
    for i, (colour, curve) in enumerate(zip(_colours(points), points.values(), strict=True)):
        thick = 2 + 3 * (len(points) - 1 - i)  # where curves coincide, the ones below still show
        placed = [_place(x, min(y, bounds[3]), bounds) for x, y in curve]
        for start, end in itertools.pairwise(placed):
            _line(pixels, start, end, colour, thick)
    pixels = _label(pixels, title, points, ticks, bounds, axis)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png(pixels))


def png(pixels: Pixels) -> bytes:
    """Encode (height, width, 3) bytes."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _colours(curves: Mapping[str, object]) -> list[tuple[int, int, int]]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(curves))]


def _place(x: float, y: float, bounds: tuple[float, float, float, float]) -> tuple[int, int]:
    x0, x1, y0, y1 = bounds
    right = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT - 1)
    down = HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM - 1)
    return round(right), round(down)


def _line(
    pixels: Pixels, start: tuple[int, int], end: tuple[int, int], colour: tuple[int, int, int], thick: int
) -> None:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for t in np.linspace(0, 1, steps + 1):
        x, y = (round(a + (b - a) * t) - thick // 2 for a, b in zip(start, end, strict=True))
        pixels[max(y, 0) : y + thick, max(x, 0) : x + thick] = colour


def _label(
    pixels: Pixels,
    title: str,
    curves: Mapping[str, Curve],
    ticks: NDArray[np.float64],
    bounds: tuple[float, float, float, float],
    axis: str,
) -> Pixels:
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        return pixels
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 10), title, fill=(0, 0, 0))
    for y in ticks:
        draw.text((6, _place(0, float(y), bounds)[1] - 6), f"{y:.3f}", fill=(60, 60, 60))
    draw.text((LEFT, HEIGHT - 24), f"{bounds[0]:g}", fill=(60, 60, 60))
    draw.text((WIDTH - RIGHT - 90, HEIGHT - 24), f"{axis} {bounds[1]:g}", fill=(60, 60, 60))
    for i, (name, colour) in enumerate(zip(curves, _colours(curves), strict=True)):
        down = TOP + 8 + 18 * i
        draw.rectangle((WIDTH - 230, down + 4, WIDTH - 206, down + 7), fill=colour)
        draw.text((WIDTH - 198, down), name, fill=(0, 0, 0))
    return np.asarray(image, np.uint8)
