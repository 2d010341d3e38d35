"""The pipeline: order, verification, errors that name the pass; graphs that run after every pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from ciuic_compile import compat_trace, markers
from ciuic_compile.errors import OptionError, PassError, VerificationError
from ciuic_compile.passes import (
    CastWhereRead,
    Graphs,
    InsertCodecs,
    KeepInputs,
    LowerCodecs,
    Pass,
    PassResult,
    PlaceDecodes,
    PlaceEncodes,
    SplitDecodes,
    default_passes,
    verify,
)
from ciuic_compile.passes._infra import last_use
from tests.passes.models import codecs_for, mixed, received_names, rewrite, saved_names
from tests.stages import HandMade, differ, run_pair, stage

aten = torch.ops.aten


@dataclass(frozen=True)
class Does:
    """A pass that does what it is told."""

    action: Callable[[Graphs], object]
    notes: tuple[str, ...] = ()

    def run(self, graphs: Graphs) -> PassResult:
        return PassResult(self.action(graphs) is not None, self.notes)


class Nothing(Does):
    """A pass that does nothing."""

    def __init__(self, *notes: str) -> None:
        super().__init__(lambda graphs: None, notes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_graphs_run_and_agree_after_every_pass(dynamic: bool) -> None:
    found = mixed(dynamic)
    (inputs,) = found.inputs
    outputs, gradients = run_pair(found.graphs(), inputs)
    graphs, codecs = found.graphs(), codecs_for(found)
    count = graphs.num_fwd_outputs
    seen: list[tuple[str, list[torch.Tensor]]] = []

    def observe(name: str, graphs: Graphs, result: PassResult, seconds: float) -> None:
        verify(graphs)
        got, got_gradients = run_pair(graphs, inputs)
        assert max(differ(outputs[:count], got[:count])) == 0, "the forward's results never change"
        errors = differ(gradients, got_gradients)
        limit = 0.0 if not seen and name != "InsertCodecs" else 0.2
        assert max(errors) <= limit, (name, errors)
        assert seconds >= 0
        seen.append((name, got_gradients))

    lowered = LowerCodecs(decode="reference", devices=("cpu",))
    as_on_a_gpu = (SplitDecodes(("cpu",)), PlaceDecodes(), CastWhereRead(), lowered)
    passes = (*default_passes(codecs)[:-4], *as_on_a_gpu)
    rewrite(graphs, passes, observe)
    names = [name for name, _ in seen]
    assert names[-7:-4] == ["InsertCodecs", "ChannelsLast", "PlaceEncodes"]
    assert names[-4:] == ["SplitDecodes", "PlaceDecodes", "CastWhereRead", "LowerCodecs"]
    after = [g for name, g in seen if name in names[-7:]]
    assert max(differ(gradients, after[0])) > 0, "lossy codecs leave a trace"
    for later in after[1:]:
        assert differ(after[0], later) == [0.0] * len(gradients), "moving and expanding change no bit"


def test_lossless_codecs_change_no_gradient() -> None:
    found = mixed(False)
    masks = {n: c for n, c in codecs_for(found).items() if c == "bitmask"}
    assert masks
    graphs = found.graphs()
    rewrite(graphs, default_passes(masks))
    before, after = (run_pair(g, found.inputs[0])[1] for g in (found.graphs(), graphs))
    assert differ(before, after) == [0.0] * len(before)


@pytest.mark.parametrize("rows", [2, 4, 17])
def test_symbolic_graphs_serve_other_sizes(rows: int) -> None:
    found = mixed(True)
    graphs = found.graphs()
    rewrite(graphs, default_passes(codecs_for(found)))
    names = [n.name for n in graphs.forward.graph.find_nodes(op="placeholder")]
    values = [n.meta["val"] for n in graphs.forward.graph.find_nodes(op="placeholder")]
    old, new = {3: rows, 5: 6}, []
    symbols = {}
    for value, real in zip(values, found.inputs[0], strict=True):
        if isinstance(value, torch.SymInt):
            symbols[value.node.expr] = old[real]
    for value, real in zip(values, found.inputs[0], strict=True):
        if isinstance(value, torch.SymInt):
            new.append(symbols[value.node.expr])
        elif any(isinstance(s, torch.SymInt) for s in value.shape):
            new.append(
                torch.randn(
                    [
                        int(s.node.expr.subs(symbols)) if isinstance(s, torch.SymInt) else s
                        for s in value.shape
                    ]
                )
            )
        else:
            new.append(real)
    assert len(symbols) == 2 and len(names) == len(new)
    exact, lossy = run_pair(found.graphs(), new), run_pair(graphs, new)
    assert exact[0][0].shape == (rows, 6 * 7, 5)
    assert max(differ(exact[0][:1], lossy[0][:1])) == 0
    assert 0 < max(differ(exact[1], lossy[1])) < 0.2


def test_notes_are_collected_in_order_and_graphs_recompiled() -> None:
    graphs = mixed(False).graphs()

    def negate(graphs: Graphs) -> str:
        node = graphs.backward.graph.find_nodes(op="call_function", target=aten.cos.default)[0]
        node.target = aten.sin.default
        return "changed"

    before = graphs.backward.code
    assert rewrite(graphs, [Nothing("one", "two"), Does(negate), Nothing("three")]) == (
        "one",
        "two",
        "three",
    )
    assert graphs.backward.code != before and "aten.cos" not in graphs.backward.code


PLANNED = [p for p in default_passes({}) if not isinstance(p, KeepInputs)]


@pytest.mark.parametrize("each", PLANNED, ids=lambda p: type(p).__name__)
def test_without_a_plan_every_pass_reports_no_change(each: Pass) -> None:
    graphs = mixed(False).graphs()
    before = (str(graphs.forward.graph), str(graphs.backward.graph))
    assert isinstance(each, Pass)
    assert each.run(graphs) == PassResult(False)
    assert (str(graphs.forward.graph), str(graphs.backward.graph)) == before


def test_every_pass_is_idempotent() -> None:
    found = mixed(False)
    graphs = found.graphs()
    for each in default_passes(codecs_for(found)):
        each.run(graphs)
        once = (str(graphs.forward.graph), str(graphs.backward.graph))
        assert not each.run(graphs).changed, type(each).__name__
        assert (str(graphs.forward.graph), str(graphs.backward.graph)) == once


def drop_output(graphs: Graphs) -> None:
    output = graphs.forward.graph.output_node()
    output.args = (output.args[0][:-1],)  # type: ignore[index]


def swap_outputs(graphs: Graphs) -> None:
    output = graphs.forward.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    values[-1], values[-2] = values[-2], values[-1]
    output.args = (tuple(values),)


def change_result(graphs: Graphs) -> None:
    output = graphs.forward.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    with graphs.forward.graph.inserting_before(output):
        values[0] = graphs.forward.graph.call_function(aten.neg.default, (values[0],))
    output.args = (tuple(values),)


def rename_input(graphs: Graphs) -> None:
    node = next(n for n in graphs.backward.graph.find_nodes(op="placeholder") if n.name.startswith("primals"))
    node.name = "other"


def use_before_definition(graphs: Graphs) -> None:
    nodes = [n for n in graphs.backward.graph.nodes if n.op == "call_function"]
    nodes[0].prepend(nodes[-1])


def change_dtype(graphs: Graphs) -> None:
    name = saved_names(graphs)[-1]
    node = next(n for n in graphs.backward.graph.find_nodes(op="placeholder") if n.name == name)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=torch.float64)


def change_shape(graphs: Graphs) -> None:
    name = saved_names(graphs)[-1]
    node = next(n for n in graphs.backward.graph.find_nodes(op="placeholder") if n.name == name)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(7, dtype=node.meta["val"].dtype)


BREAKS = {
    drop_output: "which the forward does not save",
    swap_outputs: "differ in order or names",
    change_result: "changed what the forward returns",
    rename_input: "differ in order or names",
    use_before_definition: "before it has been defined",
    change_dtype: "float64",
    change_shape: "(7,)",
}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_broken_graphs_are_caught_by_pass_and_predecessors(broken: Callable[[Graphs], None]) -> None:
    graphs = mixed(False).graphs()
    verify(graphs)
    with pytest.raises(PassError) as caught:
        rewrite(graphs, [Nothing(), PlaceEncodes(), Does(broken), PlaceDecodes()])
    message = str(caught.value)
    assert message.startswith("pass Does (after Nothing, PlaceEncodes)")
    assert BREAKS[broken] in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "error", [ValueError("no such thing"), OptionError("no such thing")], ids=lambda e: type(e).__name__
)
def test_an_error_in_a_pass_names_it(error: Exception) -> None:
    def fail(graphs: Graphs) -> None:
        raise error

    with pytest.raises(PassError, match=r"pass Does \(after nothing\).*no such thing") as caught:
        rewrite(mixed(False).graphs(), [Does(fail)])
    assert caught.value.__cause__ is error


def test_a_plan_for_a_codec_that_does_not_exist_is_an_error() -> None:
    found = mixed(False)
    wrong = dict.fromkeys(codecs_for(found), "int4_groups64")
    with pytest.raises(PassError, match=r"pass InsertCodecs .*unknown codec 'int4_groups64'; did you mean"):
        rewrite(found.graphs(), default_passes(wrong))


def test_verify_alone_raises_verification_errors() -> None:
    graphs = mixed(False).graphs()
    swap_outputs(graphs)
    with pytest.raises(VerificationError):
        verify(graphs)


def test_positions_stay_aligned() -> None:
    """AOTAutograd hands the forward's saved values to the backward by position: tensors, then symbols."""
    found = mixed(True)
    graphs = found.graphs()
    rewrite(graphs, default_passes(codecs_for(found)))
    values = [n.meta["val"] for n in graphs.forward_outputs()[graphs.num_fwd_outputs :]]  # type: ignore[attr-defined]
    symbolic = [isinstance(v, torch.SymInt) for v in values]
    assert symbolic == sorted(symbolic) and any(symbolic)
    tensors = [n for n, s in zip(saved_names(graphs), symbolic, strict=True) if not s]
    symbols = [n for n, s in zip(saved_names(graphs), symbolic, strict=True) if s]
    received = received_names(graphs)
    assert received[: len(values)] == [*symbols, *tensors]
    assert all("tangents" in n for n in received[len(values) :])
    output = graphs.forward.graph.output_node()
    assert len(output.meta.get("desc", values)) in (len(values) + graphs.num_fwd_outputs, len(values))


