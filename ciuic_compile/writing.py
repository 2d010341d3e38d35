"""Writing files: each of them whole, and all of them or none."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from typing import Final

_STREAM: Final = re.compile(r"/dev/(?P<name>stdout|stderr)|/(?:dev|proc/self)/fd/(?P<number>\d+)", re.ASCII)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write one file as :func:`write_files` does."""
    write_files({os.fspath(path): content})


def write_files(contents: Mapping[str, str | bytes]) -> None:
    """Write every file: a reader sees each as it was or complete, and where one fails all are as they were.

    New files are written beside the old ones and moved into place when all are there. Of a symbolic link,
    what it names is replaced and the link stays. A device, a pipe or another special file gets the text
    itself, before anything is moved: that alone cannot be taken back.

    Args:
        contents: by path; text is written as UTF-8.

    Raises:
        OSError: of the first path that cannot be written, which is its ``filename``.
    """
    mark = f"{os.getpid()}.{threading.get_ident()}"
    straight = [path for path in contents if is_special(path)]
    moves: list[tuple[str, str, str]] = []  # path, the file that it names, the new one
    kept: dict[str, str] = {}  # file -> a second name of what it was
    moved: list[str] = []
    try:
        for path, content in contents.items():
            if path not in straight:
                with _about(path):
                    file = _named(path)
                    moves.append((path, file, f"{file}.{mark}.tmp"))
                    _write_new(file, moves[-1][2], _encoded(content))
        for path in straight:
            with _about(path):
                _append(path, _encoded(contents[path]))
        for path, file, _ in moves[:-1]:  # after the last one nothing can fail
            with _about(path):
                if os.path.exists(file):
                    kept[file] = f"{file}.{mark}.old"
                    _keep(file, kept[file])
        for path, file, new in moves:
            with _about(path):
                os.replace(new, file)
            moved.append(file)
    except BaseException:
        for file in moved:
            with contextlib.suppress(OSError):
                os.replace(kept.pop(file), file) if file in kept else os.unlink(file)
        raise
    finally:
        for name in (*(new for _, _, new in moves), *kept.values()):
            with contextlib.suppress(OSError):
                os.unlink(name)


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Name the caller's path in an error, not the file that was written in its place."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise


def is_special(path: str) -> bool:
    """Whether it is neither a file nor a folder that is there, but a device, a pipe or an open stream."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: str) -> int | None:
    """The open file that a path such as ``/dev/stdout`` stands for, wherever it was redirected to."""
    match = _STREAM.fullmatch(os.path.abspath(path))
    return None if match is None else int(match["number"] or {"stdout": 1, "stderr": 2}[match["name"]])


def _named(path: str) -> str:
    """The file behind symbolic links, whether it is there or not."""
    file = os.path.realpath(path)
    if os.path.islink(file):  # links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return file


def _write_new(old: str, new: str, content: bytes) -> None:
    with open(new, "wb") as file:
        file.write(content)
    with contextlib.suppress(OSError):
        shutil.copymode(old, new)


def _append(path: str, content: bytes) -> None:
    """Write into what is there, behind what was written to it before."""
    number = _descriptor(path)
    opened = os.open(path, os.O_WRONLY | os.O_APPEND) if number is None else os.dup(number)
    with open(opened, "wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]


def _keep(file: str, name: str) -> None:
    """Give a file a second name; a copy of it, where the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)


def _encoded(content: str | bytes) -> bytes:
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
