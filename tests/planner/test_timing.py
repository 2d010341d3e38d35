"""Predicted times: what torch counts for an op, and what it cannot count."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ciuic_compile.planner.timing import flops

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_efficient_attention


def attention(kv_heads: int, backward: bool) -> fx.Node:
    """A fused attention of 8 query heads, 64 tokens, 32 features, batch 2."""
    graph = fx.Graph()
    with FakeTensorMode():
        q, kv = torch.empty(2, 8, 64, 32), torch.empty(2, kv_heads, 64, 32)
        statistic = torch.empty(2, 8, 64)
    values = [q, q, kv, kv, None, q, statistic] if backward else [q, kv, kv, None, True]
    arguments = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            arguments.append(value)
            continue
        node = graph.placeholder(f"x{len(arguments)}")
        node.meta["val"] = value
        arguments.append(node)
    if backward:
        target = aten._scaled_dot_product_efficient_attention_backward.default
        call = graph.call_function(target, (*arguments, statistic, statistic, 0.0, [True] * 4))
        call.meta["val"] = (q, kv, kv, None)
    else:
        call = graph.call_function(ATTENTION.default, tuple(arguments))
        call.meta["val"] = (q, statistic, None, None)
    return call


@pytest.mark.parametrize("backward", [False, True])
def test_grouped_queries_take_the_flops_of_their_query_heads(backward: bool) -> None:
    every = flops(attention(8, backward))
    assert every == (5 if backward else 2) * 2 * (2 * 8 * 64 * 64 * 32)
    assert flops(attention(2, backward)) == flops(attention(1, backward)) == every
