"""Runs test_kernels.py under Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    here = Path(__file__).resolve()
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(here.with_name("test_kernels.py")),
            "-q",
            "-k",
            "cpu",
            "-p",
            "no:cacheprovider",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout
