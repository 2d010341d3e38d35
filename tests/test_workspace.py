"""Formulas of external kernels' temporaries against those that an H200 measured (bench/workspaces.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ciuic_compile.workspace import workspace_bytes

MEASURED = Path(__file__).resolve().parent.parent / "bench" / "results" / "workspaces-h200.json"
ROWS = {row[0]: int(row[3]) for row in json.loads(MEASURED.read_text())["rows"] if row[3].isdigit()}
SIZES = {"bfloat16": 2, "float32": 4}


@pytest.mark.parametrize("name", [n for n in ROWS if "backward" in n and "x" in n and "convol" not in n])
def test_formulas(name: str) -> None:
    kind, shape, dtype = re.fullmatch(r"(\w+(?: backward)?) (.*) (\w+)", name).groups()  # type: ignore[union-attr]
    if kind == "embedding_dense_backward":
        tokens, _, size = map(int, re.findall(r"\d+", shape))
        expected = workspace_bytes(f"aten.{kind}.default", [(tokens, size), (tokens,)], SIZES[dtype])
    else:
        batch, heads, kv, rows, size = map(int, re.findall(r"\d+", shape))
        op = f"aten._scaled_dot_product_{kind.split()[0]}_attention_backward.default"
        q, k = (batch, heads, rows, size), (batch, kv, rows, size)
        expected = workspace_bytes(op, [q, q, k, k], SIZES[dtype])
    assert expected == pytest.approx(ROWS[name], rel=0.02)


def test_what_is_not_known_is_nothing() -> None:
    assert workspace_bytes("aten.mm.default", [(4, 4), (4, 4)], 4) == 0
    assert workspace_bytes("", [], 4) == 0