def test_last_use() -> None:
    made = HandMade()
    x = made.placeholder("x", 4, 4)
    a = made.call(aten.sin.default, x)
    b = made.call(aten.cos.default, a)
    view = made.call(aten.permute.default, b, [1, 0])
    c = made.call(aten.mul.Tensor, a, b)
    d = made.call(aten.exp.default, c)
    late = made.call(aten.neg.default, view)
    made.output(d, late)
    assert last_use(a) is c
    assert last_use(d) is d, "returned, but read by nothing"


def test_last_use_through_a_view() -> None:
    made = HandMade()
    x = made.placeholder("x", 4, 4)
    a = made.call(aten.sin.default, x)
    view = made.call(aten.permute.default, a, [1, 0])
    late = made.call(aten.neg.default, view)
    made.output(late)
    assert last_use(a) is late


def test_the_pipeline_has_the_order_that_its_comments_give() -> None:
    order = [type(p) for p in default_passes({})]
    assert order.index(InsertCodecs) < order.index(PlaceEncodes) < order.index(LowerCodecs)
    assert order.index(InsertCodecs) < order.index(SplitDecodes) < order.index(PlaceDecodes)
    assert order.index(PlaceDecodes) < order.index(CastWhereRead)
    assert order[-1] is LowerCodecs


