"""What a record takes from plans: rows by place, the step's peak over several graphs, what is alive at it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ciuic_compile
from ciuic_compile.gate import record as module
from ciuic_compile.gate.formats import Outcome, render
from ciuic_compile.gate.record import environment, record
from ciuic_compile.gate.settings import Entry
from ciuic_compile.types import Action, Decision, Plan, Source, Storage, TensorClass

ENTRY = Entry("net", "model.py:make", {"mode": "4:1"}, "h200")


def decision(layer: int, saved: int, codec: str | None = None, line: int = 3) -> Decision:
    source = Source("model.py", line, "h = self.up(x)", f"blocks.{layer}.up")
    storage = Storage(
        f"mm_{layer}", (8, 4), "float32", 128, "128", TensorClass.ACTIVATION, "aten.mm.default", source
    )
    return Decision(storage, Action.COMPRESS if codec else Action.KEEP, codec, saved, 128)


def plan(peak: int, saved: int, *decisions: Decision) -> Plan:
    return Plan("graph 0", "4:1", decisions, 2 * saved, saved, 2 * peak, peak, 0.01, 0.04, 1.0)


def test_equal_layers_are_one_row() -> None:
    found = record([plan(500, 160, decision(0, 128), decision(1, 32, "int8_group64"))], ENTRY, files=False)
    (row,) = found.rows
    assert (row.place.module, row.place.op, row.place.line) == ("blocks.*.up", "aten.mm", 3)
    assert (row.count, row.nbytes, row.saved, row.inductor_saved) == (2, 256, 160, 256)
    assert row.codecs == "int8_group64, keep" and row.shapes == ((8, 4),)


def test_graphs_come_on_top_of_what_those_before_them_save() -> None:
    found = record([plan(500, 100), plan(450, 80), plan(100, 10)], ENTRY, files=False)
    assert (found.peak_bytes, found.saved_bytes, found.graphs) == (100 + 450, 190, 3)
    assert found.inductor_peak_bytes == 1000 + 100  # 200 + 900: each twice ours


class Role(Enum):
    """As far as a record asks."""

    SAVED = "saved"
    RETURNED = "returned"


@dataclass
class Block:
    """As far as a record asks."""

    id: str
    nbytes: int
    role: Role = Role.SAVED
    codec: str | None = None
    dtype: str = "float32"
    module: str = "blocks.0.up"
    shape: tuple[int, ...] = (8, 4)


def test_what_is_alive_at_the_peak_is_counted_where_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def track(*blocks: Block) -> Any:
        return SimpleNamespace(peak_step=0, alive=lambda step: list(blocks))

    planned = track(
        Block("blocks.0.up/aten.mm.default#0/payload", 32, codec="int8_group64", dtype="uint8"),
        Block("blocks.0.up/aten.mm.default#1", 128, Role.RETURNED),
    )
    baseline = track(Block("blocks.0.up/aten.mm.default#0", 128))
    line = SimpleNamespace(file="model.py", line=3, code="h = self.up(x)")
    timeline = SimpleNamespace(planned=planned, baseline=baseline, line=lambda block: line)
    monkeypatch.setattr(module, "_timeline", lambda plan: timeline)
    found = record([plan(500, 32, decision(0, 32, "int8_group64"))], ENTRY, files=False)
    (row,) = found.rows
    assert (row.peak, row.returned, row.inductor_peak) == (160, 128, 128)


def test_shared_parameters_count_once_and_buffers_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    found = record([plan(1, 1)], ENTRY, model, (torch.zeros(2, 4), {"y": torch.zeros(3)}), files=False)
    assert sum(f.nbytes for f in found.parameters) == 64 + 4 * 16 + 8
    assert [f.shape for f in found.inputs] == [(2, 4), (3,)]
    assert found.input_bytes == 64 + 4 * 16 + 8 + 32 + 12


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert environment()["ciuic-compile"] == ciuic_compile.__version__
    driver = json.loads(render(Outcome("check", ()), "sarif"))["runs"][0]["tool"]["driver"]
    assert driver["version"] == ciuic_compile.__version__


def test_the_environment_has_no_build_tags() -> None:
    assert "+" not in environment()["torch"] and "ciuic-compile" in environment()
