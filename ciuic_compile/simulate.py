"""Peak memory of a forward and a backward graph, by walking their storages' live ranges.

A first model (issue B replaces it by a replay of Inductor's own allocations): pointwise values that
only fused consumers read take no memory; everything else is allocated where it is made and freed
after its last use. Parameters and graph inputs are not counted, saved tensors are. What it leaves
out: allocator rounding, workspaces of external kernels, CUDA context and code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from . import compat, markers
from .capture import owner, tensor
from .classify import is_contraction, is_reduction
from .fusion import decoded_to_memory


def tensor_bytes(value: object) -> int:
    """Bytes of a fake tensor (or of every tensor in a tuple) at the sizes' hints."""
    if isinstance(value, torch.Tensor):
        return int(compat.hint(value.numel())) * value.dtype.itemsize
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(v) for v in value)
    return 0


@dataclass(frozen=True)
class Peaks:
    """Bytes above parameters and inputs: saved tensors, and the peaks while each graph runs."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The step's peak, in bytes."""
        return max(self.forward, self.backward)


def simulate(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> Peaks:
    """Predicted peaks of one training step, in bytes, parameters and graph inputs excluded."""
    saved = saved_storages(forward, num_fwd_outputs)
    outputs = _storage_set(_output_nodes(forward)[:num_fwd_outputs])
    user_outputs = sum(tensor_bytes(n.meta.get("val")) for n in outputs if n.op != "placeholder")
    forward_peak = _graph_peak(forward, {})
    names = {node.name for node in saved}
    live = {
        n: tensor_bytes(n.meta.get("val")) for n in backward.find_nodes(op="placeholder") if n.name in names
    }
    tangents = sum(
        tensor_bytes(n.meta.get("val")) for n in backward.find_nodes(op="placeholder") if "tangents" in n.name
    )
    backward_peak = _graph_peak(backward, live) + user_outputs + tangents
    return Peaks(sum(map(tensor_bytes, (n.meta["val"] for n in saved))), forward_peak, backward_peak)


def saved_storages(forward: fx.Graph, num_fwd_outputs: int) -> list[fx.Node]:
    """The nodes whose storages live from forward to backward, parameters and inputs excluded.

    A storage that several saved values share appears once, under its owner's name or, where the
    owner itself is not an output, under the first saved view of it.
    """
    seen: set[fx.Node] = set()
    result = []
    for node in _output_nodes(forward)[num_fwd_outputs:]:
        base = owner(node)
        if tensor(node) is None or base.op in ("placeholder", "get_attr") or base in seen:
            continue
        seen.add(base)
        result.append(node)
    return result


def _output_nodes(graph: fx.Graph) -> list[fx.Node]:
    (values,) = graph.output_node().args
    assert isinstance(values, (tuple, list))
    return [v for v in values if isinstance(v, fx.Node)]


def _storage_set(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {owner(n) for n in nodes}


def _graph_peak(graph: fx.Graph, live_inputs: Mapping[fx.Node, int]) -> int:
    """Peak bytes of one graph; ``live_inputs`` are counted until their last use, other inputs never."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    kept = _storage_set(_output_nodes(graph))
    materialized = {n: _is_materialized(n, kept) for n in graph.nodes}
    last_use: dict[fx.Node, int] = {n: order[n] for n in live_inputs}
    end = len(order)
    for node in reversed(graph.nodes):
        when = order[node] if materialized[node] else last_use.get(node, order[node])
        if node.op == "output":
            when = end
        for source in node.all_input_nodes:
            # A fused value costs nothing itself, but keeps its inputs until its consumers run.
            for storage in {owner(source), source}:
                last_use[storage] = max(last_use.get(storage, -1), when)
    frees: dict[int, int] = {}
    live = sum(live_inputs.values())
    for node, size in live_inputs.items():
        frees[last_use[node]] = frees.get(last_use[node], 0) + size
    peak = live
    for node in graph.nodes:
        step = order[node]
        if node.op == "call_function" and materialized[node]:
            size = tensor_bytes(node.meta.get("val"))
            in_place = not is_contraction(node) and frees.get(step, 0) >= size > 0
            peak = max(peak, live + (0 if in_place else size))
            live += size
            death = last_use.get(node, step)
            frees[death] = frees.get(death, 0) + size
        live -= frees.pop(step, 0)
    return max(peak, live)


def _is_materialized(node: fx.Node, outputs: set[fx.Node]) -> bool:
    """Whether Inductor will give this node's value a buffer of its own."""
    if node.op != "call_function" or compat.is_getitem(node) or compat.is_view(node) or _overwrites(node):
        return False
    if markers.is_marker(node, markers.decode):
        return decoded_to_memory(node)
    if node in outputs or not compat.is_fusible(node) or is_reduction(node):
        return True
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if compat.is_view(user):
                stack.append(user)
            elif not compat.is_fusible(user) and not _overwrites(user):
                return True
    return False


def _overwrites(node: fx.Node) -> bool:
    """Whether the node writes into an input: its kernel stores there and nowhere else."""
    return node.target is torch.ops.aten.copy_.default
