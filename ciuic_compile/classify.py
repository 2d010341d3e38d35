"""Which forward values may be stored lossily, and how far: the numerics rules as code.

Each rule comes from a measurement (docs/numerics.md). The result is a :class:`TensorClass` for
every forward node, a reason where a codec is illegal, and the fewest bits where one is legal.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import fx

from . import compat, ops
from .by_op import by_op
from .capture import CapturedGraph, numel, operands, owner, tensor
from .compat import packet as packet
from .conditioning import ill_conditioned_operands
from .rows import LOSS_CHUNK
from .types import TensorClass

aten = torch.ops.aten
_REDUCTIONS = {
    aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.var_mean, aten.std, aten.prod,
    aten.logsumexp, aten.any, aten.all, aten.argmax, aten.argmin, aten.max, aten.min, aten.linalg_vector_norm,
    torch.ops.prims.var, torch.ops.prims.sum, torch.ops.prims.prepare_softmax_online,
}  # fmt: skip
_ATTENTION = (
    "_scaled_dot_product",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "flex_attention",
)
_CONTRACTIONS = {
    aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten._scaled_mm, aten.addbmm, aten._int_mm,
}  # fmt: skip
_MATRIX_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}

#: Random numbers that are a pure function of a saved seed: rebuilt, they are the same numbers.
REBUILDABLE_RANDOM = {
    torch.ops.prims.inductor_seeds,
    torch.ops.prims.inductor_lookup_seed,
    torch.ops.prims.inductor_random,
    torch.ops.prims.inductor_randint,
}

REASONS = {
    TensorClass.INPUT: "shares its storage with a parameter, an input or an output",
    TensorClass.STATISTIC: "a statistic (mean, variance, logsumexp): an error in it scales whole rows",
    TensorClass.INDEX: "integers or booleans: exact or wrong",
    TensorClass.LOSS: "only the loss is computed from it (logits): lossy logits cost accuracy at any width",
    TensorClass.SOFTMAX_INPUT: "exponentiated against a saved maximum: probabilities would not sum to one",
    TensorClass.SINGULAR: "reaches a pole, a jump (log, 1/x, sign) or a norm over a few: small errors grow",
}
#: A norm over this many elements or fewer is ill-conditioned (over two, its output is a sign).
FEW = 4
MIN_BITS = {TensorClass.ATTENTION_QK: 8}


def _is_attention(target: Any) -> bool:
    name = str(getattr(target, "__name__", target))
    return any(key in name for key in _ATTENTION) and "backward" not in name


@by_op
def is_attention(target: Any) -> bool:
    """Whether the node is a fused attention forward."""
    return _is_attention(target)


@by_op
def is_contraction(target: Any) -> bool:
    """Whether the node is a matmul, convolution or fused attention: never recomputed, never fused."""
    return compat.packet_of(target) in _CONTRACTIONS or _is_attention(target)


@by_op
def _calls_reduction(target: Any) -> bool:
    return compat.packet_of(target) in _REDUCTIONS


def is_reduction(node: fx.Node) -> bool:
    """Whether the node reduces along a dimension (elementwise ``max(a, b)`` does not)."""
    return _calls_reduction(node) and not (
        packet(node) in (aten.max, aten.min) and len(node.all_input_nodes) > 1
    )


def is_softmax(node: fx.Node) -> bool:
    """Whether the node is ``x / sum(x)``: parts of a whole."""
    if packet(node) is not aten.div or not isinstance(node.args[1], fx.Node):
        return False
    whole = owner(node.args[1])
    return packet(whole) is aten.sum and whole.args[0] is node.args[0]


class Classifier:
    """Classes of the forward nodes of one joint graph.

    Args:
        captured: the joint graph.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self._captured = captured
        self._forward = captured.savable
        self._forward_set = set(self._forward)
        self._kinds: dict[fx.Node, TensorClass] = {}

    def kind(self, node: fx.Node) -> TensorClass:
        """The class of a forward node's value."""
        if node not in self._kinds:  # asked for many times a node
            self._kinds[node] = self._find_kind(node)
        return self._kinds[node]

    def _find_kind(self, node: fx.Node) -> TensorClass:
        value = tensor(node)
        if owner(node) in self.pinned or value is None:
            return TensorClass.INPUT
        if not (value.dtype.is_floating_point or value.dtype.is_complex):
            return TensorClass.INDEX
        if node in self.statistics:
            return TensorClass.STATISTIC
        if node not in self._feeds_contraction:
            return TensorClass.LOSS
        if node in self._softmax_inputs or node in self.chunk_inputs:
            return TensorClass.SOFTMAX_INPUT
        if node in self._ill_conditioned:
            return TensorClass.SINGULAR
        for kind, members in self._attention_operands.items():
            if node in members:
                return kind
        return TensorClass.LINEAR_INPUT if self._is_linear_input(node) else TensorClass.ACTIVATION

    def storage_kind(self, node: fx.Node) -> TensorClass:
        """The class of the storage that a forward node makes."""
        return TensorClass.STATISTIC if is_reduction(node) else self.kind(node)

    def kept_because(self, node: fx.Node) -> str | None:
        """Why the value must stay exact, or None when a codec is legal."""
        reason = REASONS.get(self.kind(node))
        if reason:
            return reason
        value = tensor(node)
        assert value is not None
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no codec for {value.dtype}"
        if node in self.from_parameters:
            return "computed from parameters alone: parameters are never lossy"
        if node in self.exact:
            return "rebuilt exactly from the inputs where it is needed"
        if value.layout != torch.strided or not is_dense(value):
            return "its elements do not fill their storage"
        if node.meta.get("saved_tensor_with_no_vc_check"):
            return "stashed by a custom autograd function without a version check"
        return None

    def min_bits(self, node: fx.Node, group_size: int) -> int:
        """Fewest payload bits that a codec with groups of this size may use on the value."""
        return 8 if self.is_mixed(node, group_size) else MIN_BITS.get(self.kind(node), 4)

    def is_mixed(self, node: fx.Node, group_size: int) -> bool:
        """Whether one group holds several normalized rows or channels: a norm then blows up the small ones,
        with the error that the large ones beside them gave them."""
        return self._runs.get(node, group_size) < group_size

    @cached_property
    def pinned(self) -> set[fx.Node]:
        """Storages that live on whatever we do: inputs, constants, the forward's outputs."""
        placeholders = {n for n in self._captured.graph.nodes if n.op in ("placeholder", "get_attr")}
        return placeholders | {owner(n) for n in self._captured.fwd_outputs}

    @cached_property
    def exact(self) -> set[fx.Node]:
        """Values rebuilt from parameters, inputs, seeds and integers alone, by cheap operations: the
        backward gets the same bits whatever the codecs do. Never stored lossily themselves."""
        found: set[fx.Node] = set()
        for node in self._forward:
            inputs = all(i in found for i in node.all_input_nodes)
            if node in self._captured.mutated:
                continue  # the backward would read what the forward wrote there
            if node.op in ("placeholder", "get_attr") or (inputs and _is_rebuildable(node)):
                found.add(node)
        return found

    @cached_property
    def chunk_inputs(self) -> set[fx.Node]:
        """What the logits of a loss in chunks are made of: the backward makes them again, against the
        forward's statistics."""
        found: set[fx.Node] = set()
        for node in self._forward:
            if node.meta.get(LOSS_CHUNK):
                source = node.args[-2]
                while isinstance(source, fx.Node):
                    moved = compat.is_view(source) or source.target in (aten.clone.default, ops.AFTER)
                    found.add(owner(source))
                    source = source.all_input_nodes[0] if moved else None
        return found

    @cached_property
    def factors(self) -> set[fx.Node]:
        """What products of two computed matrices read (attention not fused), back to the last one."""
        return set().union(*self._factors)

    @cached_property
    def probabilities(self) -> set[fx.Node]:
        """Those of the :attr:`factors` that are a softmax, or what it is computed from and becomes."""
        return set().union(*(found for found in self._factors if any(map(is_softmax, found))))

    @cached_property
    def _factors(self) -> list[set[fx.Node]]:
        """For each operand of each of these products, what it is computed from."""
        found = []
        for node in self._forward:
            if packet(node) in _MATRIX_PRODUCTS:
                pair = operands(node)[-2:]
                if not any(i in self.from_parameters for i in pair):
                    found += [self._upstream([i]) for i in pair]
        return found

    @cached_property
    def used_forward(self) -> set[fx.Node]:
        """What the forward's outputs are computed from; other forward values are parts of derivatives."""
        found: set[fx.Node] = set()
        stack = list(self._captured.fwd_outputs)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    @cached_property
    def from_parameters(self) -> set[fx.Node]:
        """Values that depend on parameters and constants only (bf16 casts of weights, say)."""
        found: set[fx.Node] = set()
        for node in self._forward:
            if node in self._captured.parameters or node.op == "get_attr":
                found.add(node)
            elif node.op == "call_function" and all(i in found for i in node.all_input_nodes):
                if not compat.is_random(node):
                    found.add(node)
        return found

    @cached_property
    def statistics(self) -> set[fx.Node]:
        """Reductions, second outputs of fused attention, and elementwise functions of only those."""
        found: set[fx.Node] = set()
        for node in self._forward:
            if node.op != "call_function":
                continue
            inputs = node.all_input_nodes
            if is_reduction(node):
                found.add(node)
            elif compat.is_getitem(node):
                source = inputs[0]
                if is_reduction(source) or (is_attention(source) and node.args[1] != 0):
                    found.add(node)
            elif any(i in found for i in inputs) and all(
                i in found or i in self.from_parameters or tensor(i) is None for i in inputs
            ):
                if not is_contraction(node):
                    found.add(node)
        return found

    def leads_to_contraction(self, node: fx.Node) -> bool:
        """Whether a later matmul, convolution or attention of the forward is computed from the value."""
        return node in self._feeds_contraction

    @cached_property
    def _feeds_contraction(self) -> set[fx.Node]:
        """Nodes from which a later matmul, convolution or attention is computed."""
        found: set[fx.Node] = set()
        for node in reversed(self._forward):
            if any(u in self._forward_set and (u in found or is_contraction(u)) for u in node.users):
                found.add(node)
        return found

    @cached_property
    def _softmax_inputs(self) -> set[fx.Node]:
        """Values exponentiated and summed, or against a statistic: backwards through elementwise ops."""
        starts = [
            node
            for node in self._forward
            if packet(node) in (aten.exp, aten.exp2)
            and (any(packet(u) is aten.sum for u in _users_through_views(node)) or self._is_relative(node))
        ]
        return self._upstream(starts) - set(starts)

    @cached_property
    def _runs(self) -> dict[fx.Node, int]:
        """Values that a norm scales -> how many elements, consecutive in memory, share one statistic."""
        runs: dict[fx.Node, int] = {}
        for node, values, scale in self._norms:
            run = _consecutive(node.meta["val"], scale.meta["val"])
            for value in self._upstream(values):
                runs[value] = min(run, runs.get(value, run))
        return runs

    @cached_property
    def _norms(self) -> list[tuple[fx.Node, list[fx.Node], fx.Node]]:
        """Products with a statistic: the product, the values in it, and the statistic."""
        found = []
        for node in self._forward:
            if packet(node) in (aten.mul, aten.div) and node not in self.statistics:
                scales = [i for i in node.all_input_nodes if i in self.statistics]
                others = [i for i in node.all_input_nodes if i not in self.statistics]
                if scales and others:
                    found.append((node, others, scales[0]))
        return found

    def _normalized_over_few(self) -> list[fx.Node]:
        """What norms over a handful of elements scale: their backward takes nearly all of dy away again."""
        return [
            value
            for node, values, scale in self._norms
            if numel(node) <= FEW * min(numel(scale), numel(owner(scale)))  # before it was expanded
            for value in values
        ]

    def _is_relative(self, node: fx.Node) -> bool:
        """Whether the operand is a difference to a statistic, as log-probabilities are."""
        (operand,) = node.all_input_nodes
        while compat.is_view(operand) or is_cast(operand):
            operand = operand.all_input_nodes[0]
        return packet(operand) is aten.sub and any(i in self.statistics for i in operand.all_input_nodes)

    @cached_property
    def _ill_conditioned(self) -> set[fx.Node]:
        """What ops with poles, jumps or steep slopes, and norms over few, are computed from, up to the last
        matmul."""

        def exact(node: fx.Node) -> bool:
            return node in self.statistics or node in self.from_parameters or node in self.exact

        captured = self._captured
        starts = ill_conditioned_operands(captured.graph, captured.is_backward, exact, self.used_forward)
        starts += self._normalized_over_few()
        return self._upstream(starts)

    @cached_property
    def _attention_operands(self) -> dict[TensorClass, set[fx.Node]]:
        calls = [n for n in self._forward if is_attention(n)]

        def read(indices: Iterable[int]) -> set[fx.Node]:
            starts = [n.args[i] for n in calls for i in indices if isinstance(n.args[i], fx.Node)]
            return self._upstream(starts)

        outputs = {g for n in calls for g in n.users if compat.is_getitem(g) and g.args[1] == 0}
        outputs |= {n for n in self._forward if owner(n) in outputs}
        return {
            TensorClass.ATTENTION_QK: read((0, 1)),
            TensorClass.ATTENTION_V: read((2,)),
            TensorClass.ATTENTION_OUT: outputs,
        }

    def _upstream(self, starts: Iterable[object]) -> set[fx.Node]:
        """``starts`` and what they are computed from, up to the last contraction or statistic, included."""
        found: set[fx.Node] = set()
        stack = [n for n in starts if isinstance(n, fx.Node)]
        while stack:
            node = stack.pop()
            if node in found or node not in self._forward_set or node in self.from_parameters:
                continue
            found.add(node)
            if not is_contraction(node) and node not in self.statistics:
                stack.extend(node.all_input_nodes)
        return found

    def _is_linear_input(self, node: fx.Node) -> bool:
        """Whether the backward uses the value, through views and casts, only as a matmul operand."""
        stack, seen = [node], {node}
        used = False
        while stack:
            for user in stack.pop().users:
                if user in seen or not (
                    self._captured.is_backward(user) or compat.is_view(user) or is_cast(user)
                ):
                    continue
                seen.add(user)
                if compat.is_view(user) or is_cast(user):
                    stack.append(user)
                elif is_contraction(user):
                    used = True
                else:
                    return False
        return used


