"""Files that a command writes: all of them or none, each whole, and none that it reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ciuic_compile.errors import OptionError, OutputError
from ciuic_compile.imports import module_files
from ciuic_compile.writing import is_special, write_files


def check(outputs: Iterable[str | os.PathLike[str] | None], inputs: Iterable[str] = ()) -> None:
    """Refuse before the work is done what could not, or should not, be written after it.

    Args:
        inputs: files that the command reads; they need not exist.

    Raises:
        OptionError: an output that is an input.
        OutputError: a folder that is not there or not writable, a path that is a folder, one given twice.
    """
    given = [os.fspath(path) for path in outputs if path is not None]
    read = {os.path.realpath(path) for path in inputs}
    for path in given:
        if os.path.isdir(path):
            raise _cannot(path, "it is a folder", "name a file in it")
        if is_special(path):
            continue
        named = os.path.realpath(path)
        if named in read or any(_same(named, file) for file in read):
            raise OptionError(
                f"output {path!r}: this command reads that file, and would overwrite it\n"
                "  valid: a file that is no input of the same command\n  fix: name another file"
            )
        folder = os.path.dirname(named)
        if not os.path.isdir(folder):
            raise _cannot(path, f"there is no folder {folder!r}", "make the folder first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _cannot(path, f"the folder {folder!r} cannot be written", "name a file in another one")
    files = [os.path.realpath(path) for path in given if not is_special(path)]
    if len(set(files)) < len(files):
        raise OutputError("two outputs have the same path\n  fix: give each a file of its own")


def write(texts: Mapping[str, str]) -> None:
    """Write each text to its path (:func:`~ciuic_compile.writing.write_files`).

    Raises:
        OutputError: one of them cannot be written; every file is as it was then.
    """
    try:
        write_files(texts)
    except OSError as error:
        why = error.strerror or str(error)
        raise _cannot(str(error.filename), why, "free the disk, or name another file") from error


def read_for(target: str, options: Mapping[str, Any] | None = None, device: object = None) -> list[str]:
    """The files that planning a target reads, as far as they are known before its code runs.

    Args:
        target: as the user wrote it; a module counts with the packages around it.
        options: of the backend: device and calibration may be files.
        device: the option ``device`` where it is not among them.
    """
    name, colon, _ = target.rpartition(":")
    name = name if colon else target
    found = [name, os.path.join(name, "config.json")]
    if not name.endswith(".py") and os.sep not in name:
        found += map(str, module_files(name, [os.getcwd(), *sys.path]))
    given = options or {}
    for value in (device, given.get("device"), given.get("calibration")):
        if isinstance(value, (str, Path)) and str(value).endswith(".json"):
            found.append(os.path.expanduser(value))
    return found


def _same(a: str, b: str) -> bool:
    """Whether two names are of one file (hard links, a file system without case)."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _cannot(path: str, why: str, fix: str) -> OutputError:
    return OutputError(f"cannot write {path!r}: {why}\n  fix: {fix}")
