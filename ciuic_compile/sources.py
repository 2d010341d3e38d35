"""Where in the user's program a graph's value was made: module path, file, line, and the line itself."""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path

import torch
from torch import fx

from .types import Source

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)  # planning.py calls the model
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n(?P<code>[^\n]*)')
_PACKAGES = re.compile(r".*/(?:site|dist)-packages/")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


def source_of(node: fx.Node) -> Source:
    """The user's line and module behind a node (torch's own frames and ours are skipped).

    A node of the backward has those of the forward's call that it belongs to.
    """
    meta = node.meta
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    module = _module(str(list(stack.values())[-1][0])) if stack else ""
    file, line, code = _frame(meta.get("stack_trace") or "")
    return Source(portable(file), line, code, module) if file else Source(module=module)


def portable(file: str) -> str:
    """A path that says the same on every machine: below its installed package, the working directory or the
    folder of ``sys.path`` that it was imported from; of anything else the name alone."""
    return _portable(file, _working_directory(), tuple(sys.path))


@functools.lru_cache(4096)
def _frame(trace: str) -> tuple[str, int, str]:
    frames = [m for m in _FRAME.finditer(trace) if not m["file"].startswith(_OURS)]
    users = [m for m in frames if not m["file"].startswith(_TORCH)]
    frame = (users or frames)[-1] if frames else None
    return ("", 0, "") if frame is None else (frame["file"], int(frame["line"]), frame["code"].strip())


@functools.lru_cache(4096)
def _module(path: str) -> str:
    path = re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path)
    return re.sub(r"\._modules\[['\"](\w+)['\"]\]|\[['\"]?(\w+)['\"]?\]", r".\1\2", path)


@functools.lru_cache(4096)
def _portable(file: str, here: str, places: tuple[str, ...]) -> str:
    slashed = file.replace("\\", "/")
    if not _ABSOLUTE.match(slashed):
        return slashed.removeprefix("./")
    if packaged := _PACKAGES.match(slashed):
        return slashed[packaged.end() :]
    folders = [here, *sorted(places, key=len, reverse=True)]
    for folder in (f.replace("\\", "/").rstrip("/") + "/" for f in folders if f):
        if folder != "/" and slashed.startswith(folder):
            return slashed[len(folder) :]
    return slashed.rsplit("/", 1)[-1]


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""
