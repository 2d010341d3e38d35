"""The independent audit: agrees with the plan on right rewrites, refuses wrong ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import fx, nn

from ciuic_compile import partitioner
from ciuic_compile.audit import audit, check
from ciuic_compile.errors import PeakDisagreementError, VerificationError
from ciuic_compile.partitioner import plan_and_rewrite
from ciuic_compile.passes import Graphs, PlaceDecodes, default_passes
from tests.stages import Stage, stage
from tests.training import ZOO

aten = torch.ops.aten
prims = torch.ops.prims


@functools.cache
def found(mode: str, rows: int = 1024, width: int = 1024, count: int = 8) -> Stage:
    """Layers before the rewrite: activations of 4 MiB, and gradients of the weights as large if square."""
    layers = (m for _ in range(count) for m in (nn.Linear(width, width, bias=False), nn.Tanh()))
    return stage(nn.Sequential(*layers), torch.randn(rows, width), mode=mode)


LONG = (4096, 256, 8)  # activations set the peak


def rewritten(
    mode: str, wrong: Callable[[Graphs], None] = lambda graphs: None, shape: tuple[int, ...] = ()
) -> Graphs:
    """Plan and rewrite, with a fault done to the graphs after the last pass."""
    here = found(mode, *shape)
    graphs, real = here.graphs(), partitioner.run_pipeline

    def pipeline(graphs: Graphs, passes: object, trial: bool = False) -> tuple[str, ...]:
        notes = real(graphs, passes, trial=trial)  # type: ignore[arg-type]
        if not trial:
            wrong(graphs)
        return notes

    with mock.patch.object(partitioner, "run_pipeline", pipeline):
        plan_and_rewrite("graph", here.model, here.selection, here.baseline, graphs)
    return graphs


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
def test_right_rewrites_pass(mode: str) -> None:
    graphs = rewritten(mode)
    audited = audit(graphs.forward.graph, graphs.backward.graph, graphs.num_fwd_outputs)
    assert audited.saved > 0 and audited.peak > audited.saved


# ---------------------------------------------------------------- wrong rewrites


def saved_inputs(graphs: Graphs) -> list[fx.Node]:
    """What the backward gets that is no parameter's and no tangent's, in order."""
    made = {n.name for n in graphs.forward.graph.nodes if n.op == "call_function"}
    return [n for n in graphs.backward.graph.find_nodes(op="placeholder") if n.name in made]


def save(graphs: Graphs, node: fx.Node) -> fx.Node:
    """Save one more value; the backward's input for it."""
    (values,) = graphs.forward.graph.output_node().args
    assert isinstance(values, tuple)
    graphs.forward.graph.output_node().args = ((*values, node),)
    tangent = next(n for n in graphs.backward.graph.find_nodes(op="placeholder") if "tangents" in n.name)
    with graphs.backward.graph.inserting_before(tangent):
        placeholder = graphs.backward.graph.placeholder(f"{node.name}_again")
    placeholder.meta["val"] = node.meta["val"]
    return placeholder


def read_last(graphs: Graphs, nodes: list[fx.Node]) -> None:
    """Something at the backward's end reads these values."""
    output = graphs.backward.graph.output_node()
    with graphs.backward.graph.inserting_before(output):
        for node in nodes:
            total = graphs.backward.graph.call_function(aten.histc.default, (node,))
            total.meta["val"] = node.meta["val"].new_empty(100)
            (values,) = output.args
            assert isinstance(values, (tuple, list))
            output.args = ((*values, total),)


def not_freed(graphs: Graphs) -> None:
    read_last(graphs, saved_inputs(graphs))


def saved_too_much(graphs: Graphs) -> None:
    save(graphs, next(n for n in graphs.forward.graph.nodes if n.target is aten.mm.default))


def original_still_alive(graphs: Graphs) -> None:
    value = next(n for n in graphs.forward.graph.nodes if n.target is aten.tanh.default)
    read_last(graphs, [save(graphs, value)])


