"""tests/cxx/g++: the compiler runs once for a source and its options, and whatever it says is passed on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("cxx") / "g++"
COMPILER = """#!/bin/sh
echo "$@" >> "$CIUIC_TESTS_OBJECTS/calls"
while [ "$1" != -o ]; do
    case $1 in *.cpp) source=$1 ;; esac
    shift
done
grep -q wrong "$source" && exit 3
cp "$source" "$2"
"""


def test_the_compiler_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CIUIC_TESTS_CXX", str(compiler))
    monkeypatch.setenv("CIUIC_TESTS_OBJECTS", str(tmp_path))

    def compiles(name: str, source: str, *options: str) -> tuple[int, int]:
        """Exit status, and how often the compiler has run by then."""
        path = tmp_path / name / "kernel.cpp"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        target = path.with_suffix(".so")
        status = subprocess.run([PROGRAM, *options, path, "-o", target], check=False).returncode
        assert status or target.read_text() == source
        return status, len((tmp_path / "calls").read_text().splitlines())

    assert compiles("a", "one", "-O3") == (0, 1)
    assert compiles("b", "one", "-O3") == (0, 1), "the folder does not matter"
    assert compiles("b", "two", "-O3") == (0, 2)
    assert compiles("b", "two", "-O1") == (0, 3)
    assert compiles("a", "wrong", "-O3") == (3, 4)
    assert compiles("a", "wrong", "-O3") == (3, 5), "an error is no result"
    assert compiles("a", "two", "-O3") == (0, 5)
