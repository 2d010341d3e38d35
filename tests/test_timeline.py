"""The blocks of a plan's timeline are what the simulator adds up, and their names do not move."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ciuic_compile
from ciuic_compile import compat, partitioner
from ciuic_compile.analyze import MemoryModel
from ciuic_compile.capture import owner
from ciuic_compile.passes import Graphs
from ciuic_compile.report import from_json, to_json
from ciuic_compile.simulate import (
    Peaks,
    Step,
    _size,
    _Target,
    changes_by_step,
    output_nodes,
    saved_storages,
    simulate,
    tensor_bytes,
)
from ciuic_compile.sources import portable
from ciuic_compile.types import Action, Plan, Role, Timeline, Track
from tests.training import SMALL, ZOO, interpreted

ROOT = Path(__file__).resolve().parent.parent


def planned(model: nn.Module, inputs: list[Tensor], **options: Any) -> tuple[Plan, Graphs, Graphs]:
    """The plan of a model, and the graphs that were simulated: Inductor's own, and the plan's."""
    seen: list[Graphs] = []
    real = partitioner.timeline

    def record(model: MemoryModel, after: Graphs, before: Graphs, *peaks: Peaks) -> Timeline:
        seen[:] = [before, after]
        return real(model, after, before, *peaks)

    options = {"min_bytes": SMALL, "report": "off", **options}
    torch._dynamo.reset()
    with interpreted(), mock.patch.object(partitioner, "timeline", record):
        torch.compile(model, backend="ciuic", options=options)(*inputs)
    (plan,) = ciuic_compile.plans()
    return plan, *seen  # type: ignore[return-value]


@functools.cache
def attention() -> Plan:
    """The plan of one small transformer block at 4:1."""
    make, inputs = ZOO["attention"]
    return planned(make(), inputs(), mode="4:1")[0]


def simulated(graphs: Graphs, reorder: bool) -> list[int]:
    """Bytes alive at every step, by the simulator."""
    forward, backward, count = graphs.forward.graph, graphs.backward.graph, graphs.num_fwd_outputs
    outputs = {owner(n) for n in output_nodes(forward)[:count]} - set(forward.find_nodes(op="placeholder"))
    names = {n.name for n in saved_storages(forward, count) if owner(n) not in outputs}
    arriving = backward.find_nodes(op="placeholder")
    beside = [*outputs, *(n for n in arriving if "tangents" in n.name)]
    target = _Target(compat.prefers_channels_last(forward, None), None)
    hints: dict[Any, int] = {}
    live = {n: _size(n.meta.get("val"), hints) for n in arriving if n.name in names}
    early, late = simulate(forward, backward, count, reorder=reorder).schedules
    first = curve(changes_by_step(early, {}, target, hints), hints)[1:]
    rest = sum(tensor_bytes(n.meta.get("val")) for n in beside)
    return first + [c + rest for c in curve(changes_by_step(late, live, target, hints), hints)]


def curve(steps: list[Step], hints: dict[Any, int]) -> list[int]:
    """Most bytes alive during each step."""
    found, live = [], 0
    for step in steps:
        sums = list(accumulate((hints.get(size, size) * count for size, count in step.changes), initial=live))
        found.append(max(sums[1:] or sums))
        live = sums[-1]
    return found


def track_is_sound(track: Track, steps: int) -> None:
    assert len(track.steps) == steps
    assert all(0 <= b.first <= b.last < steps and b.nbytes > 0 for b in track.blocks)
    assert len({b.id for b in track.blocks}) == len(track.blocks)
    assert all(b.role is Role.SAVED for b in track.blocks if "~" in b.id), (
        "only views of another size are in two"
    )
    assert [b.first for b in track.blocks] == sorted(b.first for b in track.blocks)


CASES = [
    ("mlp with dropout", {"mode": "4:1"}),
    ("attention", {"mode": "lossless"}),
    ("attention", {"mode": "6:1"}),
    ("convnet", {"mode": "4:1"}),
    ("embedding", {"mode": "2:1"}),
    ("llama", {"mode": "4:1"}),
    ("llama", {"mode": "2:1", "chunk_ffn": True}),
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_blocks_add_up_to_the_simulators_curve(name: str, options: dict[str, Any]) -> None:
    make, inputs = ZOO[name]
    torch.manual_seed(0)
    plan, before, after = planned(make(), inputs(), **options)
    timeline = plan.timeline
    assert timeline is not None
    for track, graphs, reorder in ((timeline.baseline, before, False), (timeline.planned, after, True)):
        expected = simulated(graphs, reorder)
        assert track.totals() == expected
        track_is_sound(track, len(expected))
    assert timeline.baseline.peak_bytes == plan.baseline_peak_bytes
    assert timeline.planned.peak_bytes == plan.simulated_peak_bytes
    # what waits between the graphs is what the plan says is saved
    start = timeline.planned.forward_steps
    waiting = [b for b in timeline.planned.alive(start) if b.role is Role.SAVED]
    outputs = sum(b.nbytes for b in timeline.planned.alive(start) if b.role is Role.RETURNED)
    assert 0 <= plan.planned_saved_bytes - sum(b.nbytes for b in waiting) <= outputs
    lines = {timeline.line(b).file for b in timeline.planned.blocks}
    assert all(not f.startswith("/") for f in lines)


def test_a_codecs_parts_and_what_is_decoded_of_them_have_the_storages_name() -> None:
    plan = attention()
    assert plan.timeline is not None
    blocks = {b.id: b for b in plan.timeline.planned.blocks}
    compressed = [d for d in plan.decisions if d.action is Action.COMPRESS]
    assert len(compressed) > 2
    for d in compressed:
        parts = [
            b
            for i, b in blocks.items()
            if i in {f"{d.storage.id}/{p}" for p in ("payload", "scale", "offset")}
        ]
        assert sum(b.nbytes for b in parts) == d.saved_bytes
        assert {(b.role, b.codec, b.kind) for b in parts} == {(Role.SAVED, d.codec, d.storage.kind)}
        assert all(b.last > plan.timeline.planned.forward_steps for b in parts)
    kept = [d for d in plan.decisions if d.action is Action.KEEP and d.saved_bytes and d.storage.id in blocks]
    assert kept
    assert all(blocks[d.storage.id].nbytes == d.saved_bytes for d in kept)
    assert any(b.role is Role.CODEC for b in blocks.values())
    assert any(b.role is Role.RECOMPUTED for b in blocks.values())
    ids = [d.storage.id for d in plan.decisions]
    assert len(set(ids)) == len(ids)


def test_an_output_that_is_also_saved_is_one_storage() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    plan, before, _ = planned(model, [torch.randn(32, 64)], mode="lossless")
    track = plan.timeline.baseline  # type: ignore[union-attr]
    size = 32 * 64 * 4
    assert track.totals() == simulated(before, reorder=False)
    assert track.totals()[track.forward_steps] == 2 * size  # the output, and its gradient
    assert {b.role for b in track.alive(track.forward_steps)} == {Role.GRADIENT, Role.RETURNED}


MODEL = """
import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x):
        hidden = self.up(x)
        gate = hidden.sigmoid()
        return self.down(hidden * gate)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Gate() for _ in range(2))
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(self.norm(x))
        return x.square().mean()
