"""Predicted time of one op: a roofline of bytes moved and floating-point operations over a device's rates."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from .. import compat
from ..capture import tensor
from ..classify import is_attention, packet
from ..devices import DeviceProfile
from ..energy import is_attention_backward
from ..simulate import tensor_bytes

#: Convolutions, and which argument their weight is.
_WEIGHT: dict[object, int] = {torch.ops.aten.convolution: 1, torch.ops.aten.convolution_backward: 2}
#: How much longer than their roofline a GPU's convolutions take where bytes bound them and where operations
#: do, and by how many input channels its kernels compute. So much makes those of whole steps under autocast
#: 13.6 ms (a ResNet) and 34.5 (a UNet), and the first of the ResNet, of three channels, 1.2 ms; an H100 took
#: 13.6, 36.5 and 1.5 to 1.8, where the roofline says 6.4, 15.3 and 0.2 (docs/budgets.md).
_CONVOLVED, _COMPUTED, _CHANNELS = 1.25, 2.4, 16


def node_us(node: fx.Node, device: DeviceProfile) -> float:
    """Microseconds that the node takes when it runs by itself: its inputs read, its results written."""
    moved = tensor_bytes(node.meta.get("val")) + sum(
        tensor_bytes(i.meta.get("val")) for i in node.all_input_nodes
    )
    reads, computes = device.microseconds(moved), flops(node) / device.flop_per_us(_itemsize(node))
    if device.kind == "cuda" and (position := _WEIGHT.get(packet(node))) is not None:
        weight = node.args[position]
        assert isinstance(weight, fx.Node)
        channels = max(1, compat.hint(weight.meta["val"].shape[1]))
        reads *= _CONVOLVED
        computes *= _COMPUTED * ceil(channels / _CHANNELS) * _CHANNELS / channels
    return max(reads, computes)


def flops(node: fx.Node) -> float:
    """Floating-point operations of a matmul, convolution or attention at the sizes' hints; 0 of others."""
    count = flop_registry.get(packet(node))
    if count is None:
        return 0.0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    if is_attention(node) or is_attention_backward(node):
        return float(compat.hint(count(*_with_equal_heads(args), **kwargs, out_val=node.meta["val"])))
    return float(compat.hint(count(*args, **kwargs, out_val=node.meta["val"])))


def _with_equal_heads(args: Sequence[object]) -> list[object]:
    """Attention's operands with as many heads of keys as of queries, as torch's count asks for."""
    heads = max((a.shape[1] for a in args if isinstance(a, torch.Tensor) and a.dim() == 4), default=0)

    def repeated(value: object) -> object:
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[1] != heads:
            return value.repeat(1, heads // value.shape[1], 1, 1)
        return value

    return [repeated(a) for a in args]


def _itemsize(node: fx.Node) -> int:
    """Of the first floating-point operand."""
    values = (tensor(i) for i in node.all_input_nodes)
    return next((v.dtype.itemsize for v in values if v is not None and v.dtype.is_floating_point), 4)
