"""What every test gets: its own Inductor caches, no state of another test's graphs, and the `gpu` marker."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch is imported: nothing of this session may be read from, or left in, the user's caches
_SESSION = Path(tempfile.mkdtemp(prefix="ciuic-tests-"))
atexit.register(shutil.rmtree, _SESSION, ignore_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_SESSION / "session")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers already fill the cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _compile_once(folder: Path) -> None:
    """Put ``tests/cxx/g++`` before the real one, here and in all that is started: xdist's workers too."""
    compiler = shutil.which("g++")
    if compiler is None or "CXX" in os.environ or "CIUIC_TESTS_CXX" in os.environ:
        return
    stubs = folder / "stubs"
    stubs.mkdir(parents=True)
    for library in ("torch", "torch_cpu", "torch_python", "c10"):
        named = ("-o", stubs / f"lib{library}.so", f"-Wl,-soname,lib{library}.so")
        subprocess.run([compiler, "-shared", "-nostdlib", "-x", "c", os.devnull, *named], check=True)
    os.environ["CIUIC_TESTS_CXX"], os.environ["CIUIC_TESTS_OBJECTS"] = compiler, str(folder)
    os.environ["PATH"] = f"{Path(__file__).with_name('cxx')}{os.pathsep}{os.environ['PATH']}"


_compile_once(_SESSION / "objects")

import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With CIUIC_SAY_AT_ONCE, say at once why a test failed: a run on a lent machine may be cut short."""
    if report.failed and os.environ.get("CIUIC_SAY_AT_ONCE"):
        print(f"\n{report.nodeid}\n{report.longreprtext[-3000:]}", flush=True)


@pytest.fixture(autouse=True)
def inductor_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty on-disk Inductor cache for this test alone; Dynamo forgets its graphs before and after."""
    folder = tmp_path_factory.mktemp("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    yield folder
    torch._dynamo.reset()
