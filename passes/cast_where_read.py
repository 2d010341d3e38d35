"""Repeat a gradient's widening cast for each of its readers, so that what is stored is the narrow value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ciuic_compile import compat
from ciuic_compile.capture import owner, tensor
from ciuic_compile.classify import is_cast, packet
from ciuic_compile.fusion import read_from_memory, readers
from ciuic_compile.schedule import output_nodes, stored_values

from ._infra import Graphs, PassResult

aten = torch.ops.aten
_COMPARING = (
    *(aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.aminmax),
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.sort, aten.topk, aten.sign),
)


@dataclass(frozen=True)
class CastWhereRead:
    """Give every reader of a cast gradient a cast of its own, where Inductor would store what is cast.

    Of a value that reads much and that several read, Inductor stores the last form, which several read: of
    the sum of three bfloat16 gradients, cast to float32 for a BatchNorm's reductions, the wide one (392 MiB
    at a ResNet-50's peak, beside the gradients that a narrow one is written over).

    Readers in other kernels then read it rounded to its own dtype, as in eager torch; one in the kernel that
    makes it does not, as in whatever Inductor fuses. Because two readers may differ so, what is compared
    (with its own maximum, say) has one cast, and so has all that does not depend on incoming gradients: the
    other graph may compare it.
    """

    def run(self, graphs: Graphs) -> PassResult:
        graph = graphs.backward.graph
        casts = [n for n in graph.nodes if is_cast(n) and self.declines(n) is None]
        if not casts:
            return PassResult(False)
        gradients = _gradients(graph)
        stored = stored_values(graph, {owner(n) for n in output_nodes(graph)})
        wide = [n for n in casts if n in gradients and n in stored and n.args[0] not in stored]
        for cast in wide:
            _repeat(cast)
        return PassResult(bool(wide))

    def declines(self, cast: fx.Node) -> str | None:
        """Why a cast serves all of its readers, or None."""
        source = cast.all_input_nodes[0]
        wide, narrow = tensor(cast), tensor(source)
        if wide is None or narrow is None or wide.dtype.itemsize <= narrow.dtype.itemsize:
            return "it does not widen"
        if wide.device != narrow.device:
            return "it moves the value"
        if not compat.is_pointwise(source) or len(source.users) > 1:
            return "what is cast is in memory as it is"
        if len(cast.users) < 2:
            return "one reads it"
        if read_from_memory(cast):
            return "it is needed in memory"
        if _is_compared(cast):
            return "an extremum or a comparison asks for the very same value everywhere"
        return None


def _is_compared(node: fx.Node) -> bool:
    """Whether the value is compared, or what elementwise operations make of it."""
    stack, seen = [node], {node}
    while stack:
        for reader in readers(stack.pop()):
            if packet(reader) in _COMPARING:
                return True
            if reader not in seen and compat.is_pointwise(reader):
                seen.add(reader)
                stack.append(reader)
    return False


def _gradients(graph: fx.Graph) -> set[fx.Node]:
    """What is computed from incoming gradients; not what is made again of saved values alone."""
    found = {n for n in graph.find_nodes(op="placeholder") if "tangents" in n.name}
    for node in graph.nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _repeat(cast: fx.Node) -> None:
    for user in list(cast.users)[1:]:
        with cast.graph.inserting_before(user):
            user.replace_input_with(cast, cast.graph.node_copy(cast))
