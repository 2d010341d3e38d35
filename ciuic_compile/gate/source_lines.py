"""Which lines of the user's program changed since the baseline was accepted, without asking git.

A baseline keeps a short hash of every line of the files that define a model. Comments, blank lines and
indentation do not count. A CI job's checkout is often shallow, and a baseline may be older than a branch:
hashes need neither history nor the old text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import sys
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from types import ModuleType
from typing import Any

_SKIPPED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip
_INSTALLED = ("/site-packages/", "/dist-packages/", f"/lib/python{sys.version_info[0]}.")


@dataclass(frozen=True)
class Text:
    """One source file: hashes of its lines that have code, and where these lines are."""

    hashes: tuple[str, ...]
    numbers: tuple[int, ...]
    lines: tuple[str, ...]  # of the whole file
    scopes: tuple[tuple[int, int], ...] = ()  # first and last line of every class and function, outer first

    def scope(self, line: int) -> tuple[int, int]:
        """The outermost class or function around a line; (0, 0) at module level."""
        return next((s for s in self.scopes if s[0] <= line <= s[1]), (0, 0))

    def code(self, line: int) -> str:
        """A line's text without white space around it; empty where there is none."""
        return self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""


@dataclass(frozen=True)
class Changes:
    """How one file differs from its baseline.

    Attributes:
        changed: lines that are new or different, and the line behind what was removed.
        removed: those of ``changed`` before which lines were removed, and no line came in their place.
        moved: line in the baseline -> line now, for what is the same or was replaced.
    """

    changed: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()
    moved: Mapping[int, int] = field(default_factory=dict)


def parse(text: str) -> Text:
    """Hash a file's lines; a file that is no Python is hashed line by line as it is."""
    lines = tuple(text.splitlines())
    tokens: dict[int, list[str]] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _SKIPPED:
                tokens.setdefault(token.start[0], []).append(token.string)
        scopes = _scopes(ast.parse(text))
    except (tokenize.TokenError, SyntaxError, ValueError):
        tokens = {i: [line.strip()] for i, line in enumerate(lines, 1) if line.strip()}
        scopes = ()
    numbers = tuple(sorted(tokens))
    hashes = tuple(hashlib.sha256(" ".join(tokens[n]).encode()).hexdigest()[:6] for n in numbers)
    return Text(hashes, numbers, lines, scopes)


def _scopes(tree: ast.Module) -> tuple[tuple[int, int], ...]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in tree.body
        if isinstance(node, kinds)
    )


def changes(old: tuple[str, ...], old_numbers: tuple[int, ...], new: Text) -> Changes:
    """Compare a file with the hashes that a baseline has of it."""
    changed: set[int] = set()
    removed: set[int] = set()
    moved: dict[int, int] = {}
    for tag, i, j, k, m in SequenceMatcher(None, old, new.hashes, autojunk=False).get_opcodes():
        here = new.numbers[k:m]
        if tag == "equal":
            moved.update(zip(old_numbers[i:j], here, strict=True))
        elif tag == "delete":
            behind = new.numbers[min(k, len(new.numbers) - 1)] if new.numbers else 1
            changed.add(behind)
            removed.add(behind)
        else:
            changed.update(here)
            for offset, number in enumerate(old_numbers[i:j]):
                moved[number] = here[min(offset, len(here) - 1)]
    return Changes(frozenset(changed), frozenset(removed), moved)


def user_files(model: object, target: str, traced: Iterable[str], root: Path) -> dict[str, Text]:
    """The user's own files behind a target, by the names that plans have for them.

    Args:
        model: an ``nn.Module``, whose classes' files count; anything else has none.
        target: of an entry; a Hugging Face folder's config.json is a source, too.
        traced: files that plans name, relative to ``root`` or absolute.
        root: what names are relative to.
    """
    paths = [root / name for name in traced]
    name = target.rpartition(":")[0] or target
    paths += [root / name, root / name / "config.json"]
    module = sys.modules.get(name)
    paths += [Path(module.__file__)] if isinstance(module, ModuleType) and module.__file__ else []
    for part in {type(m) for m in getattr(model, "modules", list)()}:
        code = getattr(inspect.unwrap(part.forward), "__code__", None)
        paths += [Path(code.co_filename)] if code is not None else []
    found: dict[str, Text] = {}
    for path in dict.fromkeys(p.absolute() for p in paths):
        slashed = path.as_posix()
        if any(mark in slashed for mark in _INSTALLED) or not path.is_file():
            continue
        label = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        try:
            found.setdefault(label, parse(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            continue
    return dict(sorted(found.items()))


def digest(texts: Mapping[str, Any]) -> str:
    """A hash of the hashes: equal where no line of code changed in any file."""
    parts = [f"{name} {' '.join(text.hashes)}" for name, text in sorted(texts.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
