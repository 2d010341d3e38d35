"""Move each encode to right behind the last forward use of what it reads, or to where that can be made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ciuic_compile import compat, markers

from ._infra import Graphs, PassResult, last_use


@dataclass(frozen=True)
class PlaceEncodes:
    """Encode after the last forward use: the original and its encoded form then overlap least.

    Encoding everything at the end of the forward took a forward peak from 71.8 to 140 MB
    (two GPT layers, CPU profiler, torch 2.13). A mask that the backward would have computed is only encoded:
    torch puts it at the end of the forward, and until then all that it is computed from stays alive (a
    ResNet-50's forward peak of 3,317 MiB was 4,003 so, in the replay of its schedule).
    """

    def run(self, graphs: Graphs) -> PassResult:
        changed = False
        for call in list(graphs.forward.graph.nodes):
            if not markers.is_marker(call, markers.encode):
                continue
            tensor = call.args[0]
            assert isinstance(tensor, fx.Node)
            block = [call, *(n for n in call.users if n.op != "output")]
            changed |= _made_early(tensor, block)
            target = last_use(tensor)
            if target is call or call.prev is target:
                continue
            _move(block, target)
            changed = True
        return PassResult(changed)


def _made_early(tensor: fx.Node, block: list[fx.Node]) -> bool:
    """Move an encode, and what is computed for it alone, up to behind what that is computed from."""
    alone, stack = {block[0]}, [tensor]
    while stack:
        node = stack.pop()
        elementwise = compat.is_fusible(node) or compat.is_view(node)
        movable = node.op == "call_function" and elementwise and not compat.is_random(node)
        if movable and alone.issuperset(node.users):
            alone.add(node)
            stack += node.all_input_nodes
    read = {source for node in alone.difference(block) for source in node.all_input_nodes} - alone
    if not read or max(read).op == "placeholder":
        return False
    chain = sorted(node for node in alone if node > max(read))
    if all(node.prev is before for before, node in zip([max(read), *chain], chain, strict=False)):
        return False
    _move([*chain[:-1], *block], max(read))
    return True


def _move(nodes: list[fx.Node], target: fx.Node) -> None:
    """Put nodes, in their order, right behind another."""
    for node in reversed(nodes):
        target.append(node)
