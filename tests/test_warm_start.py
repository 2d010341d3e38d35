"""Inductor's on-disk caches: a second process prints the same plan, and never another configuration's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).with_name("train_once.py")


@dataclass(frozen=True)
class Run:
    """What one process said: its plan text, and counters, plans and gradients as JSON."""

    plan_text: str
    hits: int
    misses: int
    plans: list[str]
    gradients: list[float]


def run(cache: Path, options: dict[str, object], environment: dict[str, str] | None = None) -> Run:
    """Train :data:`PROGRAM`'s model one step in a process of its own."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(options)],
        env={**env, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith(("ciuic plan", "  "))]
    return Run("\n".join(ours), **json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A cache folder that one run at 4:1 has filled, and that run."""
    cache = tmp_path_factory.mktemp("warm")
    return cache, run(cache, {"mode": "4:1"})


@pytest.mark.xdist_group("warm start")
def test_a_warm_start_compiles_nothing_and_prints_the_same_plan(cold: tuple[Path, Run]) -> None:
    cache, first = cold
    assert (first.hits, first.misses) == (0, 1) and len(first.plans) == 1
    assert first.plan_text.count("ciuic plan") == 1
    second = run(cache, {"mode": "4:1"}, {"PYTHONHASHSEED": "77"})
    assert (second.hits, second.misses) == (1, 0)
    assert second.plan_text == first.plan_text
    assert second.plans == first.plans
    assert second.gradients == first.gradients


@pytest.mark.xdist_group("warm start")
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "lossless"},
        {"mode": "6:1"},
        {"mode": "4:1", "group_size": 32},
        {"mode": "off"},
    ],
    ids=str,
)
def test_another_configuration_never_hits(cold: tuple[Path, Run], options: dict[str, object]) -> None:
    cache, first = cold
    other = run(cache, options)
    assert (other.hits, other.misses) == (0, 1)
    assert other.plans != first.plans
    assert (other.plans == []) == (options["mode"] == "off")


@pytest.mark.xdist_group("warm start")
def test_the_report_option_alone_still_hits(cold: tuple[Path, Run]) -> None:
    cache, first = cold
    quiet = run(cache, {"mode": "4:1", "report": "off"})
    assert (quiet.hits, quiet.plan_text, quiet.plans) == (1, "", first.plans)


def test_a_loss_in_chunks_hits_and_whole_it_does_not(tmp_path: Path) -> None:
    options = {"mode": "4:1", "cross_entropy": True, "chunk_loss": True, "loss_chunk_bytes": 256}
    first, second = run(tmp_path, options), run(tmp_path, options)
    assert "chunks of tokens" in first.plans[0]
    assert (first.hits, second.hits, second.misses) == (0, 1, 0)
    assert (second.plans, second.gradients) == (first.plans, first.gradients)
    whole = run(tmp_path, {**options, "chunk_loss": False})
    assert (whole.hits, whole.misses) == (0, 1)


@pytest.mark.xdist_group("warm start")
def test_a_lost_sidecar_still_prints_the_plan(cold: tuple[Path, Run]) -> None:
    cache, first = cold
    sidecars = list((cache / "ciuic").glob("*.json"))
    assert sidecars
    for path in sidecars:
        path.unlink()
    again = run(cache, {"mode": "4:1"})
    assert again.plan_text == first.plan_text and again.plans == first.plans
    assert again.gradients == first.gradients
    for path in (cache / "ciuic").glob("*.json"):
        path.write_text(path.read_text()[:100])  # a crash in the middle of a write, on a lesser file system
    assert run(cache, {"mode": "4:1"}).plan_text == first.plan_text


def test_code_of_a_process_that_never_wrote_its_plan_is_generated_again(tmp_path: Path) -> None:
    alone = {"TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # torch asks us, and then finds the code of our graphs
    first = run(tmp_path, {"mode": "4:1"}, alone)
    for path in (tmp_path / "ciuic").glob("*.json"):
        path.unlink()
    again = run(tmp_path, {"mode": "4:1"}, alone)
    assert again.plans == first.plans and '"replayed": true' in again.plans[0]


def test_plans_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / seed, {"mode": "4:1", "interpret": True}, {"PYTHONHASHSEED": seed}) for seed in "12"
    ]
    assert runs[0].plans == runs[1].plans != []
    assert runs[0].plan_text == runs[1].plan_text
