"""HiGHS without what it prints: scipy's build writes to the process's stdout when it repairs a solution."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scipy.optimize import milp

_PREFIX = b"HighsMip"


def quiet_milp(*args: Any, **kwargs: Any) -> Any:
    """``scipy.optimize.milp``, with HiGHS's own lines taken out of stdout."""
    with _without_lines(_PREFIX):
        return milp(*args, **kwargs)


@contextmanager
def _without_lines(prefix: bytes) -> Iterator[None]:
    """Hold back what is written to file descriptor 1; then write all but those lines (other threads')."""
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # stdout is closed, or never was
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            held.seek(0)
            rest = b"".join(line for line in held if not line.startswith(prefix))
            while rest:
                rest = rest[os.write(1, rest) :]