"""
#: The same computation, written by somebody else: other names, comments, other order, other lines.
EDITED = '''
"""A comment, and more."""
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)  # moved up
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, activations):
        # every block in turn

        for one in self.blocks:
            normed = self.norm(activations)
            activations = activations + one(normed)
        squares = activations.square()
        return squares.mean()


class Block(nn.Module):
    def forward(self, tokens):
        wide = self.up(tokens)
        weights = wide.sigmoid()
        product = wide * weights
        return self.down(product)

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(128, 64)
        self.up = nn.Linear(64, 128)
'''
RUN = """
import sys, torch, ciuic_compile, importlib
from dataclasses import replace
from tests.training import interpreted
from ciuic_compile.report import to_json
for name in sys.argv[1:]:
    torch._dynamo.reset()
    with interpreted():
        model = importlib.import_module(name).Model()
        options = {"mode": "4:1", "min_bytes": 0, "report": "off"}
        torch.compile(model, backend="ciuic", options=options)(torch.randn(32, 64))
    print(to_json(replace(ciuic_compile.plans()[-1], name="")), end="=====")
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Plans of the same model: written once, made in two processes, and written by somebody else."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "written.py").write_text(MODEL)
    (folder / "edited.py").write_text(EDITED)
    running = {}
    for modules in (("written",), ("edited", "written")):
        environment = os.environ | {
            "PYTHONPATH": f"{folder}:{ROOT}",
            "PYTHONHASHSEED": str(len(modules)),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / modules[0]),
        }
        running[modules] = subprocess.Popen(
            [sys.executable, "-c", RUN, *modules],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
    outputs = {modules: process.communicate()[0].split("=====") for modules, process in running.items()}
    assert not any(process.returncode for process in running.values())
    (first, _), (edited, again, _) = outputs.values()
    return {"first": first, "again": again, "edited": edited}


@pytest.mark.xdist_group("timeline")
def test_two_processes_agree(documents: dict[str, str]) -> None:
    assert documents["first"] == documents["again"]


@pytest.mark.xdist_group("timeline")
def test_edits_that_change_no_computation_leave_every_id(documents: dict[str, str]) -> None:
    first, edited = (json.loads(documents[name])["plan"] for name in ("first", "edited"))
    for track in ("baseline", "planned"):
        a, b = ({x["id"]: x["nbytes"] for x in plan["timeline"][track]["blocks"]} for plan in (first, edited))
        assert a == b
        assert len(a) > 20
    a, b = ({d["storage"]["id"]: d["action"] for d in plan["decisions"]} for plan in (first, edited))
    assert a == b
    assert "blocks.1.up/aten.addmm.default#0" in a
    assert first["timeline"]["lines"] != edited["timeline"]["lines"]


@pytest.mark.xdist_group("timeline")
def test_no_absolute_path_is_anywhere(documents: dict[str, str]) -> None:
    for text in documents.values():
        strings = list(all_strings(json.loads(text)))
        assert {"written.py", "edited.py"} & set(strings)  # found on sys.path
        assert not [
            s for s in strings if "/work/" in s or "/tmp/" in s or str(ROOT) in s or s.startswith("/home")
        ]
        files = {line["file"] for line in json.loads(text)["plan"]["timeline"]["lines"]}
        assert not [f for f in files if f.startswith("/")]


def all_strings(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from all_strings(item)


def test_paths_are_portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, library = tmp_path / "project", tmp_path / "lib"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [str(library), str(tmp_path), *sys.path])
    site = "venv/lib/python3.11/site-packages/transformers/models/llama/modeling_llama.py"
    assert portable(f"{project}/{site}") == "transformers/models/llama/modeling_llama.py"
    assert portable(f"{project}/src/net/model.py") == "src/net/model.py"
    assert portable(f"{library}/net/model.py") == "net/model.py"  # the deepest folder that holds it
    assert portable("/nowhere/else/train.py") == "train.py"
    assert portable("C:\\work\\train.py") == "train.py"
    assert [portable(f) for f in ("", "<string>", "train.py", "./a/b.py")] == [
        "",
        "<string>",
        "train.py",
        "a/b.py",
    ]


def test_a_removed_working_directory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with contextlib.suppress(FileNotFoundError):
        assert portable("/nowhere/train.py") == "train.py"


def test_the_timeline_survives_the_plan_file() -> None:
    assert from_json(to_json(attention())) == attention()
