"""How quantization error reaches the gradients: relative variances pushed through the joint graph.

Every value that the backward reads carries ``r``, its relative error variance (dimensionless,
``E|x' - x|^2 / E|x|^2``). Decoded tensors start at their codec's ``relative_mse`` times the gain of
their class, exact ones at 0. Products and contractions add their operands' variances; the terms of a
sum count by their share of its energy (``energy.py`` guesses it); everything else passes them on. A
value rebuilt from saved ones carries each of those once, however often it reads it. The map from
storages to gradients is linear in the variances, so one reverse sweep gives every storage's
coefficient and one forward sweep every parameter's error. The few constants are measured
(bench/calibrate.py, docs/numerics.md); the propagation itself is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import sqrt

import torch
from torch import fx

from .. import compat
from ..calibration import GraphCalibration
from ..capture import CapturedGraph, numel, operands
from ..classify import Classifier, packet
from ..codecs import Codec
from ..energy import CONVOLUTION_BACKWARD, FMA, TERMS, Energy, fma_terms, is_attention_backward, is_negated
from ..types import TensorClass

aten = torch.ops.aten
_SUMS = TERMS | {
    aten.where, aten.cat, aten.stack, aten.index_put, aten.select_scatter, aten.slice_scatter,
}  # fmt: skip
_EXACT = {TensorClass.INPUT, TensorClass.STATISTIC, TensorClass.INDEX}

#: Factor on the error variance of a class of tensors. None is needed: single parameters come out right with
#: 1, and what the whole gradient is off by is the guess of how it is distributed (docs/numerics.md).
GAIN: dict[TensorClass, float] = {}

#: Gain where one group of GROUP_SIZE elements holds several normalized rows or channels.
MIXED = 3.0
GROUP_SIZE = 64

#: Gain of a convolution's output: batch norm removes its mean, which the codec's error is relative to.
CENTRED = 2.0

_SPECIAL = {"/mixed": MIXED, "/convolution": CENTRED}

#: How far the guessed shares of the gradients are trusted; the rest goes by numbers of elements.
TRUST = 0.7

#: Relative variance of a derivative over that of what it is the derivative of (GELU's, SiLU's).
DERIVATIVE = 0.4

#: Relative variance that attention's probabilities inherit from its queries and keys.
PROBABILITIES = 0.5

#: What gradients of queries and keys inherit from attention's output, whose product with dy is
#: taken from every score of a row: an error in it does not average out over the keys.
OUTPUT_TO_SCORES = 4.0

#: No parameter's error was above this multiple of its predicted one over the calibration models.
BOUND_FACTOR = 3.5


class ErrorModel:
    """Linear map from storages' relative mean squared errors to those of the gradients.

    Args:
        captured: the joint graph.
        classes: its classifier.
        saved: nodes that live from forward to backward; errors start there.
        measured: shares and gains that were measured of this graph; None: shares are guessed, gains 1.
        energy: the guess of this graph's, where it is known already.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        classes: Classifier,
        saved: list[fx.Node],
        measured: GraphCalibration | None = None,
        energy: Energy | None = None,
    ) -> None:
        self._captured = captured
        self._classes = classes
        self._saved = set(saved)
        self._measured = measured
        self._energy = energy or Energy(captured, classes)

    def coefficients(self, weights: Sequence[float] | None = None) -> dict[fx.Node, float]:
        """For each saved node, d(variance of the whole gradient) / d(its codec's relative_mse).

        Args:
            weights: of the gradient outputs; :attr:`cautious` ones, to plan by, by default.
        """
        weight: dict[fx.Node, float] = {}
        for node, share in zip(self._captured.bwd_outputs, weights or self.cautious, strict=True):
            weight[node] = weight.get(node, 0.0) + share
        for node in reversed(self._sweep):
            for source, share in self._shares[node].items():
                weight[source] = weight.get(source, 0.0) + weight.get(node, 0.0) * share
        return {n: weight.get(n, 0.0) * self._gain(n) for n in self._saved}

    def gradient_errors(self, mse: Mapping[fx.Node, float]) -> list[float]:
        """Relative error (standard deviation) of each gradient output, given each saved node's mse."""
        return self._propagate({n: m * self._gain(n) for n, m in mse.items()})

    def bound(self, mse: Mapping[fx.Node, float]) -> float:
        """What no parameter's relative error should exceed.

        A gain below 1 was measured on the whole gradient and holds for no single parameter.
        """
        least = {n: m * max(self._gain(n), self._shape_gain(n)) for n, m in mse.items()}
        return BOUND_FACTOR * max(self._propagate(least), default=0.0)

    def _propagate(self, variance: dict[fx.Node, float]) -> list[float]:
        for node in self._sweep:
            variance[node] = sum(s * variance.get(i, 0.0) for i, s in self._shares[node].items())
        return [sqrt(variance.get(n, 0.0)) for n in self._captured.bwd_outputs]

    def whole(self, errors: Sequence[float]) -> float:
        """Relative error of all gradients together, given that of each."""
        return sqrt(sum(w * e * e for w, e in zip(self.weights, errors, strict=True)))

    @cached_property
    def weights(self) -> list[float]:
        """Share of each gradient output in the energy of the whole gradient; they add up to 1."""
        if self._measured is not None:
            return list(self._measured.shares)
        guessed = [self._energy.total(n) for n in self._captured.bwd_outputs]
        whole = sum(guessed)
        return [TRUST * g / whole + (1 - TRUST) * s for g, s in zip(guessed, self._sizes, strict=True)]

    @cached_property
    def cautious(self) -> list[float]:
        """Weights to plan by: what counts little in the whole gradient is not given up for that.

        Optimizers that scale each parameter by itself (Adam) read every gradient. No weight is below that of
        :attr:`weights`, so a plan within an error by these is within it by those.
        """
        if self._measured is None:
            return self.weights
        rest = (1 - TRUST) / TRUST
        return [w + rest * s for w, s in zip(self.weights, self._sizes, strict=True)]

    @cached_property
    def _sizes(self) -> list[float]:
        """Share of each gradient output in the number of elements."""
        sizes = [numel(n) for n in self._captured.bwd_outputs]
        whole = sum(sizes)
        return [s / whole for s in sizes]

    def _gain(self, node: fx.Node) -> float:
        gains = self._measured.gains if self._measured is not None else {}
        return self._shape_gain(node) * gains.get(group_of(self._classes, node), 1.0)

    def _shape_gain(self, node: fx.Node) -> float:
        return GAIN.get(self._classes.kind(node), 1.0) * _SPECIAL.get(_special(self._classes, node), 1.0)

    @cached_property
    def _sweep(self) -> list[fx.Node]:
        """Nodes that only the backward can compute, in topological order."""
        needed: set[fx.Node] = set()
        stack = list(self._captured.bwd_outputs)
        while stack:
            node = stack.pop()
            if node in needed or node.op == "placeholder" or node not in self._captured.gradients:
                continue
            needed.add(node)
            stack.extend(node.all_input_nodes)
        return sorted(needed, key=self._captured.order.__getitem__)

    @cached_property
    def _shares(self) -> dict[fx.Node, dict[fx.Node, float]]:
        """For each node of the sweep, what each of its sources adds to its variance."""
        shares: dict[fx.Node, dict[fx.Node, float]] = {}
        for node in self._sweep:
            found: dict[fx.Node, float] = {}
            for source, share in self._operands(node).items():
                for root, part in self._roots_of(source).items():
                    found[root] = found.get(root, 0.0) + share * part
            shares[node] = found
        return shares

    def _operands(self, node: fx.Node) -> dict[fx.Node, float]:
        """The operands of a backward node whose errors it inherits, and how far."""
        inputs = operands(node)
        if compat.is_getitem(node):
            return _of_output(inputs[0], node.args[1])
        if packet(node) in TERMS and node not in self._accumulated:
            whole = self._energy.of(node)
            shares = {i: self._energy.of(i) / whole for i in inputs}
            if packet(node) is aten.sub:  # what is taken away of a value is taken away of its error too
                shares[inputs[0]] = min(1.0, shares[inputs[0]])
            return shares
        if packet(node) is FMA:
            return self._of_fma(node)
        if packet(node) in _SUMS - TERMS:
            inputs = [i for i in inputs if i in self._captured.gradients]
            return dict.fromkeys(inputs, 1.0 / max(1, len(inputs)))
        return dict.fromkeys(inputs, 1.0)

    def _of_fma(self, node: fx.Node) -> dict[fx.Node, float]:
        """``a * b + c`` as a sum of two terms; both factors of the product have its share."""
        whole = self._energy.of(node)
        *factors, term = (i for i in node.args if isinstance(i, fx.Node))
        product, own = (energy / whole for energy in fma_terms(node, self._energy.of))
        shares = dict.fromkeys(factors, product)
        shares[term] = shares.get(term, 0.0) + (min(1.0, own) if is_negated(node) else own)
        return shares

    @cached_property
    def _accumulated(self) -> set[fx.Node]:
        """Sums over the uses of one parameter. Which of them dominates is not known: their variances add."""
        found: set[fx.Node] = set()
        stack = list(self._captured.bwd_outputs)
        while stack:
            node = stack.pop()
            if packet(node) in TERMS and all(u.op == "output" or u in found for u in node.users):
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _roots_of(self, node: fx.Node) -> Mapping[fx.Node, float]:
        """A backward node stands for itself, a forward one for the saved values it is rebuilt from."""
        if node in self._captured.gradients:
            return {node: 1.0}
        roots = self._roots[node]
        if node in self._linear or node in self._classes.used_forward or self._captured.is_backward(node):
            return roots  # of a forward value made again it is not known whether it is part of a derivative
        return {root: share * DERIVATIVE for root, share in roots.items()}

    @cached_property
    def _rebuilt(self) -> list[fx.Node]:
        """Forward values that the backward reads or rebuilds on the way to them, in topological order."""
        found: set[fx.Node] = set()
        stack = [i for n in self._sweep for i in n.all_input_nodes if i not in self._captured.gradients]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend([] if node in self._saved else operands(node))
        return sorted(found, key=self._captured.order.__getitem__)

    @cached_property
    def _roots(self) -> dict[fx.Node, dict[fx.Node, float]]:
        """Rebuilt value -> the saved ones whose errors it has, and how much of each."""
        roots: dict[fx.Node, dict[fx.Node, float]] = {}
        for node in self._rebuilt:
            found: dict[fx.Node, float] = {node: 1.0} if node in self._saved else {}
            inputs = [] if found else self._inexact_inputs(node)
            for source in inputs:
                for root, share in roots[source].items():
                    if packet(node) in _SUMS:
                        found[root] = found.get(root, 0.0) + share / len(inputs)
                    else:
                        found[root] = max(found.get(root, 0.0), share)
            roots[node] = found
        return roots

    @cached_property
    def _linear(self) -> set[fx.Node]:
        """Rebuilt values that are linear functions of saved ones: their relative error is theirs."""
        found: set[fx.Node] = set()
        for node in self._rebuilt:
            inputs = self._inexact_inputs(node)
            scaled = packet(node) in (aten.mul, aten.div) and len(inputs) == 1
            linear = scaled or packet(node) in TERMS | {aten.neg} or compat.is_view(node)
            if node in self._saved or (linear and found.issuperset(inputs)):
                found.add(node)
        return found

    def _inexact_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Inputs that may carry an error: none of a value that is itself exact."""
        if node in self._classes.exact:
            return []
        return [i for i in operands(node) if self._is_inexact(i)]

    def _is_inexact(self, node: fx.Node) -> bool:
        return node not in self._classes.exact and self._classes.kind(node) not in _EXACT


def group_of(classes: Classifier, node: fx.Node) -> str:
    """What a calibration measures together: tensors of one class that have one constant here."""
    return classes.kind(node).value + _special(classes, node)


def relative_mse(
    classes: Classifier, node: fx.Node, codec: Codec, measured: GraphCalibration | None = None
) -> float:
    """The codec's relative mean squared error on a saved tensor: measured, else that on Gaussian data."""
    known = measured.mse.get(group_of(classes, node), {}) if measured is not None else {}
    return known.get(codec.name, codec.relative_mse)


def _special(classes: Classifier, node: fx.Node) -> str:
    if classes.is_mixed(node, GROUP_SIZE):
        return "/mixed"
    if packet(node) is aten.convolution:
        return "/convolution"
    if node in classes.probabilities:
        return "/probabilities"
    return "/factor" if node in classes.factors else ""


def _of_output(call: fx.Node, index: object) -> dict[fx.Node, float]:
    """What one output of an op with several inherits from the op's operands."""
    operands: list[fx.Node] = []  # one may be there twice, and in a list
    fx.map_arg((call.args, call.kwargs), operands.append)
    if packet(call) is CONVOLUTION_BACKWARD:  # of dy, x, weight
        return dict.fromkeys((operands[0], operands[1]) if index == 1 else (operands[0], operands[2]), 1.0)
    if is_attention_backward(call) and index in (0, 1, 2):
        dy, q, k, v, out = operands[:5]
        probabilities = {q: PROBABILITIES, k: PROBABILITIES}
        if index == 2:
            return {dy: 1.0, **probabilities}
        return {dy: 1.0, v: 0.5, out: OUTPUT_TO_SCORES, **probabilities, (k if index == 0 else q): 1.0}
    return dict.fromkeys(operands, 1.0)
