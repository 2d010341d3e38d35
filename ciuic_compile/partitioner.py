"""Inductor's custom-partitioner hook: joint graph in, rewritten forward and backward out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from . import compat
from .analyze import MemoryModel, analyze
from .capture import CapturedGraph, tensor
from .chunking import Chunking, choose_chunks
from .config import CompileConfig
from .confirm import joint_of
from .devices import DeviceProfile, profile_for
from .errors import VerificationError
from .passes import Graphs, default_passes, run_pipeline
from .planner import Selection, choose_codecs, fit_budget, make_plan, select
from .planner.select import follows_rules
from .replay import Joint
from .simulate import Peaks, saved_storages, simulate, tensor_bytes
from .types import Plan


class CiuicPartitioner(CustomPartitionerFn):
    """Capture, analyze, plan, rewrite, audit: one call is one compiled graph.

    Args:
        config: the user's options.
        key: everything that determines the plan, as one string (``cache.graph_key``). Inductor hashes it
            into its own cache keys, so no cached code of another configuration can be hit.
        name: the graph's name in reports.
        correction: bytes that Inductor's schedule of an earlier plan needed beyond the simulated peak.

    Attributes:
        plan: the plan, once called; None when nothing in the graph depends on gradients.
        joint: how the rewritten graphs belong together.
        called: whether Inductor asked at all (on a cache hit it does not).
    """

    def __init__(self, config: CompileConfig, key: str, name: str, correction: int = 0) -> None:
        self._config = config
        self._key = f"{key} {correction}" if correction else key
        self._name = name
        self._correction = correction
        self.plan: Plan | None = None
        self.joint: Joint | None = None
        self.called = False

    def uuid(self) -> str:
        return self._key

    def __getstate__(self) -> dict[str, Any]:
        # Inductor pickles its configuration into cache keys; what identifies us there is the key alone.
        return {"_key": self._key}

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.called = True
        num_fwd_outputs: int = kwargs["num_fwd_outputs"]
        stage: dict[str, Any] = {"notes": (), "may_chunk": True}

        def choose(
            graph: fx.Graph, info: compat.NodeInfo, baseline: Callable[[], list[fx.Node]]
        ) -> list[fx.Node]:
            captured = CapturedGraph(graph, info, tuple(baseline()), num_fwd_outputs)
            model = analyze(captured, self._config, stage.get("original"))
            if "baseline" not in stage:
                pair = compat.extract(gm, captured.baseline_saved, info, num_fwd_outputs)
                stage["baseline"] = simulate(pair[0].graph, pair[1].graph, num_fwd_outputs)
            chunking = choose_chunks(model) if stage["may_chunk"] else Chunking(None)
            stage["notes"] += chunking.notes
            if chunking.chunk is not None:
                stage.setdefault("original", model)
                stage["chunked"] = fx.GraphModule(gm, chunking.chunk.run(captured))
                return list(captured.baseline_saved)  # for nothing: the chunked graph is partitioned next
            selection = select(model)
            lossy = self._config.lossy
            if model.original and not follows_rules(captured, model.classes, selection.saved, lossy):
                # the logits that the backward makes again must be those of the forward
                stage["notes"] = ("the loss is not chunked: its hidden states cannot be saved as they are",)
                stage.update(chunked=gm, may_chunk=False, original=None)
                return list(captured.baseline_saved)
            if self._config.budget is not None:

                def judge(saved: Sequence[fx.Node], codecs: Mapping[fx.Node, str | None]) -> Peaks:
                    pair = compat.extract(stage["joint"], saved, info, num_fwd_outputs)
                    named = {n.name: codec for n, codec in codecs.items() if codec}
                    return peaks_with(Graphs(*pair, num_fwd_outputs), named, self._correction)

                selection = fit_budget(model, selection, _device(model), judge)
            stage["model"] = model
            stage["selection"] = replace(selection, notes=(*stage["notes"], *selection.notes))
            return list(selection.saved)

        stage["joint"] = gm
        forward, backward = compat.partition_with(gm, joint_inputs, choose, **kwargs)
        while (chunked := stage.pop("chunked", None)) is not None:
            stage["joint"] = chunked
            forward, backward = compat.partition_with(chunked, joint_inputs, choose, **kwargs)
        if "model" not in stage:  # nothing in this graph depends on the gradients
            return forward, backward
        graphs = Graphs(forward, backward, num_fwd_outputs)
        self.plan = plan_and_rewrite(
            self._name, stage["model"], stage["selection"], stage["baseline"], graphs, self._correction
        )
        self.joint = joint_of(graphs)
        return graphs.forward, graphs.backward


def plan_and_rewrite(
    name: str,
    model: MemoryModel,
    selection: Selection,
    baseline: Peaks,
    graphs: Graphs,
    correction: int = 0,
) -> Plan:
    """Choose codecs for a partitioned graph, rewrite it in place, audit it and return the plan.

    Raises:
        VerificationError: the rewritten graphs save other bytes than the plan says.
    """
    device = _device(model)
    # RNG functionalization and symbol handling may have dropped or added saved values: plan on what is there.
    storages = saved_storages(graphs.forward.graph, graphs.num_fwd_outputs)
    present = {n.name for n in storages}
    chosen = {n.name for n in selection.saved}
    added = sum(tensor_bytes(n.meta["val"]) for n in storages if n.name not in chosen)
    selection = replace(selection, saved=tuple(n for n in selection.saved if _stays(n, present)))

    codecs = selection.codecs or choose_codecs(model, selection, device)
    planned = peaks_with(_copy(graphs), codecs.by_name, correction)
    notes = run_pipeline(graphs, default_passes(codecs.by_name))
    audited = sum(
        tensor_bytes(n.meta["val"]) for n in saved_storages(graphs.forward.graph, graphs.num_fwd_outputs)
    )
    plan = make_plan(name, model, selection, codecs, baseline, planned, device, notes)
    plan = replace(plan, simulated_peak_bytes=planned.peak - correction, correction_bytes=correction)
    if added:
        plan = replace(
            plan,
            baseline_saved_bytes=plan.baseline_saved_bytes + added,
            planned_saved_bytes=plan.planned_saved_bytes + added,
            notes=(*plan.notes, f"{added} bytes of it are RNG states that torch saves to replay random ops"),
        )
    if audited != plan.planned_saved_bytes:
        raise VerificationError(
            f"{name}: the rewritten graph saves {audited} bytes, the plan says {plan.planned_saved_bytes}"
        )
    return plan


def peaks_with(graphs: Graphs, codecs: Mapping[str, str], correction: int) -> Peaks:
    """Simulated peaks once these nodes are stored with these codecs; rewrites the graphs."""
    run_pipeline(graphs, default_passes(codecs)[:-1])  # markers have the codecs' own sizes
    peaks = simulate(graphs.forward.graph, graphs.backward.graph, graphs.num_fwd_outputs)
    return replace(peaks, forward=peaks.forward + correction, backward=peaks.backward + correction)


def _stays(node: fx.Node, present: set[str]) -> bool:
    return node.name in present or tensor(node) is None or node.op in ("placeholder", "get_attr")


def _copy(graphs: Graphs) -> Graphs:
    def copied(gm: fx.GraphModule) -> fx.GraphModule:
        return fx.GraphModule(gm, copy.deepcopy(gm.graph))

    return Graphs(copied(graphs.forward), copied(graphs.backward), graphs.num_fwd_outputs)


def _device(model: MemoryModel) -> DeviceProfile:
    values = (tensor(n) for n in model.captured.savable)
    devices = [v.device for v in values if v is not None]
    accelerators = [d for d in devices if d.type != "cpu"]
    return profile_for((accelerators or devices or [torch.device("cpu")])[0])
