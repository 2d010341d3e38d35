"""Which lines of the user's program changed since the baseline was accepted, without asking git.

A baseline keeps two short hashes of every line of the files that define a model: of the line, and of the
line without the names in it. Comments, docstrings, blank lines and indentation do not count. A CI job's
checkout is often shallow, and a baseline may be older than a branch:
hashes need neither history nor the old text.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import io
import keyword
import os
import sys
import tokenize
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ciuic_compile.imports import imported_files, module_files

_SKIPPED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip
_IDLE = (ast.Pass, ast.Import, ast.ImportFrom, ast.Assert, ast.Raise)
_OURS = Path(__file__).parents[1]
_INSTALLED = ("/site-packages/", "/dist-packages/", f"/lib/python{sys.version_info[0]}.")


@dataclass(frozen=True)
class Text:
    """One source file: hashes of its lines that have code, and where these lines are.

    Attributes:
        hashes: of each line.
        numbers: of these lines.
        lines: of the whole file; none where only hashes are known.
        scopes: first and last line of every class and function at the top level.
        shapes: hashes of the lines with every name that the user may choose as the same word.
        inert: lines that make no tensor and say no size: imports, headers without defaults, pass, assert.
    """

    hashes: tuple[str, ...]
    numbers: tuple[int, ...]
    lines: tuple[str, ...]
    scopes: tuple[tuple[int, int], ...] = ()
    shapes: tuple[str, ...] = ()
    inert: frozenset[int] = frozenset()

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
    names: dict[int, list[str]] = {}
    try:
        tree = ast.parse(text)
        words = _docstrings(tree)
        before = ["", ""]
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _SKIPPED and token.start[0] not in words:
                tokens.setdefault(token.start[0], []).append(token.string)
                names.setdefault(token.start[0], []).append(_shape(token, before))
                before = [before[1], token.string]
        scopes, inert = _scopes(tree), _inert(tree)
    except (tokenize.TokenError, SyntaxError, ValueError):
        tokens = names = {i: [line.strip()] for i, line in enumerate(lines, 1) if line.strip()}
        scopes, inert = (), frozenset()
    numbers = tuple(sorted(tokens))
    hashes = tuple(_hash(tokens[n], 6) for n in numbers)
    return Text(hashes, numbers, lines, scopes, tuple(_hash(names[n], 4) for n in numbers), inert)


def _hash(words: Iterable[str], digits: int) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:digits]


def _shape(token: tokenize.TokenInfo, before: Sequence[str]) -> str:
    """A token, or "name" for a name that the user may choose: not torch's, Python's or a keyword."""
    known = keyword.iskeyword(token.string) or hasattr(builtins, token.string) or token.string == "self"
    attribute = before[1] == "." and before[0] != "self"
    return token.string if token.type != tokenize.NAME or known or attribute else "name"


def _docstrings(tree: ast.Module) -> set[int]:
    """Lines of strings that are statements."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.update(_extent(node))
    return lines


