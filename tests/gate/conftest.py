"""A small guarded model in a folder of its own, records made by hand, and a way to run ``ciuic``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ciuic_compile.cli import main

MODEL = """\
import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x):
        wide = self.up(self.norm(x))
        return x + self.down(F.gelu(wide))


class Net(nn.Module):
    def __init__(self, d=64, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.head = nn.Linear(d, 32)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make():
    batch = 512
    return Net(), (torch.randn(batch, 64), torch.randn(batch, 32)), F.mse_loss
"""

SETTINGS = """\
[ciuic]
device = "h200"
mode = "lossless"
min_abs = 0

[[entry]]
name = "net"
target = "model.py:make"
"""


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def ciuic(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process."""

    def run(*argv: str) -> Ran:
        capsys.readouterr()
        status = main(argv)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ran(status, captured.out, captured.err)

    return run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``model.py`` and ``ciuic.toml``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "ciuic.toml").write_text(SETTINGS)
    return tmp_path


@pytest.fixture
def edit(project: Path) -> Callable[..., int]:
    """Replace text in ``model.py``; returns the line at which the new text begins."""

    def replace(old: str, new: str, find: str | None = None) -> int:
        assert old in MODEL
        text = MODEL.replace(old, new)
        (project / "model.py").write_text(text)
        return text[: text.index(find or new)].count("\n") + 1

    return replace
