"""In which order Inductor runs the kernels of a plan's backward."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.virtualized import V

# From torch 2.13 on, where code made with any other callable is not cached.
_Pass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)


class ByLastValue(_Pass):  # type: ignore[misc]
    """Each kernel of a backward where the last value stands that it makes or waits for, where that is wanted.

    Inductor runs it where its first stands, after all that it needs: one that sums up the weight gradients of
    two norms, say, pulls all that is between them before the matmuls there, whose operands then wait: three
    of 176 MiB in a Llama of 3.1 GiB. ``reorder_for_peak_memory`` would undo that, but ignores what is saved.

    Args:
        wanted: whether the plan's simulation takes less memory so (``kernels.by_last_value``).
        theirs: the user's own pass, which runs after it.
    """

    def __init__(self, wanted: Callable[[], bool], theirs: Callable[[list[Any]], list[Any]] | None) -> None:
        self._wanted, self._theirs = wanted, theirs

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Scheduler nodes after fusion, in their new order."""
        if nodes and V.graph.is_backward and self._wanted():
            nodes = self._ordered(nodes)
        return nodes if self._theirs is None else self._theirs(nodes)

    def _ordered(self, nodes: list[Any]) -> list[Any]:
        nodes = nodes[0].scheduler.topological_sort_schedule(nodes)
        makers = {name: node for node in nodes for name in node.get_buffer_names()}
        last: dict[Any, int] = {}
        for node in nodes:
            before = (makers[d.name] for d in node.unmet_dependencies if d.name in makers)
            last[node] = max([node.max_order, *(last[n] for n in before if n in last)])
        return sorted(nodes, key=last.__getitem__)

    def uuid(self) -> Any:
        """What Inductor hashes into the keys of cached code; the plan is in its partitioner's.

        Another one each time where the user's pass has none, so that nothing is found there.
        """
        own = f"{__name__}.{type(self).__name__} 1"
        if self._theirs is None:
            return own
        theirs: Any = getattr(self._theirs, "uuid", lambda: None)()
        return own, theirs or secrets.token_hex()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled into those keys before torch 2.13, and again of the copy that this makes."""
        theirs = vars(self).get("_theirs")
        return {} if theirs is None else {"_theirs": theirs}
