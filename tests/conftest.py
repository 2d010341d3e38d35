"""What every test gets: its own Inductor caches, no state of another test's graphs, and the `gpu` marker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch is imported: nothing of this session may be read from, or left in, the user's caches
_SESSION = Path(tempfile.mkdtemp(prefix="ciuic-tests-"))
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_SESSION / "session")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers already fill the cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