def _extent(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _inert(tree: ast.Module) -> frozenset[int]:
    """Lines that cannot make a step grow by themselves."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _IDLE):
            lines.update(_extent(node))
            continue
        header = isinstance(node, ast.ClassDef) and not node.keywords
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            header = not any((*node.args.defaults, *node.args.kw_defaults))
        elif isinstance(node, ast.If):
            header = all(isinstance(n, _IDLE) for n in node.body)
        if header:
            lines.update(range(node.lineno, node.body[0].lineno))  # type: ignore[attr-defined]
    return frozenset(lines)


def _scopes(tree: ast.Module) -> tuple[tuple[int, int], ...]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in tree.body
        if isinstance(node, kinds)
    )


def changes(old: Text, new: Text) -> Changes:
    """Compare a file with the hashes that a baseline has of it.

    A line in which nothing but names is different counts as the same: as a rule something was renamed.
    """
    moved: dict[int, int] = {}
    gone: dict[int, int] = {}  # index of a line that is not at its place any more -> index of what is there
    come: list[int] = []
    for tag, i, j, k, m in _opcodes(old.hashes, new.hashes):
        parts = _opcodes(old.shapes[i:j], new.shapes[k:m]) if tag != "equal" else [(tag, 0, j - i, 0, m - k)]
        for what, a, b, c, d in parts:
            if what == "equal":
                moved.update(zip(old.numbers[i + a : i + b], new.numbers[k + c : k + d], strict=True))
            else:
                gone |= {i + n: min(k + c + n - a, k + d) for n in range(a, b)}
                come += range(k + c, k + d)
    for kind in ("hashes", "shapes"):  # what was moved elsewhere, first as it was, then with other names
        there: dict[str, list[int]] = {}
        for n in gone:
            there.setdefault(getattr(old, kind)[n], []).append(n)
        for n in tuple(come):
            if found := there.get(getattr(new, kind)[n]):
                moved[old.numbers[found[0]]] = new.numbers[n]
                del gone[found.pop(0)]
                come.remove(n)
    changed = {new.numbers[n] for n in come} - new.inert
    removed = set()
    for n, at in gone.items():
        number = new.numbers[min(at, len(new.numbers) - 1)] if new.numbers else 1
        moved[old.numbers[n]] = number
        if number not in changed and at not in come:
            removed.add(number)
    return Changes(frozenset(changed | removed), frozenset(removed), moved)


def _opcodes(old: Sequence[str], new: Sequence[str]) -> Sequence[tuple[str, int, int, int, int]]:
    return SequenceMatcher(None, old, new, autojunk=False).get_opcodes()


def user_files(model: object, target: str, traced: Iterable[str], root: Path) -> dict[str, Text]:
    """The user's own files behind a target, by the names that plans have for them.

    They are the target's, those of the model's classes, those that were traced, and whatever all of these
    import, wherever they do: a constant of another module leaves no trace in a plan. Which modules happen to
    be loaded does not matter, so the same program always has the same files. What is installed does not
    count: its version does. Files that the program opens are not known.

    Args:
        model: an ``nn.Module``, whose classes' files count; anything else has none.
        target: of an entry; a Hugging Face folder's config.json is a source, too.
        traced: files that plans name, relative to ``root`` or absolute.
        root: what names are relative to.
    """
    name = target.rpartition(":")[0] or target
    search = list(dict.fromkeys(str(p) for p in (root, (root / name).parent, *sys.path)))
    paths = [root / file for file in (*sorted(traced), name)] + [root / name / "config.json"]
    if not name.endswith(".py") and os.sep not in name:
        paths += module_files(name, search)
    for part in {type(m) for m in getattr(model, "modules", list)()}:
        code = getattr(inspect.unwrap(part.forward), "__code__", None)
        paths += [Path(code.co_filename)] if code is not None else []
    texts: dict[Path, Text] = {}
    waiting, seen = deque(p.absolute() for p in paths), set[Path]()
    while waiting:
        path = Path(os.path.normpath(waiting.popleft()))
        if path in seen or _is_foreign(path) or not path.is_file():
            continue
        seen.add(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts[path] = parse(text)
        waiting += imported_files(path, text, search)
    found: dict[str, Text] = {}
    for path in sorted(texts, key=lambda path: (not path.is_relative_to(root), path)):
        found[_label(path, root, found)] = texts[path]
    return dict(sorted(found.items()))


def _is_foreign(path: Path) -> bool:
    """Whether a file is not the user's: installed, Python's own, or this package's."""
    return any(mark in path.as_posix() for mark in _INSTALLED) or path.is_relative_to(_OURS)


def _label(path: Path, root: Path, taken: Container[str]) -> str:
    """A file's name: below ``root``, elsewhere as short as it can be without being another one's."""
    if path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    parts = path.parts
    names = ("/".join(parts[-n:]) for n in range(1, len(parts)))
    return next((name for name in names if name not in taken), path.as_posix())


def digest(texts: Mapping[str, Any]) -> str:
    """A hash of the hashes: equal where no line of code changed in any file."""
    parts = [f"{name} {' '.join(text.hashes)}" for name, text in sorted(texts.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
