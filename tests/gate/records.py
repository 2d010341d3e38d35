"""Records made by hand, for tests that plan nothing."""

from __future__ import annotations

from typing import Any

from ciuic_compile.gate.record import Fixed, Place, Record, Row
from ciuic_compile.gate.source_lines import parse

CODE = (
    "class Net(nn.Module):",
    "    def forward(self, x):",
    "        h = self.up(x)",
    "        h = gelu(h)",
    "        return self.down(h)",
    "",
    "def make():",
    "    batch = 8",
    "    return Net(), zeros(batch, 4)",
)


def row(code: str, line: int, module: str = "", dtype: str = "bfloat16", **figures: Any) -> Row:
    """A row of ``model.py``; ``nbytes`` stands for every figure that is not given."""
    n = figures.pop("nbytes", 1024)
    values = dict.fromkeys(("saved", "inductor_saved", "peak", "inductor_peak"), n) | {"count": 2, **figures}
    place = Place(module, "aten.mm", dtype, code.strip(), "model.py", line)
    values.setdefault("codecs", "keep x2")
    values.setdefault("shapes", ((8, n // 8),))
    return Row(place, nbytes=n, **values)


def rows(
    sizes: tuple[int, int, int] = (1024, 2048, 1024), first: int = 3, dtype: str = "bfloat16"
) -> tuple[Row, ...]:
    """Rows of the three lines of ``forward``, which begin at line ``first``."""
    return tuple(
        row(CODE[2 + i], first + i, "blocks.*", dtype, nbytes=n, order=i) for i, n in enumerate(sizes) if n
    )


def make_record(lines: tuple[str, ...] = CODE, made: tuple[Row, ...] | None = None, **more: Any) -> Record:
    """A record of ``model.py`` with that text."""
    made = rows() if made is None else made
    values: dict[str, Any] = {
        "target": "model.py:make",
        "settings": {"device": "h200", "autocast": None, "dynamic": False, "options": {"mode": "4:1"}},
        "environment": {"torch": "2.13.0", "python": "3.11"},
        "peak_bytes": sum(r.peak for r in made),
        "saved_bytes": sum(r.saved for r in made),
        "inductor_peak_bytes": sum(r.inductor_peak for r in made),
        "inductor_saved_bytes": sum(r.inductor_saved for r in made),
        "input_bytes": 512,
        "time_us": 10.0,
        "error": 0.01,
        "graphs": 1,
        "inputs": (Fixed("0", "float32", (8, 4), 1, 128),),
        "parameters": (
            Fixed("up.weight", "float32", (4, 8), 1, 128),
            Fixed("down.weight", "float32", (8, 8), 1, 256),
        ),
        "rows": made,
        "files": {"model.py": parse("\n".join(lines) + "\n")},
    }
    return Record(**{**values, **more})
