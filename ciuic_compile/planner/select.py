"""Which values live from forward to backward: one minimum cut over the joint graph.

The rest is rebuilt in the backward by cheap, deterministic ops. Capacities are the bytes that a
value will really occupy (after its codec), so the cut prefers one compressed value over two exact
ones. The construction follows torch's partitioner (torch/_functorch/partitioners.py,
``solve_min_cut``); what differs: views are never saved (their base is, once), sources of skip
connections are never rebuilt as a chain, masks are packed to bits instead of rebuilt from lossy data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import fx

from .. import compat
from ..capture import CapturedGraph, operands, owner, tensor
from ..classify import REBUILDABLE_RANDOM, Classifier, is_contraction, is_reduction, packet

_INF = 2**30
_BUDGET = 2**26  # all finite capacities together stay below this, so that flows fit in 32 bits


class NoCut(Exception):
    """Some value the backward needs can neither be saved nor rebuilt; the caller keeps torch's choice."""


def select_saved(
    captured: CapturedGraph, classes: Classifier, stored_bytes: Callable[[fx.Node], float], lossy: bool
) -> list[fx.Node]:
    """Nodes to save, in joint-graph order (parameters and inputs that the backward reads included).

    Args:
        stored_bytes: bytes that a node's value takes between forward and backward.
        lossy: whether codecs may be lossy; then masks and statistics of activations are saved, not rebuilt.

    Raises:
        NoCut: the constraints (checkpoint tags, say) leave no finite cut.
    """
    info, nodes = captured.info, captured.graph.nodes
    index = {node: i for i, node in enumerate(n for n in nodes if n.op != "output")}
    source, sink = 2 * len(index), 2 * len(index) + 1
    skips = _skip_sources(captured)
    distance = _distance_to_backward(captured)
    edges: dict[tuple[int, int], float] = {}
    for node, i in index.items():
        enter, leave = 2 * i, 2 * i + 1
        if node in info.required_bw_nodes:
            if captured.is_backward(node):
                edges[enter, sink] = np.inf
                continue
            edges[leave, sink] = np.inf
        if compat.must_recompute(node):
            edges[enter, sink] = np.inf
            continue
        if not may_rebuild(node, classes, skips, lossy):
            edges[source, enter] = np.inf
        # Near ties go to the value closest to its use (shorter chains) and the narrower dtype (fewer
        # bytes for the encoder to read).
        tie = 0.002 * min(distance[node], 50) + 0.003 * _itemsize(node)
        edges[enter, leave] = _capacity(node, captured, stored_bytes) * (1 + tie)
        for user in node.users:
            if user in index:
                edges[leave, 2 * index[user]] = np.inf
    crossed = _cut(edges, source, sink)
    return [node for node, i in index.items() if i in crossed]


def follows_rules(
    captured: CapturedGraph, classes: Classifier, saved: Sequence[fx.Node], lossy: bool
) -> bool:
    """Whether the backward can rebuild the rest from these saved nodes without breaking a rule of the cut.

    Inductor's own choice may rebuild masks from values that we store lossily, and (torch 2.11 to 2.13)
    rebuilds from inputs that the forward has overwritten, which makes its gradients wrong. Chains of
    skip connections are not looked for.
    """
    stack, seen = list(captured.bwd_outputs), set(saved) - captured.mutated
    while stack:
        node = stack.pop()
        if node in seen or (node.op == "placeholder" and node not in captured.mutated):
            continue
        seen.add(node)
        rebuilt = not captured.is_backward(node) and not compat.must_recompute(node)
        if rebuilt and (lossy or node.op == "placeholder") and not may_rebuild(node, classes, set(), lossy):
            return False
        stack.extend(node.all_input_nodes)
    return True


def _itemsize(node: fx.Node) -> int:
    value = tensor(node)
    return 0 if value is None else value.dtype.itemsize


