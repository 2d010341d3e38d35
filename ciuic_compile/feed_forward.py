"""Which feed-forwards work token by token: matmuls, elementwise operations, a matmul, and the way back."""

from __future__ import annotations

from torch import fx

from . import compat
from .capture import CapturedGraph
from .compat import packet
from .rows import FEED_FORWARD_CHUNK, Declined, Label, RowFinder, RowRegion, aten, is_elementwise, shape_of

_MATMULS = (aten.mm, aten.addmm)


def is_feed_forward(captured: CapturedGraph, node: fx.Node) -> bool:
    """Whether a matmul of the forward widens its rows, and nothing but elementwise code and matmuls reads it.

    Only the forward is looked at: :class:`FeedForwardFinder` says whether the backward can be chunked too.
    """
    if packet(node) not in _MATMULS or node.meta.get(FEED_FORWARD_CHUNK) or captured.is_backward(node):
        return False
    try:
        wide, narrow = shape_of(node)[1], shape_of(node.args[-2])[1]  # type: ignore[arg-type]
    except Declined:
        return False
    stack, seen, found = [node], {node}, False
    while stack:
        for user in stack.pop().users:
            if user in seen or captured.is_backward(user):
                continue
            seen.add(user)
            if packet(user) in _MATMULS:
                found = True
            elif compat.is_view(user) or is_elementwise(user):
                stack.append(user)
            else:
                return False
    return found and wide > narrow


class FeedForwardFinder(RowFinder):
    """Follows one matmul of a feed-forward to the matmul behind its activation, and back.

    Beside it, the region takes in the other matmuls that the activation reads (SwiGLU has two) and, in the
    backward, the one that makes the activation's gradient.
    """

    what = "feed-forward's values"
    mark = FEED_FORWARD_CHUNK

    def find(self) -> RowRegion:
        region = super().find()
        if not any(kind == "rows" and not self._captured.is_backward(n) for n, kind in region.ends.items()):
            raise Declined("no matmul follows it")
        return region

    def _label(self, node: fx.Node) -> Label | None:
        if packet(node) in (aten.gather, aten.slice, aten.slice_scatter):
            raise Declined(f"{node.name} takes a part of it")
        return super()._label(node)

    def _is_source(self, node: fx.Node, label: Label) -> bool:
        if packet(node) not in _MATMULS or node.kwargs or label != "rv" or node in self._ends:
            return False
        self._sources.append(node)
        self._from_logits.add(node)
        return True

    def _reduced(self, node: fx.Node, source: fx.Node) -> Label | None:
        label = super()._reduced(node, source)
        if label is not None:
            raise Declined(f"{node.name} ({node.target}) reduces over the features")
        return None

    def _matmul(self, node: fx.Node) -> str:
        left, right = node.args[-2:]
        forward = not self._captured.is_backward(node) and self._labels.get(left) == "rv"  # type: ignore[arg-type]
        if forward and packet(node) in _MATMULS and right not in self._labels and not node.kwargs:
            return "rows"
        return super()._matmul(node)
