"""Repeat a widening cast for each of its readers, so that what is stored for them is the narrow value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ciuic_compile import compat
from ciuic_compile.capture import owner, tensor
from ciuic_compile.classify import is_cast
from ciuic_compile.fusion import read_from_memory
from ciuic_compile.schedule import output_nodes, stored_values

from ._infra import Graphs, PassResult


@dataclass(frozen=True)
class CastWhereRead:
    """Give every reader of a cast one of its own, where Inductor would store what is cast, and wide.

    Of a value that reads much and that several read, Inductor stores the last form, which several read: for
    the gradients of a residual network under autocast the sum of three, cast to float32 for a BatchNorm's
    reductions (392 MiB of a ResNet-50's 2,836, beside the bfloat16 gradients that it could have been written
    over). Stored, the value is rounded to its own dtype, as eager torch does; where Inductor fuses, it leaves
    that rounding out. The cast itself is exact, and repeated costs a conversion where the value is read.
    """

    def run(self, graphs: Graphs) -> PassResult:
        changed = False
        for graph in (graphs.forward.graph, graphs.backward.graph):
            casts = [n for n in graph.nodes if is_cast(n) and self.declines(n) is None]
            if not casts:
                continue
            stored = stored_values(graph, {owner(n) for n in output_nodes(graph)})
            for cast in casts:
                if cast in stored and cast.args[0] not in stored:
                    _repeat(cast)
                    changed = True
        return PassResult(changed)

    def declines(self, cast: fx.Node) -> str | None:
        """Why a cast serves all of its readers, or None."""
        source = cast.all_input_nodes[0]
        wide, narrow = tensor(cast), tensor(source)
        if wide is None or narrow is None or wide.dtype.itemsize <= narrow.dtype.itemsize:
            return "it does not widen"
        if not compat.is_pointwise(source) or len(source.users) > 1:
            return "what is cast is in memory as it is"
        if len(cast.users) < 2:
            return "one reads it"
        if read_from_memory(cast):
            return "it is needed in memory"
        return None


def _repeat(cast: fx.Node) -> None:
    for user in list(cast.users)[1:]:
        with cast.graph.inserting_before(user):
            user.replace_input_with(cast, cast.graph.node_copy(cast))
