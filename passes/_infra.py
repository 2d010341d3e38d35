"""What a pass is, and the pipeline that runs them in order and verifies after each one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import fx

from ciuic_compile import compat
from ciuic_compile.errors import CiuicError, PassError, VerificationError

log = logging.getLogger("ciuic_compile.passes")


@dataclass
class Graphs:
    """The forward and backward graphs that the passes rewrite in place.

    Attributes:
        num_fwd_outputs: outputs of the forward that the user gets; the rest is saved for the backward.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_fwd_outputs: int

    def forward_outputs(self) -> list[object]:
        """Everything the forward returns: user outputs, then saved tensors, then saved symbols."""
        (values,) = self.forward.graph.output_node().args
        assert isinstance(values, (tuple, list))
        return list(values)


@dataclass(frozen=True)
class PassResult:
    """Whether the graphs changed, and sentences for the report where the pass declined something."""

    changed: bool
    notes: tuple[str, ...] = ()


@runtime_checkable
class Pass(Protocol):
    """Graphs in, graphs out; options are the pass's own fields, never global configuration."""

    def run(self, graphs: Graphs) -> PassResult:
        """Rewrite ``graphs`` in place."""


Observer = Callable[[str, Graphs, PassResult, float], None]


def run_pipeline(
    graphs: Graphs, passes: Sequence[Pass], observe: Observer | None = None, trial: bool = False
) -> tuple[str, ...]:
    """Run the passes in order; verify after each; return the notes they left.

    Args:
        observe: called after each pass with its name, the graphs, its result and its seconds.
        trial: the graphs are only looked at and thrown away: not verified, and without code.

    Raises:
        PassError: a pass raised or left invalid graphs; names it and the passes before it.
    """
    notes: list[str] = []
    done: list[str] = []
    untouched = graphs.forward_outputs()[: graphs.num_fwd_outputs]
    for each in passes:
        name = type(each).__name__
        start = time.perf_counter()
        try:
            result = each.run(graphs)
            if not trial:
                verify(graphs)
            if graphs.forward_outputs()[: graphs.num_fwd_outputs] != untouched:
                raise VerificationError("it changed what the forward returns to the user")
        except CiuicError as error:
            raise PassError(f"pass {name} (after {', '.join(done) or 'nothing'}): {error}") from error
        except Exception as error:
            raise PassError(
                f"pass {name} (after {', '.join(done) or 'nothing'}) failed: {type(error).__name__}: {error}"
            ) from error
        seconds = time.perf_counter() - start
        log.debug("%s: %s in %.3f s", name, "changed" if result.changed else "unchanged", seconds)
        if observe:
            observe(name, graphs, result, seconds)
        done.append(name)
        notes.extend(result.notes)
    if not trial:
        graphs.forward.recompile()
        graphs.backward.recompile()
    return tuple(notes)


def verify(graphs: Graphs) -> None:
    """Check what AOTAutograd relies on: valid graphs, and saved values that match positionally.

    The backward's placeholders are symbols, saved tensors, tangents; the forward's saved outputs are
    tensors, then symbols. Raises :class:`VerificationError`.
    """
    graphs.forward.graph.lint()
    graphs.backward.graph.lint()
    outputs = graphs.forward_outputs()[graphs.num_fwd_outputs :]
    sent = [n for n in outputs if isinstance(n, fx.Node) and _is_tensor(n)]
    tensors = [n for n in graphs.backward.graph.find_nodes(op="placeholder") if _is_tensor(n)]
    received, rest = tensors[: len(sent)], tensors[len(sent) :]
    if len(received) < len(sent) or not all(map(_same_value, sent, received)):
        pairs = zip(sent, [*received, *[None] * len(sent)], strict=False)
        wrong = next((a, b) for a, b in pairs if b is None or not _same_value(a, b))
        raise VerificationError(
            f"saved tensors and backward inputs differ in order or names: {wrong[0]} arrives as {wrong[1]}"
        )
    for placeholder in rest:
        if "tangents" not in placeholder.name and not placeholder.name.startswith("bwd_"):
            raise VerificationError(f"the backward expects {placeholder}, which the forward does not save")
    for node, placeholder in zip(sent, received, strict=True):
        here, there = _describe(node), _describe(placeholder)
        if here != there:
            raise VerificationError(f"{node.name} leaves the forward as {here} but arrives as {there}")


def _describe(node: fx.Node) -> str:
    value: torch.Tensor = node.meta["val"]
    return f"{value.dtype} {tuple(value.shape)}"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _same_value(sent: fx.Node, received: fx.Node) -> bool:
    """Equal names; torch renames only the RNG states that it saves for recomputed random ops."""
    return sent.name == received.name or received.name.startswith("rng_state_output")


def last_use(node: fx.Node) -> fx.Node:
    """The latest node, in graph order, that reads ``node`` or a view of it (but the output), or itself."""
    latest, stack = node, [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                continue
            latest = max(latest, user)
            if compat.is_view(user):
                stack.append(user)
    return latest


def is_read_as_it_lies(node: fx.Node) -> bool:
    """Whether ``as_strided`` reads it or a view of it: its strides are then part of what is computed."""
    strided = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)
    if any(n.target in strided for n in node.users):
        return True
    return any(is_read_as_it_lies(n) for n in node.users if compat.is_view(n))
