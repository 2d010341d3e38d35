"""How large the values of the backward are relative to each other, guessed from the graph alone.

Planning sees no data, but an error in one term of a sum counts by that term's share of the sum, and a wrong
gradient by its share of the whole gradient. The guess: activations and normalized values have mean square 1
an element, elements are independent of each other, and a weight matrix hands on a fixed part of the energy
(sum of squares) of the gradient that it multiplies. What matters most is exact in it: that the correction
terms of a norm's backward, sums over n elements divided by n, are n times smaller than what they correct.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import fx

from . import compat
from .capture import CapturedGraph, numel, operands, tensor
from .classify import Classifier, is_contraction, is_reduction, is_softmax, packet

aten = torch.ops.aten

#: Energy of ``dy @ W`` over that of ``dy``. It decides what a branch counts beside its skip connection.
THROUGH_WEIGHTS = 0.2
#: Energy of the gradients of queries and keys over that of the values'.
SCORES = 0.1

CONVOLUTION_BACKWARD = aten.convolution_backward
SCALED = {aten.mul, aten.div}
TERMS = {aten.add, aten.sub}
FMA = torch.ops.prims.fma
_SPLITS = {aten.split, aten.split_with_sizes, aten.unbind}
_CONSTANTS = {aten.full, aten.scalar_tensor}
_MASKED = 1e4  # what a mask adds is as large as its dtype goes, or infinite
_LEAST = 1e-300  # nothing is divided by zero
_OF_ORDER_ONE = {aten.convolution, aten.exp, aten.sigmoid}


class Energy:
    """Mean square an element of every node that the gradients are computed from (in arbitrary units)."""

    def __init__(self, captured: CapturedGraph, classes: Classifier) -> None:
        self._captured = captured
        self._classes = classes

    def of(self, node: fx.Node) -> float:
        """The mean square of one element; 1.0 for what the guess knows nothing of."""
        return self._power.get(node, 1.0)

    def total(self, node: fx.Node) -> float:
        """The sum of squares of all elements."""
        return self.of(node) * numel(node)

    @cached_property
    def _power(self) -> dict[fx.Node, float]:
        power: dict[fx.Node, float] = {}
        for node in self._captured.graph.nodes:
            if compat.is_symbolic(node):  # a number that products scale by, such as the size of a batch
                power[node] = max(compat.number(node.meta["val"]) ** 2, 1e-30)
            elif packet(node) in _SPLITS:  # a list, whose parts are views
                power[node] = power.get(node.all_input_nodes[0], 1.0)
            elif node.op == "call_function" and tensor(node) is not None:
                rule = self._backward if node in self._captured.gradients else self._forward
                power[node] = max(rule(node, power), _LEAST)
        return power

    def _forward(self, node: fx.Node, power: dict[fx.Node, float]) -> float:
        """1 for statistics and what they normalize; weights shrink a value, numbers and products scale it."""
        if packet(node) in _CONSTANTS:
            return _constant(node)
        if is_softmax(node):  # n parts of 1: between 1 / n^2 (all equal) and 1 / n (one is all)
            return numel(node.all_input_nodes[1]) / numel(node)
        inputs = operands(node)[1:] if packet(node) is aten.where else operands(node)
        if packet(node) not in SCALED | TERMS:  # a number among the others' arguments is a size
            inputs = [i for i in inputs if not compat.is_symbolic(i)]
        values = [power.get(i, 1.0) for i in inputs if i not in self._classes.from_parameters]
        if packet(node) in SCALED:
            statistics = self._classes.statistics
            if node not in statistics and any(i in statistics for i in inputs):
                return 1.0
            if packet(node) is aten.div and len(values) == 2:
                return values[0] / max(values[1], 1e-30)
            return _scale(node) * prod(values)
        if is_reduction(node) or packet(node) in _OF_ORDER_ONE or not values:
            return 1.0
        if packet(node) is aten.sub and any(i in self._classes.statistics for i in inputs):
            return max(values)  # what a mean is taken away of does not grow
        if packet(node) in TERMS:
            return sum(values) + sum(float(a) ** 2 for a in node.args[:2] if isinstance(a, (int, float)))
        if is_contraction(node) and any(i in self._classes.from_parameters for i in inputs):
            return THROUGH_WEIGHTS * max(values)
        return max(values)

    def _backward(self, node: fx.Node, power: dict[fx.Node, float]) -> float:
        op, inputs = packet(node), operands(node)
        gradients = [i for i in inputs if i in self._captured.gradients]
        if compat.is_getitem(node):
            return self._of_output(node, power)
        if op in SCALED:
            divisors = [i for i in inputs[1:] if op is aten.div and compat.is_symbolic(i)]
            product = prod(power.get(i, 1.0) for i in inputs if i not in divisors)
            return _scale(node) * product / prod(power[i] for i in divisors)
        if op is aten.sub:
            return self._difference(node, power)
        if op is FMA:
            return self._of_fma(node, power)
        if op is aten.add:
            return sum(power.get(i, 1.0) for i in inputs)
        if is_reduction(node):
            count = numel(inputs[0]) / numel(node)
            return power.get(inputs[0], 1.0) * (1 / count if op is aten.mean else count)
        if is_contraction(node):
            if any(i in self._classes.from_parameters for i in inputs):
                return THROUGH_WEIGHTS * sum(self._energy(i, power) for i in gradients) / numel(node)
            return prod(power.get(i, 1.0) for i in inputs) * _contracted(node)
        if compat.is_view(node):
            return power.get(inputs[0], 1.0)
        return sum(self._energy(i, power) for i in gradients) / numel(node)

    def _difference(self, node: fx.Node, power: dict[fx.Node, float]) -> float:
        """A difference in a backward takes a projection away (norms, softmax)."""
        first, *rest = (power.get(i, 1.0) for i in node.all_input_nodes)
        return _without(first, sum(rest))

    def _of_fma(self, node: fx.Node, power: dict[fx.Node, float]) -> float:
        """``a * b + c``: with ``-a``, the difference in a softmax's backward."""
        product, term = fma_terms(node, lambda i: power.get(i, 1.0))
        return _without(term, product) if is_negated(node) else product + term

    def _of_output(self, node: fx.Node, power: dict[fx.Node, float]) -> float:
        """Output of a convolution's or attention's backward."""
        call, index = node.all_input_nodes[0], node.args[1]
        gradient = call.all_input_nodes[0]
        if packet(call) is CONVOLUTION_BACKWARD and index != 0:
            rows = numel(gradient) / max(1, compat.hint(gradient.meta["val"].shape[1]))
            return power.get(gradient, 1.0) * power.get(call.all_input_nodes[1], 1.0) * rows
        scores = SCORES if is_attention_backward(call) and index in (0, 1) else 1.0
        return scores * self._energy(gradient, power) / numel(node)

    def _energy(self, node: fx.Node, power: dict[fx.Node, float]) -> float:
        return power.get(node, 1.0) * numel(node)


