"""Names for a graph's values that say what they are and not when they were traced.

A value is named by the module that computes it, its op, and which of that module's values of that op it is,
in the order of the graph; what needs a gradient is counted apart: ``blocks.3.mlp/aten.mm.default#0``,
``blocks.3.mlp/backward/aten.mm.default#1``. Renamed variables, comments and definitions in another order
change none of it; node names, which count through the whole graph, move with every edit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx

from . import compat
from .capture import CapturedGraph, tensor
from .sources import source_of


def stable_ids(captured: CapturedGraph) -> dict[str, str]:
    """Ids of a joint graph's nodes, by their names; inputs are told apart by dtype and shape."""
    backward = {n.name for n in captured.graph.nodes if captured.is_backward(n)}
    return count_up(((n, n.name in backward) for n in captured.graph.nodes), Counter())


def count_up(nodes: Iterable[tuple[fx.Node, bool]], seen: Counter[str], prefix: str = "") -> dict[str, str]:
    """Ids of these nodes, each with whether it is the backward's; ``seen`` counts those there already are."""
    ids = {}
    for node, backward in nodes:
        title = prefix + _title(node, backward)
        ids[node.name] = f"{title}#{seen[title]}"
        seen[title] += 1
    return ids


def _title(node: fx.Node, backward: bool) -> str:
    if node.op == "placeholder":
        value = tensor(node)
        sizes = [] if value is None else [str(compat.hint(size)) for size in value.shape]
        kind = "number" if value is None else f"{str(value.dtype).removeprefix('torch.')}[{','.join(sizes)}]"
        return f"{'tangent' if backward else 'input'}/{kind}"
    return "/".join(filter(None, (source_of(node).module, "backward" * backward, _op(node.target))))


def _op(target: object) -> str:
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return str(getattr(target, "__name__", type(target).__name__))
