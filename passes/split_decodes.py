"""Decode separately for readers that need the values in memory and for readers that fuse the decode."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ciuic_compile import compat, markers
from ciuic_compile.fusion import is_external, reaches_reduction, readers

from ._infra import Graphs, PassResult


@dataclass(frozen=True)
class SplitDecodes:
    """Give the external readers of a decode (matmuls, attention) one of their own, if others can fuse it.

    The external readers' decode is a kernel whose result lives from the first of them to the last. The
    elementwise readers' costs no memory: shared, it would have been kept until the last of both. Where a
    reduction is among the others, the decode is stored anyway and serves all.

    Attributes:
        devices: device types whose decodes are split. The CPU has no kernel: there one decode serves all.
    """

    devices: tuple[str, ...] = ("cuda",)

    def run(self, graphs: Graphs) -> PassResult:
        changed = False
        for call in list(graphs.backward.graph.nodes):
            if (
                not markers.is_marker(call, markers.decode)
                or call.meta["val"].device.type not in self.devices
            ):
                continue
            external = [is_external(reader) for reader in readers(call)]
            if any(external) and not all(external) and not reaches_reduction(call):
                _move_external_readers(call, _copy(call))
                changed = True
        return PassResult(changed)


def _move_external_readers(node: fx.Node, own: fx.Node) -> None:
    """Let the external readers of ``node`` and of its views read ``own`` and its views."""
    for user in list(node.users):
        if is_external(user):
            user.replace_input_with(node, own)
        elif compat.is_view(user) and any(map(is_external, readers(user))):
            view = _copy(user)
            view.replace_input_with(node, own)
            _move_external_readers(user, view)
            if not user.users:
                user.graph.erase_node(user)


def _copy(node: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        return node.graph.node_copy(node)
