"""How quantization error reaches the gradients: relative variances pushed through the joint graph.

Every value that the backward reads carries ``r``, its relative error variance (dimensionless,
``E|x' - x|^2 / E|x|^2``). Decoded tensors start at their codec's ``relative_mse`` times the gain of
their class, exact ones at 0. Products and contractions add their operands' variances; sums average
them (terms of equal energy, independent errors); everything else passes them on. The map from
storages to gradients is linear in the variances, so one reverse sweep gives every storage's
coefficient and one forward sweep every parameter's error. The gains are measured, one a class
(bench/calibrate.py, docs/numerics.md); the propagation itself is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import sqrt

import torch
from torch import fx

from ..capture import CapturedGraph
from ..classify import Classifier, packet
from ..types import TensorClass

aten = torch.ops.aten
_SUMS = {
    aten.add,
    aten.sub,
    aten.where,
    aten.cat,
    aten.stack,
    aten.index_put,
    aten.select_scatter,
    aten.slice_scatter,
}

#: Measured over predicted error variance when only this class is compressed; see docs/numerics.md.
GAIN: dict[TensorClass, float] = {}

#: No parameter's error was above this multiple of its predicted one over the calibration models.
BOUND_FACTOR = 3.0


class ErrorModel:
    """Linear map from storages' relative mean squared errors to those of the gradients.

    Args:
        captured: the joint graph.
        classes: its classifier.
        saved: nodes that live from forward to backward; errors start there.
    """

    def __init__(self, captured: CapturedGraph, classes: Classifier, saved: list[fx.Node]) -> None:
        self._captured = captured
        self._classes = classes
        self._saved = set(saved)

    def coefficients(self) -> dict[fx.Node, float]:
        """For each saved node, d(mean over gradients of r) / d(its codec's relative_mse)."""
        gradients = self._captured.bwd_outputs
        weight: dict[fx.Node, float] = {}
        for node in gradients:
            weight[node] = weight.get(node, 0.0) + 1.0 / max(1, len(gradients))
        for node in reversed(self._sweep):
            for source, share in self._shares[node].items():
                weight[source] = weight.get(source, 0.0) + weight.get(node, 0.0) * share
        return {n: weight.get(n, 0.0) * self._gain(n) for n in self._saved}

    def gradient_errors(self, mse: Mapping[fx.Node, float]) -> list[float]:
        """Relative error (standard deviation) of each gradient output, given each saved node's mse."""
        variance = {n: m * self._gain(n) for n, m in mse.items()}
        for node in self._sweep:
            variance[node] = sum(s * variance.get(i, 0.0) for i, s in self._shares[node].items())
        return [sqrt(variance.get(n, 0.0)) for n in self._captured.bwd_outputs]

    def _gain(self, node: fx.Node) -> float:
        return GAIN.get(self._classes.kind(node), 1.0)

    @cached_property
    def _sweep(self) -> list[fx.Node]:
        """Nodes computed in the backward (rebuilt forward values first), in topological order."""
        needed: set[fx.Node] = set()
        stack = list(self._captured.bwd_outputs)
        while stack:
            node = stack.pop()
            if node in needed or node in self._saved or node.op == "placeholder":
                continue
            needed.add(node)
            stack.extend(node.all_input_nodes)
        return sorted(needed, key=self._captured.order.__getitem__)

    @cached_property
    def _shares(self) -> dict[fx.Node, dict[fx.Node, float]]:
        shares: dict[fx.Node, dict[fx.Node, float]] = {}
        for node in self._sweep:
            inexact = [i for i in node.all_input_nodes if i not in self._classes.exact]
            share = 1.0 / max(1, len(inexact)) if packet(node) in _SUMS else 1.0
            shares[node] = dict.fromkeys(inexact, share)
        return shares