def is_attention_backward(node: fx.Node) -> bool:
    """Whether the node is the backward of a fused attention; its outputs begin with dq, dk, dv."""
    name = str(getattr(node.target, "__name__", node.target))
    return "attention" in name and "backward" in name


def fma_terms(node: fx.Node, of: Callable[[fx.Node], float]) -> tuple[float, float]:
    """Mean squares of the product and of the term in ``fma(a, b, c)``; ``b`` may be a number."""
    a, b, c = (of(i) if isinstance(i, fx.Node) else float(cast(float, i)) ** 2 for i in node.args)
    return a * b, c


def is_negated(fma: fx.Node) -> bool:
    """Whether the product in it is taken away."""
    return any(packet(i) is aten.neg for i in fma.args[:2] if isinstance(i, fx.Node))


def _without(whole: float, part: float) -> float:
    return max(whole - part, whole / 4)


def _constant(node: fx.Node) -> float:
    """The number's square. A mask's infinities count nothing: what they are added to is exponentiated."""
    value = node.args[0 if packet(node) is aten.scalar_tensor else 1]
    return float(value) ** 2 if isinstance(value, (int, float)) and abs(value) < _MASKED else 0.0


def _scale(node: fx.Node) -> float:
    """Square of the number that a product is scaled by."""
    numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    factor = float(prod(numbers)) ** 2 if packet(node) in SCALED else 1.0
    return 1 / max(factor, 1e-30) if packet(node) is aten.div else factor


def _contracted(node: fx.Node) -> int:
    """Length of the dimension that a matrix product sums over."""
    value = tensor(node.all_input_nodes[0])
    return 1 if value is None or not value.dim() else compat.hint(value.shape[-1])