def test_markers_store_permuted_tensors_without_a_copy_of_their_order() -> None:
    x = torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last)
    order = markers.storage_order(x)
    assert order == [0, 2, 3, 1] and x.permute(order).is_contiguous()
    encoded = markers.encode(x, "int8_group64", order)
    shape = [x.size(d) for d in order]
    decoded = markers.decode(encoded, "int8_group64", shape, order, x.dtype)
    assert decoded.shape == x.shape and decoded.stride() == x.stride()
    assert (decoded - x).norm() / x.norm() < 0.01


def test_a_model_without_anything_to_save_passes() -> None:
    found = stage(nn.Linear(8, 8), torch.randn(4, 8))
    graphs = found.graphs()
    assert rewrite(graphs, default_passes({})) == ()
    assert isinstance(graphs.forward, fx.GraphModule)


def copies(
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], kernels: bool
) -> tuple[list[fx.Node], list[list[fx.Node]], fx.Graph]:
    """Two inputs, the results of a trace's copy for each, and the graph that they are in."""
    made = HandMade()
    inputs = [made.placeholder(f"x{i}", 4, 64) for i in range(2)]
    end = made.call(aten.add.Tensor, *inputs)
    traced = compat_trace.trace(encode, [inputs[0]], kernels)
    return inputs, [compat_trace.inline(made.graph, end, traced, [x]) for x in inputs], made.graph


