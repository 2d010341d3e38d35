"""Replace saved tensors by their encoded form: encode in the forward, decode in the backward."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ciuic_compile import compat, compat_trace, markers
from ciuic_compile.codecs import get_codec

from ._infra import Graphs, PassResult, is_read_as_it_lies


@dataclass(frozen=True)
class InsertCodecs:
    """Insert marker calls for every saved tensor that the plan compresses.

    The encoded tensors take the saved tensor's place, in position, among the forward's outputs and
    the backward's inputs (AOTAutograd matches them by position).

    Masks of images are packed as Inductor will lay them out. Packed plainly, they made it lay out plainly
    the gradients that are computed from them, which torch then copied (3.0 of a ResNet-50's 25.7 ms, H200).
    Others keep the graph's order: it decides which values share a group (docs/numerics.md).

    Attributes:
        codecs: saved node's name -> codec name.
        kind: type of device that every value is planned as being on; None: what each is on.
    """

    codecs: Mapping[str, str] = field(default_factory=dict)
    kind: str | None = None

    def run(self, graphs: Graphs) -> PassResult:
        channels_last = compat.prefers_channels_last(graphs.forward.graph, self.kind)
        outputs = graphs.forward_outputs()
        placeholders = {n.name: n for n in graphs.backward.graph.find_nodes(op="placeholder")}
        first = next(n for n in graphs.backward.graph.nodes if n.op != "placeholder")
        new_outputs: list[Any] = outputs[: graphs.num_fwd_outputs]
        templates: dict[object, tuple[torch.Tensor, ...]] = {}
        changed = False
        for node in outputs[graphs.num_fwd_outputs :]:
            codec = self.codecs.get(node.name) if isinstance(node, fx.Node) else None
            if codec is None or not isinstance(node, fx.Node):
                new_outputs.append(node)
                continue
            value: torch.Tensor = node.meta["val"]
            order = markers.storage_order(value)
            received = placeholders[node.name]
            is_image_mask = value.dim() == 4 and value.dtype == torch.bool
            if channels_last and is_image_mask and not is_read_as_it_lies(received):
                order = [0, 2, 3, 1]
            parts = _encode(graphs.forward.graph, node, codec, order, templates)
            _decode(graphs.backward.graph, received, first, parts, codec, order)
            while first.prev.op not in ("placeholder", "root"):  # each decode stands before those so far
                first = first.prev
            new_outputs.extend(parts)
            changed = True
        if changed:
            output = graphs.forward.graph.output_node()
            output.args = (tuple(new_outputs),)
            compat.renumber_saved_descs(output, graphs.num_fwd_outputs)
        return PassResult(changed)


def _encode(
    graph: fx.Graph,
    node: fx.Node,
    codec: str,
    order: list[int],
    templates: dict[object, tuple[torch.Tensor, ...]],
) -> list[fx.Node]:
    value: torch.Tensor = node.meta["val"]
    key = (codec, str(value.numel()), value.dtype, value.device)
    if key not in templates:  # identical layers are encoded once
        with value.fake_mode:  # type: ignore[attr-defined]
            parts = get_codec(codec).encode(value, impl="reference")
            templates[key] = tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parts)
    encoded = tuple(map(compat_trace.fresh, templates[key]))
    origin = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "original_aten")}
    with graph.inserting_after(node):
        call = graph.call_function(markers.encode, (node, codec, order), name=f"{node.name}_encode")
        call.meta = {**origin, "val": encoded}
    nodes = []
    last = call
    for index, part in enumerate(encoded):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, index), name=f"{node.name}_{_PARTS[index]}")
        last.meta = {**origin, "val": part}
        nodes.append(last)
    return nodes


def _decode(
    graph: fx.Graph,
    placeholder: fx.Node,
    first: fx.Node,
    parts: list[fx.Node],
    codec: str,
    order: list[int],
) -> None:
    value: torch.Tensor = placeholder.meta["val"]
    received = []
    for part in parts:
        with graph.inserting_before(placeholder):
            new = graph.placeholder(part.name)
        assert new.name == part.name, f"{part.name} is taken in the backward graph"
        new.meta = dict(part.meta)
        received.append(new)
    with graph.inserting_before(first):
        shape = [compat.size_node(graph, value.size(d)) for d in order]
        call = graph.call_function(markers.decode, (received, codec, shape, order, value.dtype))
    call.meta = {k: v for k, v in placeholder.meta.items() if k in ("stack_trace", "nn_module_stack")}
    call.meta["val"] = value
    call.meta["autograd_backward"] = True
    placeholder.replace_all_uses_with(call)
    graph.erase_node(placeholder)


_PARTS = ("payload", "scale", "offset")
