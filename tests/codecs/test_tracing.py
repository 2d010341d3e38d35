"""Encode and decode inside graphs: plain aten on the CPU, symbolic sizes, and compiled results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tests.codecs.cases import CHOSEN, awkward, codec_named, same_bits


def trace(
    name: str, shape: tuple[int, int], dynamic: bool
) -> tuple[fx.GraphModule, fx.GraphModule, ShapeEnv]:
    """Encode and decode traced as AOTAutograd does: fake tensors, Python dispatcher, Inductor's table."""
    codec = codec_named(name)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    first = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
    context = StatelessSymbolicContext(dynamic_sizes=[first, DimDynamic.STATIC])
    x = mode.from_tensor(torch.empty(shape, dtype=torch.bfloat16), symbolic_context=context)

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return codec.encode(x)

    def decode(encoded: tuple[Tensor, ...], rows: int) -> Tensor:
        return codec.decode(encoded, (rows, shape[1]), torch.bfloat16)

    table = select_decomp_table()
    with mode, enable_python_dispatcher():
        encoder = make_fx(encode, decomposition_table=table)(x)
        decoder = make_fx(decode, decomposition_table=table)(encode(x), x.shape[0])
    return encoder, decoder, env


def calls(*graphs: fx.GraphModule) -> set[Any]:
    """Every operator called."""
    return {node.target for g in graphs for node in g.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_only_ops_that_inductor_fuses(name: str, dynamic: bool) -> None:
    encoder, decoder, _ = trace(name, (33, 7), dynamic)
    ops = {op for op in calls(encoder, decoder) if isinstance(op, torch._ops.OpOverload)}
    assert ops, "nothing was traced"
    assert {op.namespace for op in ops} <= {"aten", "prims"}
    sizes = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default}
    assert all(op in lowerings for op in ops - sizes), [op for op in ops - sizes if op not in lowerings]
    assert not {op for op in ops if "cat" in op.name() or "stack" in op.name() or "scatter" in op.name()}


@pytest.mark.parametrize("name", CHOSEN)
def test_even_symbolic_sizes_add_no_guard(name: str) -> None:
    _, _, env = trace(name, (33, 128), dynamic=True)
    assert [str(guard.expr) for guard in env.guards] == []


@pytest.mark.parametrize("name", CHOSEN)
def test_uneven_symbolic_sizes_specialise_nothing_but_one_group(name: str) -> None:
    """torch's own layout rules ask whether there is one group; whatever else is asked is always true."""
    columns = 7
    _, _, env = trace(name, (33, columns), dynamic=True)
    (symbol,) = {s for guard in env.guards for s in guard.expr.free_symbols}
    for guard in env.guards:
        for rows in (10, 11, 64, 65, 1000, 10**9 + 1):
            assert guard.expr.subs(symbol, rows) == sympy.true, (str(guard.expr), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_inductor_on_cpu_equals_eager(name: str, dtype: torch.dtype) -> None:
    codec = codec_named(name)

    @torch.compile
    def encode(x: Tensor) -> tuple[Tensor, ...]:
        return codec.encode(x)

    @torch.compile
    def decode(encoded: tuple[Tensor, ...], shape: Iterable[int]) -> Tensor:
        return codec.decode(encoded, tuple(shape), dtype)

    x = awkward(3000, dtype).view(50, 60)  # 3000 = 46 groups and a tail
    expected = codec.encode(x)
    assert all(same_bits(a, b) for a, b in zip(encode(x), expected, strict=True))
    assert same_bits(decode(expected, x.shape), codec.decode(expected, x.shape, dtype))


@pytest.mark.parametrize("name", CHOSEN)
def test_one_compiled_graph_serves_every_size(name: str) -> None:
    codec = codec_named(name)
    graphs = 0

    def count(gm: fx.GraphModule, _: object) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    @torch.compile(backend=count)
    def trip(x: Tensor) -> Tensor:
        return codec.decode(codec.encode(x), x.shape, x.dtype)

    for rows in (33, 40, 128, 75):
        x = torch.randn(rows, 7)
        torch._dynamo.mark_dynamic(x, 0)
        assert same_bits(trip(x), codec.decode(codec.encode(x), x.shape, x.dtype))
    assert graphs == 1


@pytest.mark.parametrize("name", CHOSEN)
def test_decode_fuses_into_its_consumer(name: str) -> None:
    """One generated kernel reads the payload and writes the consumer's result: no decoded tensor exists."""
    from torch._inductor.utils import run_and_get_code

    codec = codec_named(name)
    encoded = codec.encode(torch.randn(64, 128))

    def consume(encoded: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        return torch.sigmoid(codec.decode(encoded, (64, 128), torch.float32)) * grad

    grad = torch.randn(64, 128)
    result, (code,) = run_and_get_code(torch.compile(consume), encoded, grad)
    torch.testing.assert_close(result, consume(encoded, grad))
    assert code.count("empty_strided_cpu((") == 1, "the result is the only buffer"
