"""What is stored for several readers is stored before it is widened, by Inductor too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import compile as inductor_compile
from torch._inductor.utils import run_and_get_code

from ciuic_compile.passes import CastWhereRead, Graphs, PassResult
from ciuic_compile.schedule import output_nodes, stored_values
from tests.stages import HandMade

aten = torch.ops.aten
cast_to = torch.ops.prims.convert_element_type.default


class Made(HandMade):
    """The sum of as many bfloat16 gradients as is asked for, cast to float32."""

    def __init__(self, terms: int = 5, name: str = "tangents") -> None:
        super().__init__()
        values = [self.placeholder(f"{name}_{i}", 64, 64, dtype=torch.bfloat16) for i in range(terms)]
        self.first = values[0]
        total = values[0]
        for value in values[1:]:
            total = self.call(aten.add.Tensor, total, value)
        self.narrow = total
        self.wide = self.call(cast_to, total, torch.float32)

    def reductions(self, of: fx.Node) -> list[fx.Node]:
        return [self.call(op, of, [1]) for op in (aten.sum.dim_IntList, aten.mean.dim)]

    def graphs(self, *outputs: fx.Node) -> Graphs:
        self.output(*outputs)
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        forward = fx.Graph()
        forward.output(())
        return Graphs(fx.GraphModule(torch.nn.Module(), forward), module, 0)

    def stored(self) -> set[str]:
        return {n.name for n in stored_values(self.graph, set(output_nodes(self.graph)))}


def dtypes_in_memory(
    graphs: Graphs, inputs: list[torch.Tensor]
) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    """Of the [64, 64] buffers in Inductor's code, and the results."""
    graphs.backward.recompile()
    results, (code,) = run_and_get_code(lambda *a: inductor_compile(graphs.backward, inputs)(*a), *inputs)
    found = [line for line in code.splitlines() if "= empty_strided_cpu((64, 64)" in line]
    return [line.rpartition("torch.")[2].rstrip(")") for line in found], results


def test_the_narrow_value_is_stored() -> None:
    inputs = [torch.randn(64, 64, dtype=torch.bfloat16) for _ in range(5)]
    made = Made()
    graphs = made.graphs(*made.reductions(made.wide))
    assert made.wide.name in made.stored() and made.narrow.name not in made.stored()
    before, _ = dtypes_in_memory(graphs, inputs)
    assert CastWhereRead().run(graphs) == PassResult(True)
    graphs.backward.graph.lint()
    assert made.wide.name not in made.stored() and made.narrow.name in made.stored()
    after, results = dtypes_in_memory(graphs, inputs)
    once_rounded = torch.stack(inputs).float().sum(0).bfloat16().float()
    torch.testing.assert_close(results, (once_rounded.sum(1), once_rounded.mean(1)))
    assert (before, after) == (["float32"], ["bfloat16"]), "Inductor stores what is expected of it"
    assert CastWhereRead().run(graphs) == PassResult(False)


@pytest.mark.parametrize(
    "reason",
    [
        *("few reads", "one reader", "a matmul", "a matmul of a view", "returned", "narrows"),
        *("stored as it is", "its maximum", "compared", "no gradient"),
    ],
)
def test_a_cast_serves_all_its_readers_where_nothing_is_won(reason: str) -> None:
    made = Made(4 if reason == "few reads" else 5, "saved" if reason == "no gradient" else "tangents")
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
    elif reason == "its maximum":
        outputs.append(made.call(aten.amax.default, made.call(aten.abs.default, made.wide), [1]))
    elif reason == "compared":
        outputs.append(made.call(aten.eq.Tensor, made.wide, made.call(aten.neg.default, made.wide)))
    elif reason == "stored as it is":
        outputs.append(made.call(aten.mm.default, made.narrow, made.first))
    graphs = made.graphs(*outputs)
    before = str(graphs.backward.graph)
    assert CastWhereRead().run(graphs) == PassResult(False)
    assert str(graphs.backward.graph) == before


def squares_and_maxima(wide: Tensor) -> Tensor:
    return wide.amax(1).sum() + (wide * wide).mean()


def of_the_maximum(wide: Tensor) -> Tensor:
    return (wide * (wide == wide.amax((0, 1), keepdim=True)).float()).sum()


def maximum_beside_others(wide: Tensor) -> Tensor:
    return wide.max() + wide.detach().sum(1).cos().sum()


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
@pytest.mark.parametrize("reads", [squares_and_maxima, of_the_maximum, maximum_beside_others])
def test_what_is_compared_is_the_same_everywhere(reads: Callable[[Tensor], Tensor], mode: str) -> None:
    """Two casts of a sum of five may differ: the one inside the sum's kernel is of the unrounded sum."""

    def run(backend: Any, **options: Any) -> tuple[Tensor, Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        terms = [torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(5)]
        step = torch.compile(lambda *a: reads(sum(a[1:], a[0]).float()), backend=backend, **options)
        loss = step(*terms)
        loss.backward()
        assert terms[0].grad is not None
        return loss.detach(), terms[0].grad.float()

    with torch._inductor.config.patch(force_disable_caches=True):
        expected = run("inductor")
        got = run("ciuic", options={"mode": mode, "report": "off"})
    torch.testing.assert_close(got[0], expected[0], rtol=2**-8, atol=0.0)  # of values rounded to bfloat16
    of_maxima, theirs = (gradient[gradient > 0.01].sum() for _, gradient in (got, expected))
    torch.testing.assert_close(of_maxima, theirs, rtol=0.01, atol=0.0)  # equal maxima share theirs
