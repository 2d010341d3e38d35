"""Files that a command writes: all of them or none, each whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence

from ciuic_compile.errors import OutputError


def check(paths: Sequence[str | None]) -> None:
    """Refuse before the work is done what could not be written after it.

    Raises:
        OutputError: a folder that is not there or not writable, a path that is a folder, one given twice.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path):
            raise _cannot(path, "it is a folder", "name a file in it")
        if not os.path.isdir(folder):
            raise _cannot(path, f"there is no folder {folder!r}", "make the folder first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _cannot(path, f"the folder {folder!r} cannot be written", "name a file in another one")
    if len({os.path.abspath(path) for path in given}) < len(given):
        raise OutputError("two outputs have the same path\n  fix: give each a file of its own")


def write(texts: Mapping[str, str]) -> None:
    """Write each text to its path, by way of temporary files: a reader sees the old file or the new one.

    Raises:
        OutputError: one of them cannot be written; every file is as it was then.
    """
    temporary: dict[str, str] = {}
    path = ""
    try:
        for path, text in texts.items():
            temporary[path] = f"{path}.{os.getpid()}.tmp"
            with open(temporary[path], "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
        for path, name in temporary.items():
            os.replace(name, path)
    except OSError as error:
        raise _cannot(path, error.strerror or str(error), "free the disk, or name another file") from error
    finally:
        for name in temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(name)


def _cannot(path: str, why: str, fix: str) -> OutputError:
    return OutputError(f"cannot write {path!r}: {why}\n  fix: {fix}")
