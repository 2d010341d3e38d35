"""Which lines count as changed: what may make a step grow, and neither renames nor what was only moved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ciuic_compile.gate.source_lines import Text, changes, parse

BEFORE = '''\
"""A model."""
import torch
import torch.nn.functional as F

WIDTH = 512


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)

    def forward(self, x):
        x = self.up(x)
        return F.relu(x)
'''


def known(text: str) -> Text:
    """What a baseline has of a file."""
    return replace(parse(text), lines=(), scopes=(), inert=frozenset())


def changed(*edits: tuple[str, str]) -> list[str]:
    """The lines that count as changed after these edits."""
    text = BEFORE
    for old, new in edits:
        assert text.count(old) >= 1
        text = text.replace(old, new)
    found = changes(known(BEFORE), parse(text))
    return [text.splitlines()[n - 1].strip() for n in sorted(found.changed)]


@pytest.mark.parametrize(
    "edit",
    [
        ("self.up", "self.widen"),
        ("x = self.up(x)\n        return F.relu(x)", "y = self.up(x)\n        return F.relu(y)"),
        ("Block", "Layer"),
        ('"""A model."""', '"""A better\n\nmodel."""'),
        ("        x = self.up(x)\n", '        """What it does."""\n\n        x = self.up(x)  # wider\n'),
        ("import torch\n", "import math\n\nimport torch\n"),
        ("        x = self.up(x)\n", "        assert x.dim() == 3\n        pass\n        x = self.up(x)\n"),
        ("class Block(torch.nn.Module):\n", "class Block(torch.nn.Module):\n\n"),
    ],
)
def test_what_changes_nothing(edit: tuple[str, str]) -> None:
    assert changed(edit) == []


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (("512", "640"), "WIDTH = 640"),
        (("F.relu", "F.silu"), "return F.silu(x)"),
        (("self.up(x)", "self.up(x).float()"), "x = self.up(x).float()"),
        (("(self, width)", "(self, width, scale=8)"), "def __init__(self, width, scale=8):"),
    ],
)
def test_what_may_make_a_step_grow(edit: tuple[str, str], line: str) -> None:
    assert changed(edit) == [line]
    assert changed(edit, ("self.up", "self.widen")) == [line.replace("self.up", "self.widen")]


def test_a_method_that_moved_is_where_it_is_now() -> None:
    start, end = BEFORE.index("    def __init__"), BEFORE.index("    def forward")
    text = BEFORE[:start] + BEFORE[end:] + "\n" + BEFORE[start:end]
    found = changes(known(BEFORE), parse(text))
    assert not found.changed and not found.removed
    before, now = BEFORE.splitlines(), text.splitlines()
    assert len(found.moved) == 10
    assert all(before[old - 1] == now[new - 1] for old, new in found.moved.items())


def test_a_line_that_is_gone_shows_in_what_comes_behind_it() -> None:
    assert changed(("        x = self.up(x)\n", "")) == ["return F.relu(x)"]
    found = changes(known(BEFORE), parse(BEFORE.replace("        x = self.up(x)\n", "")))
    assert found.removed == found.changed
