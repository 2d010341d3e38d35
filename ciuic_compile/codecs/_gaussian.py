"""Error of group quantization on Gaussian data, from order statistics. Needs no torch.

The uniform-noise model: an element rounded to a grid of step s has squared error s^2/12, so
the relative MSE is E[s^2]/12 in units of the variance. E[s^2] follows from the second moment of
the group's largest magnitude (symmetric) or range (affine), times what rounding the scale up to
bfloat16 adds. The elements that set the range lie on (affine) or next to (symmetric) the grid.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]


def _cdf(x: _Array) -> _Array:
    from scipy.special import ndtr

    out: _Array = ndtr(x)
    return out


@lru_cache(maxsize=64)
def amax_second_moment(group_size: int) -> float:
    """E[max|x|^2] over ``group_size`` independent standard normals: integral of 2t P(max > t)."""
    t = np.linspace(0.0, 10.0, 20001)
    cdf = (2.0 * _cdf(t) - 1.0) ** group_size
    return float(np.trapezoid(2.0 * t * (1.0 - cdf), t))


@lru_cache(maxsize=64)
def range_second_moment(group_size: int) -> float:
    """E[(max-min)^2]: P(range <= r) = g * integral of pdf(x) * (cdf(x + r) - cdf(x))^(g-1) dx."""
    x = np.linspace(-9.0, 9.0, 1801)
    r = np.linspace(0.0, 16.0, 1601)
    pdf = np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)
    inside = (_cdf(x[None, :] + r[:, None]) - _cdf(x)[None, :]) ** (group_size - 1)
    cdf = np.clip(group_size * np.trapezoid(pdf[None, :] * inside, x, axis=1), 0.0, 1.0)
    return float(np.trapezoid(2.0 * r * (1.0 - cdf), r))


def _roundup() -> _Array:
    """Factors 1 + d by which rounding up to 8 significant bits enlarges a scale, equally likely.

    d = u * 2^-7 / m: u uniform in [0, 1), the significand m log-uniform in [1, 2).
    """
    mid = (np.arange(256) + 0.5) / 256
    significand = 2.0**mid
    factors: _Array = 1.0 + (mid[None, :] * 2.0**-7 / significand[:, None]).ravel()
    return factors


@lru_cache(maxsize=64)
def relative_mse(bits: int, group_size: int, symmetric: bool) -> float:
    """Relative MSE of round-to-nearest group quantization of standard normals.

    Args:
        bits: payload bits an element.
        group_size: elements that share qparams.
        symmetric: levels -(2^(bits-1)-1)..2^(bits-1)-1 around zero; else 2^bits levels from the minimum.
    """
    factor = _roundup()
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    moment = amax_second_moment(group_size) if symmetric else range_second_moment(group_size)
    step_squared = moment / levels**2 * factor**2
    extreme = levels / factor  # where the element that sets the scale falls on the grid
    edge = np.mean(step_squared * (extreme - np.rint(extreme)) ** 2)
    inner = float(np.mean(step_squared)) / 12.0
    on_grid = 0 if symmetric else 1  # the affine minimum is the offset itself
    return float((inner * (group_size - 1 - on_grid) + edge) / group_size)
