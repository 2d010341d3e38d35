"""Predicted times: what torch counts for an op, and what it cannot count."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ciuic_compile.devices import named
from ciuic_compile.planner.timing import flops, node_us

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


@pytest.mark.parametrize(
    ("device", "channels", "size", "longer"),
    [
        ("h100", 16, 1, 1.25),  # moves more than it computes
        ("h100", 512, 7, 2.4),
        ("h100", 3, 31, 2.4 * 16 / 3),  # computed with as many channels as a tensor core takes
        ("h100", 0, 1, 1.25),
        ("cpu", 16, 1, 1.0),
    ],
)
def test_a_convolution_takes_longer_than_its_roofline_on_a_gpu(
    device: str, channels: int, size: int, longer: float
) -> None:
    graph = fx.Graph()
    with FakeTensorMode():
        x, weight = torch.empty(8, channels, 64, 64), torch.empty(16, channels, size, size)
        value = torch.nn.functional.conv2d(x, weight)
    values = [graph.placeholder("x"), graph.placeholder("weight")]
    for node, meta in zip(values, (x, weight), strict=True):
        node.meta["val"] = meta
    rest = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    call = graph.call_function(aten.convolution.default, (*values, *rest))
    call.meta["val"] = value
    profile = named(device)
    moved = profile.microseconds(4 * (x.numel() + weight.numel() + value.numel()))
    roofline = max(moved, flops(call) / profile.flop_per_us(4))
    assert node_us(call, profile) == pytest.approx(longer * roofline)