def wide_early(graphs: Graphs) -> None:
    """What a matmul reads is first made float64, all at the start, and kept until then."""
    graph = graphs.backward.graph
    first = next(
        n
        for n in graph.nodes
        if n.op != "placeholder" and any("tangents" in i.name for i in n.all_input_nodes)
    )
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        for source in node.all_input_nodes:
            if not source < first or "primals" in source.name:
                continue
            with graph.inserting_before(first):
                wide = graph.call_function(prims.convert_element_type.default, (source, torch.float64))
                wide.meta["val"] = source.meta["val"].double()
            node.replace_input_with(source, wide)


def kept_wide(graphs: Graphs) -> None:
    """The forward saves a float64 copy in place of the value."""
    (values,) = graphs.forward.graph.output_node().args
    assert isinstance(values, tuple)
    made = [v for v in values[graphs.num_fwd_outputs :] if isinstance(v, fx.Node) and v.op == "call_function"]
    with graphs.forward.graph.inserting_before(graphs.forward.graph.output_node()):
        wide = graphs.forward.graph.call_function(
            prims.convert_element_type.default, (made[0], torch.float64)
        )
        wide.meta["val"] = made[0].meta["val"].double()
    graphs.forward.graph.output_node().args = (tuple(wide if v is made[0] else v for v in values),)


@pytest.mark.parametrize(
    ("wrong", "mode", "message"),
    [
        (saved_too_much, "lossless", "save"),
        (original_still_alive, "4:1", "save"),
        (kept_wide, "4:1", "save"),
    ],
)
def test_wrong_rewrites_are_refused(wrong: Callable[[Graphs], None], mode: str, message: str) -> None:
    with pytest.raises(VerificationError, match=f"graph: the rewritten graphs {message}"):
        rewritten(mode, wrong)


@pytest.mark.parametrize("wrong", [not_freed, wide_early])
def test_a_higher_peak_by_this_account_is_said(wrong: Callable[[Graphs], None]) -> None:
    """It may be this account that is wrong: the replay of Inductor's own allocations decides."""
    shape = LONG if wrong is wide_early else ()
    with mock.patch.object(partitioner, "check", side_effect=check) as checked:
        rewritten("lossless", wrong, shape)
    with pytest.raises(PeakDisagreementError, match="keep .* alive"):
        check(*checked.call_args.args)


def test_the_plan_of_a_pipeline_that_decodes_at_the_start_says_so() -> None:
    def passes(codecs: dict[str, str], kind: str | None = None) -> list[object]:
        return [p for p in default_passes(codecs, kind) if not isinstance(p, PlaceDecodes)]

    here = found("4:1", *LONG)
    draft = partitioner.make_draft(here.model, here.selection, here.graphs())
    with mock.patch.object(partitioner, "default_passes", passes):
        plan = plan_and_rewrite("graph", here.model, here.selection, here.baseline, here.graphs(), 0, draft)
    assert "alive at once by an independent account" in " ".join(plan.notes)


@pytest.mark.parametrize("name", ZOO)
def test_it_counts_what_the_plan_counts(name: str) -> None:
    """On small models as well, where one tensor is a large share of the peak."""
    model, inputs = ZOO[name]
    here = stage(model(), *inputs(), mode="4:1", min_bytes=256)
    graphs = here.graphs()
    with mock.patch.object(partitioner, "check") as checked:
        plan_and_rewrite("graph", here.model, here.selection, here.baseline, graphs)
    audited, saved, peak = checked.call_args.args
    assert audited.saved == saved
    assert 0.75 * peak <= audited.peak <= 1.1 * peak


def test_what_is_above_the_allowance_is_refused() -> None:
    graphs = rewritten("lossless")
    audited = audit(graphs.forward.graph, graphs.backward.graph, graphs.num_fwd_outputs)
    check(audited, audited.saved, audited.peak)
    with pytest.raises(PeakDisagreementError, match="alive"):
        check(audited, audited.saved, audited.peak // 2)
    with pytest.raises(VerificationError, match="save"):
        check(audited, audited.saved - 1, audited.peak)
