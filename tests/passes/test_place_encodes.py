"""An encode stands where the least is alive because of it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ciuic_compile import markers
from ciuic_compile.passes import Graphs, PassResult, PlaceEncodes
from tests.stages import HandMade

aten = torch.ops.aten


class Forward(HandMade):
    """A forward graph: a product, its ReLU, another product and what is encoded for a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.x = self.placeholder("primals_1", 8, 8)
        self.product = self.call(aten.mm.default, self.x, self.x)
        self.relu = self.call(aten.relu.default, self.product)
        self.last = self.call(aten.mm.default, self.relu, self.x)

    def encoded(self, value: fx.Node, codec: str) -> fx.Node:
        call = self.call(markers.encode, value, codec, [0, 1])
        call.meta["val"] = (value.meta["val"],)
        part: fx.Node = self.graph.call_function(operator.getitem, (call, 0))
        part.meta["val"] = value.meta["val"]
        return part

    def order(self, *saved: fx.Node) -> list[fx.Node]:
        """The calls, in order, after the pass; running it again changes nothing."""
        module = fx.GraphModule(torch.nn.Module(), self.output(self.last, *saved))
        graphs = Graphs(module, module, 1)
        PlaceEncodes().run(graphs)
        graphs.forward.graph.lint()
        assert PlaceEncodes().run(graphs) == PassResult(False)
        return [n for n in graphs.forward.graph.nodes if n.op == "call_function"]


def test_a_mask_of_the_backward_is_encoded_where_its_activation_is_made() -> None:
    made = Forward()
    mask = made.call(aten.le.Scalar, made.relu, 0)
    part = made.encoded(mask, "bitmask")
    (call,) = part.all_input_nodes
    assert made.order(part) == [made.product, made.relu, mask, call, part, made.last]


def test_what_others_read_stays_and_is_encoded_after_its_last_use() -> None:
    made = Forward()
    part = made.encoded(made.relu, "int8_group64")
    (call,) = part.all_input_nodes
    assert made.order(part) == [made.product, made.relu, made.last, call, part]


def test_a_mask_that_is_read_elsewhere_is_not_moved() -> None:
    made = Forward()
    mask = made.call(aten.le.Scalar, made.relu, 0)
    other = made.call(aten.logical_not.default, mask)
    part = made.encoded(mask, "bitmask")
    order = made.order(part, other)
    assert order.index(made.last) < order.index(mask)


def test_random_numbers_are_drawn_in_the_users_order() -> None:
    made = Forward()
    first = made.call(aten.rand_like.default, made.last)
    second = made.call(aten.rand_like.default, made.relu)
    part = made.encoded(made.call(aten.le.Scalar, second, 0.5), "bitmask")
    order = made.order(part, first)
    assert order.index(first) < order.index(second) < order.index(part)


def test_what_is_made_before_all_is_there_stays_where_it_is() -> None:
    """Else the large value that a small one is made of would be kept."""
    made = Forward()
    total = made.call(aten.sum.dim_IntList, made.product, [1], True)
    late = made.call(aten.mm.default, made.last, made.x)
    mask = made.call(aten.le.Tensor, total, late)
    between = made.call(aten.mm.default, late, made.x)
    part = made.encoded(mask, "bitmask")
    (call,) = part.all_input_nodes
    order = made.order(part, between)
    assert order[3:] == [total, late, mask, call, part, between]


def test_a_chain_that_only_begins_where_it_can_be_made_is_moved_there() -> None:
    made = Forward()
    first = made.call(aten.neg.default, made.product)
    made.product.append(first)
    between = made.call(aten.mm.default, made.last, made.x)
    part = made.encoded(made.call(aten.le.Scalar, first, 0), "bitmask")
    (call,) = part.all_input_nodes
    mask = call.all_input_nodes[0]
    assert made.order(part, between)[:5] == [made.product, first, mask, call, part]