def is_dense(value: torch.Tensor) -> bool:
    """Whether the elements fill their storage without gaps or overlap, in some dimension order."""
    expected: int | torch.SymInt = 1
    dims = sorted(range(value.dim()), key=lambda d: (compat.hint(value.stride(d)), -d))
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for dim in dims:
        if statically_known_true(value.size(dim) == 1):
            continue
        if not statically_known_true(value.stride(dim) == expected):
            return False
        expected = expected * value.size(dim)
    return True


def _consecutive(value: torch.Tensor, scale: torch.Tensor) -> int:
    """How many elements of ``value``, side by side in memory, meet the same element of ``scale``."""
    run = 1
    missing = value.dim() - scale.dim()
    for dim in sorted(range(value.dim()), key=lambda d: (compat.hint(value.stride(d)), -d)):
        size = compat.hint(value.size(dim))
        if size > 1 and dim >= missing and compat.hint(scale.size(dim - missing)) > 1:
            break
        run *= size
    return run


def _is_rebuildable(node: fx.Node) -> bool:
    if packet(node) in REBUILDABLE_RANDOM or compat.is_view(node) or compat.is_symbolic(node):
        return True
    return compat.is_recomputable(node) and not compat.is_random(node) and not is_contraction(node)


def is_cast(node: fx.Node) -> bool:
    """Whether the node is its input in another dtype."""
    return packet(node) in (torch.ops.prims.convert_element_type, aten._to_copy)


def _users_through_views(node: fx.Node) -> list[fx.Node]:
    users: list[fx.Node] = []
    stack = [node]
    while stack:
        for user in stack.pop().users:
            users.append(user)
            if compat.is_view(user) or is_cast(user):
                stack.append(user)
    return users
