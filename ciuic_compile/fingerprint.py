"""Which graphs a calibration holds for: those of the same model, at any batch size, precision or mode."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import fx

from . import compat
from .capture import CapturedGraph, tensor
from .classify import REBUILDABLE_RANDOM, is_attention, is_contraction, is_reduction
from .compat import packet

aten = torch.ops.aten
_CONVOLUTIONS = {aten.convolution}
#: Casts, copies and scalings come and go with the precision and the batch; dropout's scaling with its rate.
_INCIDENTAL = {
    aten.clone, aten._to_copy, torch.ops.prims.convert_element_type, aten.mul, aten.div, aten.add, aten.sub,
    aten.constant_pad_nd, aten.bitwise_not, aten.logical_not,
}  # fmt: skip


def fingerprint(captured: CapturedGraph) -> str:
    """A hash of the parameters' shapes, in order, and of which functions the forward is made of."""
    outputs = torch.utils._pytree.arg_tree_leaves(*captured.graph.output_node().args)
    gradients = outputs[captured.num_fwd_outputs :]
    primals = [n for n in captured.graph.find_nodes(op="placeholder") if not captured.is_backward(n)]
    shapes = [
        _shape(primal, primal in captured.parameters)
        for primal, gradient in zip(primals, gradients, strict=False)
        if isinstance(gradient, fx.Node)
    ]
    products = [i for i, node in enumerate(captured.savable) if is_contraction(node)]
    # behind the last product comes the loss, which a model may hold or leave to its caller
    before = captured.savable[: max(products, default=-1) + 1]
    functions = sorted({name for node in before if (name := _function(node))})
    text = json.dumps([shapes, functions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shape(primal: fx.Node, parameter: bool) -> list[int] | str:
    """A parameter's shape; of an input only that it has a gradient, because batches differ."""
    value = tensor(primal)
    return [compat.hint(s) for s in value.shape] if parameter and value is not None else "input"


def _function(node: fx.Node) -> str:
    """What sort of product a node is, or which function of one tensor; empty for anything else."""
    if is_attention(node):
        return "attention"
    if is_contraction(node):
        return "convolution" if packet(node) in _CONVOLUTIONS else "matmul"
    value, inputs = tensor(node), node.all_input_nodes
    if node.op != "call_function" or value is None or not value.dtype.is_floating_point or len(inputs) != 1:
        return ""
    if packet(node) in _INCIDENTAL | REBUILDABLE_RANDOM or compat.is_random(node) or is_reduction(node):
        return ""
    return "" if compat.is_view(node) or compat.is_getitem(node) else str(packet(node))
