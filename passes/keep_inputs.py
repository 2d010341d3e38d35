"""Save inputs themselves between forward and backward, not Inductor's channels-last copies of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ciuic_compile import compat

from ._infra import Graphs, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepInputs:
    """Let whatever reads a saved 4-D input (a convolution's weight, an image) read an ``as_strided`` of it.

    Inductor replaces what a convolution reads by a channels-last copy and, where the value is also a saved
    tensor, saves the copy: a second set of weights, 35 of the 58 MiB of a small ResNet-50 at 4:1. It leaves
    values alone that an ``as_strided`` reads; then the copy lives as long as the convolution.
    """

    def run(self, graphs: Graphs) -> PassResult:
        saved = {n for n in graphs.forward_outputs()[graphs.num_fwd_outputs :] if isinstance(n, fx.Node)}
        changed = False
        for node in graphs.forward.graph.find_nodes(op="placeholder"):
            if node in saved and self.declines(node) is None:
                _read_through_as_strided(node)
                changed = True
        return PassResult(changed)

    def declines(self, node: fx.Node) -> str | None:
        """Why a saved input is left as it is, or None."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() != 4:
            return "only 4-D values get channels-last copies"
        readers = [u for u in node.users if u.op != "output"]
        if not readers or any(u.target is aten.as_strided.default for u in readers):
            return "no convolution reads it directly"
        if any(u.target is aten.copy_.default for u in readers):
            return "it is overwritten"
        return None


def _read_through_as_strided(node: fx.Node) -> None:
    value: torch.Tensor = node.meta["val"]
    first = min(u for u in node.users if u.op != "output")
    with node.graph.inserting_before(first):
        size, stride = (
            [compat.size_node(node.graph, s) for s in sizes] for sizes in (value.shape, value.stride())
        )
        view = compat.call(node.graph, aten.as_strided.default, (node, size, stride, 0))
    view.meta.pop("autograd_backward", None)
    node.replace_all_uses_with(view, delete_user_cb=lambda user: user.op != "output" and user is not view)
