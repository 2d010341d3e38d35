"""Targets on disk, and a way to run ``ciuic`` in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ciuic_compile.cli import main

TRAIN = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x):
        wide = torch.nn.functional.gelu(self.up(x))
        return x + self.down(wide)


def make_model():
    model = nn.Sequential(Block(), Block())
    return model, (torch.randn(512, 64), torch.randn(512, 64)), nn.functional.mse_loss
"""


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with ``train.py``, whose ``make_model`` is a target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


@pytest.fixture
def ciuic(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process."""

    def run(*argv: str) -> Ran:
        capsys.readouterr()
        status = main(argv)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run