def _capacity(node: fx.Node, captured: CapturedGraph, stored_bytes: Callable[[fx.Node], float]) -> float:
    value = node.meta.get("val")
    if compat.is_symbolic(node):
        return 1.0
    if not isinstance(value, torch.Tensor):
        return np.inf if isinstance(value, (tuple, list)) or value is None else 0.0
    if node in captured.mutated:
        return np.inf  # the backward would read what the forward wrote there: save what was computed from it
    if node.op == "placeholder":
        return 0.0  # alive anyway
    if (compat.is_view(node) or owner(node) is not node) and not compat.must_save(node):
        return np.inf
    return max(1.0, stored_bytes(node))


def may_rebuild(node: fx.Node, classes: Classifier, skips: set[fx.Node], lossy: bool) -> bool:
    """Whether the backward may compute the node again: cheap, deterministic, no rule of numerics against it.

    Args:
        skips: sources of skip connections, which are not rebuilt.
    """
    if node.op == "placeholder":
        return False
    if node.op == "get_attr" or compat.is_view(node) or compat.is_symbolic(node):
        return True
    if compat.must_save(node) or compat.is_collective(node):
        return False
    if packet(node) in REBUILDABLE_RANDOM and packet(node) is not torch.ops.prims.inductor_seeds:
        return True
    if compat.is_random(node) or is_contraction(node) or not compat.is_recomputable(node):
        return False
    if node in classes.exact:
        return not is_reduction(node)
    if lossy and node in classes.chunk_inputs and packet(node) is not torch.ops.aten.clone:
        return False  # its logits, made again, must be those of the forward
    value = tensor(node)
    if lossy and value is not None and not value.dtype.is_floating_point:
        # A mask of lossy values would be another mask; what integers alone determine comes out the same.
        if not all(
            compat.is_symbolic(i) or _is_integer(i) or i in classes.exact for i in node.all_input_nodes
        ):
            return False
    return not is_reduction(node) and node not in skips


def _is_integer(node: fx.Node) -> bool:
    value = tensor(node)
    return value is not None and not value.dtype.is_floating_point and not value.dtype.is_complex


def _skip_sources(captured: CapturedGraph) -> set[fx.Node]:
    """Values added back after a matmul or convolution of themselves.

    Rebuilding such a value rebuilds the one before it, and so on to the first layer, all alive at once:
    on an H200 that raised a Llama's backward peak from 15.1 to 19.1 GiB (65,536 tokens, 4 layers, bf16).
    """
    depth: dict[fx.Node, int] = {}
    skips: set[fx.Node] = set()
    for node in captured.savable:
        inputs = [i for i in operands(node) if i in depth]
        depth[node] = max((depth[i] for i in inputs), default=0) + is_contraction(node)
        if is_contraction(node) or len(inputs) < 2:
            continue
        skips |= {i for i in inputs if 0 < depth[i] < depth[node]}
    return skips | {owner(n) for n in skips}


def _distance_to_backward(captured: CapturedGraph) -> dict[fx.Node, int]:
    distance: dict[fx.Node, int] = {}
    for node in reversed(captured.savable):
        steps = [
            0 if captured.is_backward(u) else distance.get(u, 50) + 1 for u in node.users if u.op != "output"
        ]
        distance[node] = min(steps, default=50)
    return distance


def _cut(edges: dict[tuple[int, int], float], source: int, sink: int) -> set[int]:
    """Indices of the nodes whose inner edge a minimum cut crosses."""
    finite = sum(c for c in edges.values() if c != np.inf)
    unit = max(finite / _BUDGET, 1e-9)
    capacities = np.array(
        [_INF if c == np.inf else max(round(c / unit), c > 0) for c in edges.values()], dtype=np.int32
    )
    rows, columns = (np.fromiter(side, dtype=np.int32) for side in zip(*edges, strict=True))
    graph = csr_array((capacities, (rows, columns)), shape=(sink + 1, sink + 1))
    result = maximum_flow(graph, source, sink)
    if result.flow_value >= _INF:
        raise NoCut
    residual = graph - result.flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reached = set(breadth_first_order(residual, source, return_predecessors=False).tolist())
    return {u // 2 for u, v in edges if u % 2 == 0 and v == u + 1 and u in reached and v not in reached}
