"""In which order Inductor runs the kernels of a plan's backward."""

from __future__ import annotations

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
    """

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self._wanted = wanted

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Scheduler nodes after fusion, in their new order."""
        if not nodes or not V.graph.is_backward or not self._wanted():
            return nodes
        nodes = nodes[0].scheduler.topological_sort_schedule(nodes)
        makers = {name: node for node in nodes for name in node.get_buffer_names()}
        last: dict[Any, int] = {}
        for node in nodes:
            before = (makers[d.name] for d in node.unmet_dependencies if d.name in makers)
            last[node] = max([node.max_order, *(last[n] for n in before if n in last)])
        return sorted(nodes, key=last.__getitem__)

    def uuid(self) -> str:
        """What Inductor hashes into the keys of cached code; the plan is in its partitioner's."""
        return f"{__name__}.{type(self).__name__} 1"

    def __getstate__(self) -> dict[str, Any]:
        return {}  # pickled into those keys before torch 2.13
