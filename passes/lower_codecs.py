"""Expand the marker calls into the codecs' own nodes: Triton kernels or plain aten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ciuic_compile import compat
from ciuic_compile.codecs import get_codec

from . import markers
from ._infra import Graphs, PassResult

Impl = Literal["auto", "reference", "kernel"]


@dataclass(frozen=True)
class LowerCodecs:
    """Trace each codec under the graph's fake mode and inline what it does.

    A decode that only matmuls, convolutions or attention read becomes a kernel (its result is stored
    anyway); one with an elementwise reader becomes aten, which Inductor fuses into that reader.

    Attributes:
        encode: how to encode ("auto": Triton on CUDA, aten on the CPU).
        decode: how to decode; None decides by the readers as above.
    """

    encode: Impl = "auto"
    decode: Impl | None = None

    def run(self, graphs: Graphs) -> PassResult:
        changed = False
        for graph in (graphs.forward.graph, graphs.backward.graph):
            for call in list(graph.nodes):
                if markers.is_marker(call, markers.encode):
                    self._encode(graph, call)
                elif markers.is_marker(call, markers.decode):
                    self._decode(graph, call)
                else:
                    continue
                changed = True
        return PassResult(changed)

    def _encode(self, graph: fx.Graph, call: fx.Node) -> None:
        node, name = call.args
        assert isinstance(node, fx.Node) and isinstance(name, str)
        codec = get_codec(name)

        def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return codec.encode(x.permute(markers.storage_order(x)), impl=self.encode)

        parts = compat.inline(graph, call, fn, [node])
        for user in list(call.users):
            (_, index) = user.args
            assert isinstance(index, int)
            name = user.name
            user.replace_all_uses_with(parts[index])
            graph.erase_node(user)
            parts[index].name = name  # the backward's placeholder has this name
        graph.erase_node(call)

    def _decode(self, graph: fx.Graph, call: fx.Node) -> None:
        received, name, shape, order, dtype = call.args
        codec = get_codec(str(name))
        assert isinstance(received, (list, tuple)) and isinstance(shape, (list, tuple))
        impl: Impl = self.decode or ("kernel" if _only_external_readers(call) else "reference")
        if call.meta["val"].device.type != "cuda":
            impl = "reference"
        sizes = [s for s in shape if isinstance(s, fx.Node)]

        def fn(*args: Any) -> tuple[torch.Tensor]:
            parts, symbols = args[: len(received)], iter(args[len(received) :])
            dims = [next(symbols) if isinstance(s, fx.Node) else s for s in shape]
            inverse = [list(order).index(d) for d in range(len(order))]  # type: ignore[arg-type]
            return (codec.decode(parts, dims, dtype, impl=impl).permute(inverse),)  # type: ignore[arg-type]

        (result,) = compat.inline(graph, call, fn, [*received, *sizes])
        call.replace_all_uses_with(result)
        graph.erase_node(call)


def _only_external_readers(call: fx.Node) -> bool:
    stack: list[fx.Node] = [call]
    while stack:
        for user in stack.pop().users:
            if compat.is_view(user):
                stack.append(user)
            elif compat.is_fusible(user):
                return False
    return True


