"""Mixed readers of one decode are told apart; nothing else is touched, and no value changes."""

from __future__ import annotations

import torch
from torch import fx

from ciuic_compile import markers
from ciuic_compile.fusion import is_external, reaches_reduction, read_from_memory, readers
from ciuic_compile.passes import Graphs, PassResult, PlaceDecodes, SplitDecodes
from tests.stages import HandMade

aten = torch.ops.aten
CPU = SplitDecodes(("cpu",))


class Decoded:
    """A backward graph with one decoded tensor, to be given readers."""

    def __init__(self) -> None:
        self.made = HandMade()
        self.tangent = self.made.placeholder("tangents_1", 8, 8)
        payload = self.made.placeholder("payload", 64)
        self.value = self.made.call(aten.neg.default, payload)  # replaced by the marker below
        self.value.target = markers.decode
        self.value.args = ((payload,), "int8_group64", [8, 8], [0, 1], torch.float32)
        with payload.meta["val"].fake_mode:
            self.value.meta["val"] = torch.empty(8, 8)

    def graphs(self, *outputs: fx.Node) -> Graphs:
        self.made.output(*outputs)
        module = fx.GraphModule(torch.nn.Module(), self.made.graph)
        return Graphs(module, module, 0)


def decodes(graphs: Graphs) -> list[fx.Node]:
    return [n for n in graphs.backward.graph.nodes if markers.is_marker(n, markers.decode)]


def test_a_matmul_and_an_elementwise_reader_get_a_decode_each() -> None:
    d = Decoded()
    turned = d.made.call(aten.permute.default, d.value, [1, 0])
    product = d.made.call(aten.mm.default, turned, d.tangent)
    scaled = d.made.call(aten.mul.Tensor, turned, d.tangent)
    graphs = d.graphs(product, scaled)
    assert CPU.run(graphs) == PassResult(True)
    graphs.backward.graph.lint()
    external, fused = sorted(decodes(graphs), key=lambda n: not all(map(is_external, readers(n))))
    assert readers(external) == [product] and readers(fused) == [scaled]
    assert CPU.run(graphs) == PassResult(False)
    assert PlaceDecodes().run(graphs).changed in (True, False)
    graphs.backward.graph.lint()


def test_readers_of_one_kind_share() -> None:
    for op in (aten.mm.default, aten.mul.Tensor):
        d = Decoded()
        graphs = d.graphs(*(d.made.call(op, d.value, d.tangent) for _ in range(2)))
        assert CPU.run(graphs) == PassResult(False)
        assert len(decodes(graphs)) == 1


def test_other_devices_are_left_alone() -> None:
    d = Decoded()
    graphs = d.graphs(
        d.made.call(aten.mm.default, d.value, d.tangent), d.made.call(aten.mul.Tensor, d.value, d.tangent)
    )
    assert SplitDecodes().run(graphs) == PassResult(False)


def test_what_is_read_from_memory_and_what_reaches_a_reduction() -> None:
    d = Decoded()
    half = d.made.call(aten.mul.Tensor, d.value, d.tangent)
    total = d.made.call(aten.sum.dim_IntList, half, [1])
    assert reaches_reduction(d.value) and reaches_reduction(half) and not read_from_memory(half)
    stored = d.made.call(aten.sin.default, d.value)
    d.made.call(aten.mm.default, stored, d.tangent)
    assert read_from_memory(stored) and not reaches_reduction(stored)
    d.graphs(total)
    assert read_from_memory(total)


def test_a_reduction_behind_a_stored_value_does_not_count() -> None:
    """What a matmul reads is in memory, so the reduction reads it from there."""
    d = Decoded()
    stored = d.made.call(aten.mul.Tensor, d.value, d.tangent)
    product = d.made.call(aten.mm.default, stored, d.tangent)
    total = d.made.call(aten.sum.dim_IntList, stored, [0])
    d.graphs(product, total)
    assert not reaches_reduction(d.value)
