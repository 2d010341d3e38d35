"""Lay out what a convolution's backward reads with its channels last where Inductor would leave it plain."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ciuic_compile import compat
from ciuic_compile.workspace import Operand

from ._infra import Graphs, PassResult, is_read_as_it_lies

aten = torch.ops.aten
_LAST = {"memory_format": torch.channels_last}


@dataclass(frozen=True)
class ChannelsLast:
    """Lay out two kinds of values as the forward's convolutions read theirs, in the kernels that make them.

    *Images that the backward makes again of inputs.* Inductor looks for convolutions in the forward alone:
    these lie there as the user gave them. If neither image nor weight has its channels last, torch copies the
    gradient, the largest of the three, and cuDNN's kernels are slower; if only the weight has, it copies the
    image. A ResNet-50 (batch 256, float32) took 39.0 ms a step so, and takes 37.6 (H200).

    *What the forward makes for the backward alone, behind the last convolution.* There Inductor stops: a mask
    that was saved plainly made it lay out plainly the gradients computed from it, each of which torch copied.

    Attributes:
        kind: type of device that every value is planned as being on; None: what each is on.
    """

    kind: str | None = None

    def run(self, graphs: Graphs) -> PassResult:
        if not compat.prefers_channels_last(graphs.forward.graph, self.kind):
            return PassResult(False)
        images, saved = _images(graphs), _saved_plainly(graphs)
        for image, readers in images.items():
            _lay_out_image(image, readers)
        for node, received in saved:
            _save_laid_out(node, received)
        return PassResult(bool(images or saved))


def _images(graphs: Graphs) -> dict[fx.Node, list[fx.Node]]:
    """Images of the first kind, and the convolutions' backwards that read them."""
    inputs = {n.name for n in graphs.forward.graph.find_nodes(op="placeholder")}
    plain = set[fx.Node]()
    images: dict[fx.Node, list[fx.Node]] = {}
    for node in graphs.backward.graph.nodes:
        if _is_made_of_inputs(node, plain, inputs):
            plain.add(node)
        elif node.target is aten.convolution_backward.default and node.args[1] in plain:
            images.setdefault(node.args[1], []).append(node)
    return images


def _is_made_of_inputs(node: fx.Node, plain: Collection[fx.Node], inputs: Collection[str]) -> bool:
    """Whether a plain value is an input, or made element by element of such."""
    if not _is_plain(node):
        return False
    if node.op == "placeholder":
        return node.name in inputs
    read = [n for n in node.all_input_nodes if _operand(n) is not None]
    return compat.is_pointwise(node) and bool(read) and all(n in plain for n in read)


def _saved_plainly(graphs: Graphs) -> list[tuple[fx.Node, fx.Node]]:
    """Values of the second kind, and what the backward receives them as."""
    outputs = graphs.forward_outputs()
    returned, saved = outputs[: graphs.num_fwd_outputs], outputs[graphs.num_fwd_outputs :]
    received = {n.name: n for n in graphs.backward.graph.find_nodes(op="placeholder")}
    last = compat.with_channels_last(graphs.forward.graph)
    alone = [n for n in saved if isinstance(n, fx.Node) and len(n.users) == 1 and n not in returned]
    plain = [n for n in alone if n.op == "call_function" and n not in last and _is_plain(n)]
    pairs = [(n, received[n.name]) for n in plain if _is_computed_from(n, last)]
    return [(n, there) for n, there in pairs if not is_read_as_it_lies(there)]


def _is_computed_from(node: fx.Node, last: Collection[fx.Node]) -> bool:
    """Whether a value is made, element by element, of one of these."""
    stack, seen = [node], {node}
    image = node.meta["val"].shape[1:]  # what is broadcast has no say
    while stack:
        here = stack.pop()
        if here in last:
            return True
        if compat.is_pointwise(here):
            plain = (n for n in here.all_input_nodes if _is_plain(n) and n not in seen)
            of_its_size = [n for n in plain if n.meta["val"].shape[1:] == image]
            seen.update(of_its_size)
            stack += of_its_size
    return False


def _is_plain(node: fx.Node) -> bool:
    """Whether torch would take an image, as the graph has it, for a plain one."""
    operand = _operand(node)
    return operand is not None and not operand.suggests_channels_last


def _operand(node: fx.Node) -> Operand | None:
    """A 4-D value as torch will see it; None for others, and where strides are dynamic."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    if any(isinstance(n, torch.SymInt) for n in (*value.shape[1:], *value.stride())):
        return None
    return Operand((compat.hint(value.shape[0]), *value.shape[1:]), value.stride(), value.dtype.itemsize)


def _lay_out_image(image: fx.Node, readers: list[fx.Node]) -> None:
    with image.graph.inserting_before(readers[0]):
        laid = compat.call_like(image.graph, image, aten.clone.default, (image,), _LAST)
    laid.meta["autograd_backward"] = True
    laid.meta["inductor_realize_to_strides"] = True  # Inductor's clone ignores the format
    for reader in readers:
        reader.replace_input_with(image, laid)


def _save_laid_out(node: fx.Node, received: fx.Node) -> None:
    with node.graph.inserting_after(node):
        laid = compat.call_like(node.graph, node, aten.clone.default, (node,), _LAST)
    node.graph.output_node().replace_input_with(node, laid)
    name = node.name
    node._rename(f"{name}_plain")
    laid.name = name  # the backward's placeholder has this name
    received.meta["val"] = laid.meta["val"]
