"""Real text on every machine: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB = 256


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out: other files, spread over the library."""

    train: Tensor
    held_out: Tensor

    def batch(
        self, seed: int, step: int, batch: int, seq: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Random windows and the bytes that follow; the same for the same seed and step anywhere."""
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - seq, (batch,), generator=source).tolist()
        return _windows(self.train, starts, seq, device)

    def validation(
        self, count: int, batch: int, seq: int, device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """The same ``count`` batches every time, spread evenly over the held-out text."""
        last = len(self.held_out) - seq - 1
        starts = torch.linspace(0, last, count * batch).long().tolist()
        return [
            _windows(self.held_out, starts[i * batch : (i + 1) * batch], seq, device) for i in range(count)
        ]


def load(limit: int = 32 << 20) -> Corpus:
    """Read the library's modules in the order of their paths, every tenth of them held out.

    Args:
        limit: most bytes to read.

    Raises:
        FileNotFoundError: this Python came without the sources of its library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    files = sorted(p for p in folder.rglob("*.py") if not skip & set(p.relative_to(folder).parts))
    for i, path in enumerate(files):
        text = path.read_bytes()
        parts[i % 10 == 9].append(text)
        size += len(text)
        if size >= limit:
            break
    if not parts[1]:
        raise FileNotFoundError(f"no Python sources under {folder}")
    train, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return Corpus(train, held_out)


def _windows(text: Tensor, starts: list[int], seq: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.stack([text[s : s + seq + 1] for s in starts]).long()
    return rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)
