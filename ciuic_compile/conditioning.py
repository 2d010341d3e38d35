"""Ops through which a small error becomes a large one: which of their operands must be exact.

A group codec's error is relative to the largest element of the group, so a small element beside a large one
is relatively very wrong. An op whose value or derivative varies fast near some point (a pole, a jump, or
everywhere, as sine of a wide range) makes that an error of the size of the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch
from torch import fx

from . import compat
from .compat import packet

aten = torch.ops.aten
prims = torch.ops.prims

_POLES = {
    aten.log, aten.log2, aten.log10, aten.log1p, aten.reciprocal, aten.rsqrt, aten.sqrt, aten.tan,
    aten.asin, aten.acos, aten.acosh, aten.atanh, aten.lgamma, aten.digamma, aten.polygamma, aten.erfinv,
    aten.special_ndtri, aten.special_zeta, aten.atan2, aten.hypot, aten.xlogy, aten.special_xlog1py,
    aten.logit, prims.cbrt,
}  # fmt: skip
_JUMPS = {
    aten.sign, aten.sgn, aten.floor, aten.ceil, aten.round, aten.trunc, aten.frac, aten.fmod, aten.remainder,
    aten.copysign, aten.heaviside,
}  # fmt: skip
_STEEP = {aten.exp, aten.exp2, aten.expm1, aten.sinh, aten.cosh, aten.sin, aten.cos}
_DIVISIONS = {aten.div, aten.true_divide, aten.floor_divide}
_FACTORS = {aten.mul, aten.div, aten.neg}
_CASTS = {prims.convert_element_type, aten._to_copy}


def ill_conditioned_operands(
    graph: fx.Graph,
    is_backward: Callable[[fx.Node], bool],
    exact: Callable[[fx.Node], bool],
    used_forward: Container[fx.Node],
) -> list[fx.Node]:
    """Forward values in which a small error may become a large one in the gradients.

    The error may have entered anywhere upstream of them. Operands that are exact anyway, as ``exact`` says
    (statistics, say), make their op harmless: a norm divides by a statistic.
    """
    found: list[fx.Node] = []
    scaled: list[fx.Node] = []  # products with the value of an op that has a pole
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        operands = [i for i in _sensitive(node) if not is_backward(i) and not exact(i)]
        if packet(node) in _STEEP and (node not in used_forward or _is_bounded(node)):
            continue  # a derivative is as tame as what it is the derivative of
        found += operands
        if operands and not is_backward(node) and packet(node) not in _JUMPS | _STEEP:
            scaled.append(node)
    return found + _factors_beside(scaled, is_backward)


def _sensitive(node: fx.Node) -> list[fx.Node]:
    """The operands near some value of which the op, or its derivative, varies fast."""
    op, inputs = packet(node), node.all_input_nodes
    if op is aten.pow:
        return inputs if _has_pole(*node.args[:2]) else []
    if op in _DIVISIONS:
        below = node.args[1]
        return [below] if isinstance(below, fx.Node) and not _is_exp_plus_one(below) else []
    if op in (aten.log1p, aten.log, aten.reciprocal) and (
        _is_exp_plus_one(inputs[0]) or (op is aten.log1p and _is_exp(inputs[0]))
    ):
        return []  # softplus and sigmoid, spelled out: flat where the exponential is small
    name = getattr(node.target, "__name__", "")
    solver = name.startswith(("linalg_", "_linalg_", "cholesky", "triangular_solve")) and "norm" not in name
    return inputs if op in _POLES | _JUMPS | _STEEP or solver else []


def _has_pole(base: object, exponent: object) -> bool:
    """Whether ``base ** exponent`` may be infinite, or have an infinite derivative, at base 0."""
    if not isinstance(base, fx.Node):
        return False  # an exponential
    whole = isinstance(exponent, (int, float)) and float(exponent).is_integer()
    return not (whole and exponent >= 0)  # type: ignore[operator]


def _is_exp(node: fx.Node) -> bool:
    while packet(node) in _CASTS or compat.is_view(node):
        node = node.all_input_nodes[0]
    return packet(node) in (aten.exp, aten.exp2)


def _is_exp_plus_one(node: fx.Node) -> bool:
    """The denominator of a sigmoid, ``1 + exp(x)``, which is never near zero."""
    while packet(node) in _CASTS or compat.is_view(node):
        node = node.all_input_nodes[0]
    return packet(node) is aten.add and 1 in node.args[:2] and _is_exp(node.all_input_nodes[0])


def _is_bounded(node: fx.Node) -> bool:
    """Whether an exponential is part of a sigmoid, a softplus, or the negative branch of an ELU."""
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if packet(user) in (aten.where, aten.log1p) or (packet(user) is aten.add and 1 in user.args[:2]):
            return True
        if packet(user) in _CASTS or compat.is_view(user) or _scales(user):
            stack.extend(user.users)
    return False


def _scales(node: fx.Node) -> bool:
    """A product with a number."""
    return packet(node) in _FACTORS and len(node.all_input_nodes) == 1


def _factors_beside(scaled: Iterable[fx.Node], is_backward: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """What is multiplied with values that may be huge in a few places, where its errors then count."""
    found: list[fx.Node] = []
    stack = list(scaled)
    seen = set(stack)
    while stack:
        node = stack.pop()
        found += [node, *(i for i in node.all_input_nodes if not is_backward(i))]
        for user in node.users:
            product = packet(user) in _FACTORS | _CASTS | {aten.where}
            same = compat.is_view(user) or compat.is_getitem(user)
            if (product or same) and user not in seen and not is_backward(user):
                seen.add(user)
                stack.append(user)
    return found
