"""What is stored for several readers is stored before it is widened, by Inductor too."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._inductor import compile as inductor_compile
from torch._inductor.utils import run_and_get_code

from ciuic_compile.passes import CastWhereRead, Graphs, PassResult
from ciuic_compile.schedule import output_nodes, stored_values
from tests.stages import HandMade

aten = torch.ops.aten
cast_to = torch.ops.prims.convert_element_type.default


class Made(HandMade):
    """The sum of as many bfloat16 gradients as is asked for, cast to float32."""

    def __init__(self, terms: int = 5) -> None:
        super().__init__()
        values = [self.placeholder(f"tangents_{i}", 64, 64, dtype=torch.bfloat16) for i in range(terms)]
        self.first = values[0]
        total = values[0]
        for value in values[1:]:
            total = self.call(aten.add.Tensor, total, value)
        self.narrow = total
        self.wide = self.call(cast_to, total, torch.float32)

    def reductions(self, of: fx.Node) -> list[fx.Node]:
        return [self.call(op, of, [1]) for op in (aten.sum.dim_IntList, aten.amax.default)]

    def graphs(self, *outputs: fx.Node) -> Graphs:
        self.output(*outputs)
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Graphs(module, fx.GraphModule(torch.nn.Module(), fx.Graph()), len(outputs))

    def stored(self) -> set[str]:
        return {n.name for n in stored_values(self.graph, set(output_nodes(self.graph)))}


def dtypes_in_memory(
    graphs: Graphs, inputs: list[torch.Tensor]
) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    """Of the [64, 64] buffers in Inductor's code, and the results."""
    graphs.forward.recompile()
    results, (code,) = run_and_get_code(lambda *a: inductor_compile(graphs.forward, inputs)(*a), *inputs)
    found = [line for line in code.splitlines() if "= empty_strided_cpu((64, 64)" in line]
    return [line.rpartition("torch.")[2].rstrip(")") for line in found], results


def test_the_narrow_value_is_stored() -> None:
    inputs = [torch.randn(64, 64, dtype=torch.bfloat16) for _ in range(5)]
    made = Made()
    graphs = made.graphs(*made.reductions(made.wide))
    assert made.wide.name in made.stored() and made.narrow.name not in made.stored()
    before, _ = dtypes_in_memory(graphs, inputs)
    assert CastWhereRead().run(graphs) == PassResult(True)
    graphs.forward.graph.lint()
    assert made.wide.name not in made.stored() and made.narrow.name in made.stored()
    after, results = dtypes_in_memory(graphs, inputs)
    once_rounded = torch.stack(inputs).float().sum(0).bfloat16().float()
    torch.testing.assert_close(results, (once_rounded.sum(1), once_rounded.amax(1)))
    assert (before, after) == (["float32"], ["bfloat16"]), "Inductor stores what is expected of it"
    assert CastWhereRead().run(graphs) == PassResult(False)


@pytest.mark.parametrize(
    "reason",
    ["few reads", "one reader", "a matmul", "a matmul of a view", "returned", "narrows", "stored as it is"],
)
def test_a_cast_serves_all_its_readers_where_nothing_is_won(reason: str) -> None:
    made = Made(4 if reason == "few reads" else 5)
    read = made.wide
    if reason == "narrows":
        read = made.call(cast_to, made.call(aten.sin.default, made.wide), torch.float16)
    outputs = made.reductions(read)
    if reason == "one reader":
        made.graph.erase_node(outputs.pop())
    elif reason == "a matmul":
        outputs.append(made.call(aten.mm.default, made.wide, made.wide))
    elif reason == "a matmul of a view":
        turned = made.call(aten.permute.default, made.wide, [1, 0])
        outputs.append(made.call(aten.mm.default, turned, turned))
    elif reason == "returned":
        outputs.append(made.wide)
    elif reason == "stored as it is":
        outputs.append(made.call(aten.mm.default, made.narrow, made.first))
    graphs = made.graphs(*outputs)
    before = str(graphs.forward.graph)
    assert CastWhereRead().run(graphs) == PassResult(False)
    assert str(graphs.forward.graph) == before
