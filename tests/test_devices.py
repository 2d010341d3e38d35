"""Device profiles: the option, the file, what is measured here, and plans for a device that is not here."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx, nn

import ciuic_compile
from bench.generated import CUDA, on
from ciuic_compile import DeviceProfile, OptionError, Plan, compat, markers, measuring, partitioner
from ciuic_compile.codecs import get_codec
from ciuic_compile.config import parse_options
from ciuic_compile.confirm import _in_memory
from ciuic_compile.devices import NAMES, from_json, named, profile_for
from ciuic_compile.partitioner import CiuicPartitioner, make_draft
from ciuic_compile.passes import default_passes, insert_codecs, run_pipeline
from ciuic_compile.planner import make_plan
from ciuic_compile.report import to_json
from tests.stages import Stage, stage
from tests.training import ZOO, interpreted

H200 = named("h200")

# ---------------------------------------------------------------- the option and the file


def test_the_option_takes_a_name_a_profile_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    mine = replace(H200, name="mine", bytes_per_us=1.0)
    mine.save(path)
    assert parse_options({}).device is None is parse_options({"device": "auto"}).device
    for value, expected in (("h200", H200), ("a100", named("a100-80")), (mine, mine), (path, mine)):
        assert parse_options({"device": value}).device == expected
    assert {parse_options({"device": v}).fingerprint() for v in ("h200", H200)} == {
        parse_options({"device": "h200"}).fingerprint()
    }
    assert parse_options({"device": mine}).fingerprint() != parse_options({"device": H200}).fingerprint()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("h20", "no profile has that name; did you mean 'h200'"),
        ("RTX4090", "did you mean 'rtx4090'"),
        ("nowhere.json", "cannot be read: No such file"),
        (b"h200", "<bytes>: none of these"),
        (None, "none of these"),
        ("", "no profile has that name"),
    ],
)
def test_a_wrong_device_is_an_option_error(value: object, message: str) -> None:
    with pytest.raises(OptionError, match="valid: 'auto', 'h200'") as error:
        parse_options({"device": value})
    assert message in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_profiles_survive_their_file(name: str) -> None:
    assert from_json(named(name).to_json()) == named(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "ciuic.device/2"}, "another version"),
        ({"schema": "ciuic.calibration/1"}, "not a device profile"),
        ({"color": 1}, "'color' is unknown"),
        ({"granularity": None}, "'granularity' is not a whole number of bytes from 1 up"),
        ({"granularity": 0}, "'granularity'"),
        ({"memory_bytes": -1}, "'memory_bytes'"),
        ({"context_bytes": 1.5}, "'context_bytes'"),
        ({"cublas_bytes": True}, "'cublas_bytes'"),
        ({"bytes_per_us": 0}, "'bytes_per_us' is not a finite number above 0"),
        ({"half_flop_per_us": float("inf")}, "'half_flop_per_us'"),
        ({"bytes_per_us": "4e6"}, "'bytes_per_us'"),
        ({"kind": "xpu"}, "'kind'"),
        ({"name": "a\nb"}, "'name'"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps({**json.loads(H200.to_json()), **change}))
    with pytest.raises(OptionError, match="measure again") as error:
        parse_options({"device": str(path)})
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "ciuic.device/1"}'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="empty|not valid JSON|not a device profile|damaged"):
        from_json(text)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "gpu"),
        ("Tesla V100-SXM2-16GB", "gpu"),
    ],
)
def test_the_gpu_that_is_here_has_the_profile_of_its_name(driver: str, name: str) -> None:
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_name", return_value=driver),
    ):
        assert profile_for(CUDA) == named(name)
        assert profile_for(torch.device("cpu")) == named("cpu")


# ---------------------------------------------------------------- measured here


def test_what_is_measured_here_can_be_planned_for(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    sizes = {"cpu": 2**22}
    with (
        mock.patch.object(measuring, "_COPY_BYTES", sizes),
        mock.patch.object(measuring, "_SIDE", {"cpu": 64}),
    ):
        measured = ciuic_compile.measure_device("cpu", seconds=0.01)
    assert measured.kind == "cpu" and not measured.caches and measured.workspaces == {}
    assert 1e2 < measured.bytes_per_us < 1e7, "between 0.1 GB/s and 10 TB/s"
    assert measured.half_flop_per_us > 1
    measured.save(path)
    assert parse_options({"device": str(path)}).device == measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "meta", "gpu9"])
def test_a_device_that_is_not_here_is_not_measured(device: str) -> None:
    with pytest.raises(ciuic_compile.CalibrationError, match="no device 'gpu9'|that can be measured"):
        ciuic_compile.measure_device(device)


# ---------------------------------------------------------------- planned without it


class _Planned(Exception):
    pass


def sized_on_the_cpu(name: str) -> Any:
    """A codec that encodes fake tensors of a GPU where torch is built without: what comes out is as large."""
    encode = get_codec(name).encode
    return SimpleNamespace(encode=lambda x, **kwargs: encode(torch.empty_like(x, device="cpu"), **kwargs))


def planned(name: str, mode: str, *, there: bool, **options: Any) -> Plan:
    """The plan of a model of the zoo; ``there``: its joint graph is on a GPU, as far as it says."""
    made: list[Plan] = []
    real = CiuicPartitioner._partitioned

    def partitioned(self: Any, gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        if there:
            on(CUDA, gm.graph)
        return real(self, gm, inputs, **kwargs)

    def plan(name: str, model: Any, selection: Any, baseline: Any, graphs: Any, *rest: Any) -> Any:
        draft = make_draft(model, selection, graphs)
        selection = replace(selection, saved=draft.saved)
        made.append(make_plan(name, model, selection, draft.codecs, baseline, draft.planned, model.device))
        raise _Planned

    model, inputs = ZOO[name]
    torch.manual_seed(0)
    with (
        mock.patch.object(CiuicPartitioner, "_partitioned", partitioned),
        mock.patch.object(partitioner, "plan_and_rewrite", plan),
        mock.patch.object(insert_codecs, "get_codec", sized_on_the_cpu),
        contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed),
        interpreted(),
    ):
        options = {"mode": mode, "min_bytes": 256, "report": "off", **options}
        half = [i.bfloat16() if i.is_floating_point() else i for i in inputs()]
        torch.compile(model().bfloat16(), backend="ciuic", options=options)(*half)
    torch._dynamo.reset()
    return replace(made[-1], name="")


@pytest.mark.parametrize(
    ("name", "mode"), [("attention", "4:1"), ("convnet", "lossless"), ("llama", "lossless")]
)
def test_a_gpu_is_planned_for_as_if_it_were_here(name: str, mode: str) -> None:
    without, there = (planned(name, mode, there=there, device="h200") for there in (False, True))
    assert to_json(without) == to_json(there)
    assert without.profile == H200


def decodes(found: Stage, kind: str | None, there: bool) -> int:
    """How many decodes there are before they are lowered, all that may be compressed being so."""
    graphs = found.graphs()
    for gm in (graphs.forward, graphs.backward) if there else ():
        on(CUDA, gm.graph)
    chosen = {n.name: found.model.codecs(n)[-1].name for n in found.selection.saved if found.model.codecs(n)}
    with mock.patch.object(insert_codecs, "get_codec", sized_on_the_cpu):
        run_pipeline(graphs, default_passes(chosen, kind)[:-1], trial=True)
    return sum(markers.is_marker(n, markers.decode) for n in graphs.backward.graph.nodes)


def test_passes_and_layouts_are_those_of_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))  # whose backward reads tanh twice
    found = stage(model, torch.randn(64, 64), mode="2:1")
    assert decodes(found, "cuda", there=False) == decodes(found, None, there=True)
    assert decodes(found, "cpu", there=True) == decodes(found, None, there=False)
    assert decodes(found, "cuda", there=False) > decodes(found, "cpu", there=False)
    convolutions, inputs = ZOO["convnet"]
    graph = stage(convolutions(), *inputs(), mode="lossless").graphs().forward.graph
    here = compat.prefers_channels_last(graph)
    assert compat.prefers_channels_last(graph, "cpu") == here
    without = compat.prefers_channels_last(graph, "cuda")
    on(CUDA, graph)
    assert compat.prefers_channels_last(graph) == without != here
    assert compat.prefers_channels_last(graph, "cpu") == here


def test_what_a_gpu_changes_in_a_plan() -> None:
    cpu, gpu = (planned("attention", "4:1", there=False, device=device) for device in ("auto", "h200"))
    assert cpu.device == "cpu" and gpu.device == "h200"
    assert cpu.time_us > gpu.time_us
    assert gpu.planned_peak_bytes != cpu.planned_peak_bytes, "attention has temporaries, decodes are split"
    assert to_json(replace(planned("attention", "4:1", there=True, device="cpu"))) == to_json(
        planned("attention", "4:1", there=False, device="cpu")
    )


def test_the_plan_states_its_profile_and_is_not_replayed_on_another_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    with interpreted():
        run = torch.compile(model, backend="ciuic", options={"device": "rtx4090", "report": "off"})
        run(torch.randn(64, 64)).sum().backward()
    plan = ciuic_compile.plans()[-1]
    assert json.loads(to_json(plan))["plan"]["profile"] == {
        k: v for k, v in json.loads(named("rtx4090").to_json()).items() if k != "schema"
    }
    assert not plan.replayed
    assert any("its code is for a cpu, the plan for rtx4090" in note for note in plan.notes)


def test_a_plan_that_the_device_has_no_memory_for_says_so() -> None:
    plan = Plan("", "off", (), 0, 0, 0, 2**20, 0.0, 0.0, 0.0, input_bytes=2**20)
    small: DeviceProfile = replace(H200, memory_bytes=2**21 - 1)
    assert "give a budget" in _in_memory(plan, small).notes[0]
    assert _in_memory(plan, replace(H200, memory_bytes=2**21)) == plan


def test_nothing_else_is_asked_about_the_device() -> None:
    """With ``device`` given, no stage asks torch which GPU there is."""
    with mock.patch("ciuic_compile.analyze.profile_for", side_effect=AssertionError("asked")):
        found = stage(nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True), device="h200")
        assert found.model.device == H200
