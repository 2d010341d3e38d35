"""Saved inputs of convolutions are read through a view, so that no copy of them is saved."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ciuic_compile.passes import Graphs, KeepInputs, verify
from tests.passes.models import mixed
from tests.stages import HandMade, differ, run_pair

aten = torch.ops.aten


def readers(graphs: Graphs, name: str) -> list[object]:
    (node,) = [n for n in graphs.forward.graph.find_nodes(op="placeholder") if n.name == name]
    return [u.target for u in node.users]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_saved_weights_and_images_are_read_through_a_view(dynamic: bool) -> None:
    found = mixed(dynamic)
    before, graphs = found.graphs(), found.graphs()
    assert KeepInputs().run(graphs).changed
    verify(graphs)
    weights = [
        n
        for n in graphs.forward.graph.find_nodes(op="placeholder")
        if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dim() == 4 and len(n.users) == 2
    ]
    assert weights
    for node in weights:
        assert set(readers(graphs, node.name)) == {aten.as_strided.default, "output"}
    ours, theirs = (run_pair(g, found.inputs[0]) for g in (graphs, before))
    assert max(differ(theirs[0], ours[0])) == 0
    assert max(differ(theirs[1], ours[1])) == 0
    text = str(graphs.forward.graph)
    assert not KeepInputs().run(graphs).changed
    assert str(graphs.forward.graph) == text


def declined(shape: tuple[int, ...], *, read: bool = True, overwritten: bool = False) -> str | None:
    made = HandMade()
    x = made.placeholder("x", *shape)
    y = made.call(aten.sin.default, x) if read else made.placeholder("y", 2)
    if overwritten:
        made.call(aten.copy_.default, x, y)
    made.output(y, x)
    return KeepInputs().declines(next(iter(made.graph.nodes)))


def test_what_it_declines() -> None:
    assert declined((2, 3, 4, 4)) is None
    assert declined((2, 3, 4)) == "only 4-D values get channels-last copies"
    assert declined((2, 3, 4, 4), read=False) == "no convolution reads it directly"
    assert declined((2, 3, 4, 4), overwritten=True) == "it is overwritten"


def test_inputs_that_are_not_saved_are_left_alone() -> None:
    made = HandMade()
    x = made.placeholder("x", 2, 3, 4, 4)
    y = made.call(aten.sin.default, x)
    made.output(y)
    forward = fx.GraphModule(torch.nn.Module(), made.graph)
    graphs = Graphs(forward, forward, 1)
    assert not KeepInputs().run(graphs).changed