def storage(node: fx.Node) -> object:
    return node.meta["val"].untyped_storage()._cdata


def test_copies_of_kernels_have_storages_of_their_own() -> None:
    """Inductor clones what a kernel writes when another node's fake value shares its storage."""

    @torch.library.custom_op("tests::fill", mutates_args=("out",))
    def fill(out: torch.Tensor) -> None:
        out.fill_(1.0)

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = torch.empty(4, 64)
        fill(out)
        return (out.view(-1), x.view(64, 4).t())

    inputs, ((first, first_view), (second, second_view)), _ = copies(encode, kernels=True)
    assert storage(first) != storage(second)
    assert [storage(v) for v in (first_view, second_view)] == [storage(x) for x in inputs]
    assert isinstance(first.args[0], fx.Node)
    assert storage(first.args[0]) == storage(first), "a view still shares its base's"


def test_copies_without_kernels_share_values_but_show_their_own_inputs() -> None:
    inputs, (first, second), _ = copies(
        lambda x: (x + 1.0, x.view(64, 4).t(), x.split(2)[1], x.permute(0, 1)), kernels=False
    )
    assert first[0] is not second[0] and storage(first[0]) == storage(second[0])
    for one, other in zip(first[1:], second[1:], strict=True):
        assert [storage(v) for v in (one, other)] == [storage(x) for x in inputs]
    assert not {*first, *second} & {*inputs}, "a result is a node of its own"


def test_a_trace_computes_nothing_twice() -> None:
    def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.permute(0, 1).abs() + torch.where(x > 0.0, x.abs(), 0.0),)

    _, (results, _), graph = copies(encode, kernels=False)
    assert len(graph.find_nodes(op="call_function", target=aten.abs.default)) == 2, "one for each copy"
    assert not graph.find_nodes(op="call_function", target=aten.permute.default)
    assert [tuple(r.meta["val"].shape) for r in results] == [(4, 64)]


def test_what_a_codec_writes_in_place_is_functional_in_the_graph() -> None:
    def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.clone().mul_(2.0),)

    _, _, graph = copies(encode, kernels=False)
    targets = [n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert aten.mul.Tensor in targets and not any(t._schema.is_mutable for t in targets)
