"""Predicted time of one op: a roofline of bytes moved and floating-point operations over a device's rates."""

from __future__ import annotations

from torch import fx
from torch.utils.flop_counter import flop_registry

from .. import compat
from ..capture import tensor
from ..classify import packet
from ..devices import DeviceProfile
from ..simulate import tensor_bytes


def node_us(node: fx.Node, device: DeviceProfile) -> float:
    """Microseconds that the node takes when it runs by itself: its inputs read, its results written."""
    moved = tensor_bytes(node.meta.get("val")) + sum(
        tensor_bytes(i.meta.get("val")) for i in node.all_input_nodes
    )
    return max(device.microseconds(moved), flops(node) / device.flop_per_us(_itemsize(node)))


def flops(node: fx.Node) -> float:
    """Floating-point operations of a matmul, convolution or attention at the sizes' hints; 0 of others."""
    count = flop_registry.get(packet(node))
    if count is None:
        return 0.0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return float(compat.hint(count(*args, **kwargs, out_val=node.meta["val"])))


def _itemsize(node: fx.Node) -> int:
    """Of the first floating-point operand."""
    values = (tensor(i) for i in node.all_input_nodes)
    return next((v.dtype.itemsize for v in values if v is not None and v.dtype.is_floating_point), 4)
