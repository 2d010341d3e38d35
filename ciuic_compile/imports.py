"""Which files a module, or the imports in a file, stand for; found without importing anything."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from itertools import accumulate
from pathlib import Path

_BY_NAME = ("import_module", "__import__")  # functions of which the argument is a module


def module_files(module: str, path: Sequence[str]) -> Iterator[Path]:
    """The files of a module and of the packages around it, outermost first; ends at the first not found.

    A module that is loaded is where it was loaded from, any other where Python would find it.

    Args:
        module: dotted name.
        path: folders to look in for its first part.
    """
    folders: Sequence[str] | None = path
    for name in accumulate(module.split("."), "{}.{}".format):
        loaded = sys.modules.get(name)
        if loaded is not None:
            file, folders = getattr(loaded, "__file__", None), getattr(loaded, "__path__", None)
        else:
            spec = PathFinder.find_spec(name, list(folders or ()))
            if spec is None:
                return
            file, folders = spec.origin if spec.has_location else None, spec.submodule_search_locations
        if isinstance(file, str):
            yield Path(file)
        if folders is None:
            return


def imported_files(file: Path, text: str, path: Sequence[str]) -> Iterator[Path]:
    """The files that a Python file's import statements name, those inside functions and branches too.

    Args:
        file: where the text is, for relative imports.
        text: the file's; one that is no Python names none.
        path: folders to look in for what is imported by its whole name.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from module_files(alias.name, path)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # each may be a module of its own
                name = ".".join(filter(None, (node.module, alias.name)))
                if node.level:
                    yield from _relative(file.absolute().parents[node.level - 1 :], name)
                else:
                    yield from module_files(name, path)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = node.args[0]
            if name in _BY_NAME and isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield from module_files(given.value, path)


def _relative(parents: Sequence[Path], name: str) -> Iterator[Path]:
    """The files of a module in the nearest of a file's folders, and that folder's own."""
    if not parents:
        return
    yield parents[0] / "__init__.py"
    folder: Path | None = parents[0]
    for part in name.split("."):
        if folder is None:
            return
        spec = PathFinder.find_spec(part, [os.fspath(folder)])
        if spec is None:
            return
        if spec.origin and spec.has_location:
            yield Path(spec.origin)
        folder = folder / part if spec.submodule_search_locations is not None else None
