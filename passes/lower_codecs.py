"""Expand the marker calls into the codecs' own nodes: Triton kernels or plain aten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any, Literal

import torch
from torch import fx

from ciuic_compile import compat_trace, markers
from ciuic_compile.codecs import get_codec
from ciuic_compile.codecs.base import resolve_impl
from ciuic_compile.fusion import decoded_to_memory

from ._infra import Graphs, PassResult

Impl = Literal["auto", "reference", "kernel"]


@dataclass(frozen=True)
class LowerCodecs:
    """Trace each codec under the graph's fake mode and inline what it does.

    A decode whose result is stored (``fusion.decoded_to_memory``) becomes a kernel. The others become aten,
    which Inductor fuses into their readers, marked to be computed in flat order: without that, the backward
    of a SwiGLU took 94 instructions an element, with it 53.

    Attributes:
        encode: how to encode ("auto": Triton on CUDA, aten on the CPU).
        decode: how to decode; None decides by the readers as above.
        devices: device types with kernels and flat loops; elsewhere every decode is aten in group order.
    """

    encode: Impl = "auto"
    decode: Impl | None = None
    devices: tuple[str, ...] = ("cuda",)

    def run(self, graphs: Graphs) -> PassResult:
        traced: dict[object, compat_trace.Trace] = {}  # identical layers are traced once
        parts: dict[fx.Node, fx.Node] = {}
        changed = False
        for graph in (graphs.forward.graph, graphs.backward.graph):
            for call in list(graph.nodes):
                if markers.is_marker(call, markers.encode):
                    parts |= self._encode(graph, call, traced)
                elif markers.is_marker(call, markers.decode):
                    self._decode(graph, call, traced)
                else:
                    continue
                changed = True
        _take_places(graphs.forward.graph, parts)
        return PassResult(changed)

    def _encode(
        self, graph: fx.Graph, call: fx.Node, traced: dict[object, compat_trace.Trace]
    ) -> dict[fx.Node, fx.Node]:
        """Write the codec's nodes beside the marker; which of its parts each of their results is."""
        node, name, order = call.args
        assert isinstance(node, fx.Node) and isinstance(name, str) and isinstance(order, (list, tuple))
        codec, dims = get_codec(name), [d for d in order if isinstance(d, int)]

        def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return codec.encode(x.permute(dims), impl=self.encode)

        key = ("encode", name, *dims, _signature(node))
        if key not in traced:
            kernels = resolve_impl(self.encode, node.meta["val"].device) == "kernel"
            traced[key] = compat_trace.trace(fn, [node], kernels)
        results = compat_trace.inline(graph, call, traced[key], [node])
        parts: dict[fx.Node, fx.Node] = {}
        for user in call.users:
            (_, index) = user.args
            assert isinstance(index, int)
            parts[user] = results[index]
        return parts

    def _decode(self, graph: fx.Graph, call: fx.Node, traced: dict[object, compat_trace.Trace]) -> None:
        received, name, shape, order, dtype = call.args
        codec = get_codec(str(name))
        assert isinstance(received, (list, tuple)) and isinstance(shape, (list, tuple))
        assert isinstance(order, (list, tuple)) and isinstance(dtype, torch.dtype)
        gpu = call.meta["val"].device.type in self.devices
        stored = decoded_to_memory(call)
        impl: Impl = (self.decode or ("kernel" if stored else "reference")) if gpu else "reference"
        flat = gpu and not stored
        inverse = [order.index(d) for d in range(len(order))]
        count = len(received)
        arguments = [*received, *(s for s in shape if isinstance(s, fx.Node))]

        def fn(*args: Any) -> tuple[torch.Tensor]:
            parts, symbols = args[:count], iter(args[count:])
            dims: list[Any] = [next(symbols) if isinstance(s, fx.Node) else s for s in shape]
            if not flat:
                return (codec.decode(parts, dims, dtype, impl=impl).permute(inverse),)
            values = codec.decode(parts, [reduce(mul, dims, 1)], dtype, impl=impl)
            # as_strided makes Inductor give the flat values loops of their own, which it then fuses
            return (values.as_strided(dims, contiguous_strides(dims)).permute(inverse),)

        sizes = tuple(str(s.meta["val"]) if isinstance(s, fx.Node) else s for s in shape)
        key = ("decode", name, impl, flat, dtype, sizes, tuple(order), *map(_signature, received))
        if key not in traced:
            traced[key] = compat_trace.trace(fn, arguments, impl == "kernel")
        (result,) = compat_trace.inline(graph, call, traced[key], arguments)
        result.meta["val"] = call.meta["val"]
        call.replace_all_uses_with(result)
        graph.erase_node(call)


def _take_places(graph: fx.Graph, parts: Mapping[fx.Node, fx.Node]) -> None:
    """Let encoded parts take the places of their markers' results, at once: the output reads them all."""
    output = graph.output_node()
    output.args = fx.map_arg(output.args, lambda n: parts.get(n, n))
    for marked, result in parts.items():
        marked.replace_all_uses_with(result)
        call, name = marked.args[0], marked.name
        assert isinstance(call, fx.Node)
        graph.erase_node(marked)
        result.name = name  # the backward's placeholder has this name
        result.meta["val"] = marked.meta["val"]
        if not call.users:
            graph.erase_node(call)


def _signature(node: object) -> tuple[object, ...]:
    assert isinstance(node, fx.Node)
    value: torch.Tensor = node.meta["val"]
    return (value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride())))


def contiguous_strides(sizes: Sequence[int | torch.SymInt]) -> list[int | torch.SymInt]:
    """Strides of a contiguous tensor of these sizes."""
    strides: list[int | torch.SymInt] = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return strides[len(strides) - len(sizes) :]
