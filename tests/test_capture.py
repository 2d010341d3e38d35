"""What a node reads of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ciuic_compile.capture import SHAPE_ONLY


class OtherValues(TorchDispatchMode):
    """Gives the ops of SHAPE_ONLY other values for their second operand, and notes which there were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in SHAPE_ONLY:
            self.seen.add(func.overloadpacket)
            args = (args[0], torch.full_like(args[1], torch.nan), *args[2:])
        return func(*args, **(kwargs or {}))


def padded(mode: str, dims: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pad(x, [1] * 2 * dims, mode=mode)


FUNCTIONS: dict[int, list[Callable[[Tensor], Tensor]]] = {
    1: [padded("reflect", 1), padded("replicate", 1)],
    2: [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 3),
        lambda x: F.adaptive_max_pool2d(x, 3),
        padded("reflect", 2),
        padded("replicate", 2),
    ],
    3: [
        lambda x: F.max_pool3d(x, 2),
        lambda x: F.avg_pool3d(x, 2),
        lambda x: F.adaptive_avg_pool3d(x, 3),
        lambda x: F.adaptive_max_pool3d(x, 3),
        padded("reflect", 3),
        padded("replicate", 3),
    ],
}


def test_gradients_do_not_depend_on_values_that_give_only_their_shape() -> None:
    seen: set[object] = set()
    for dims, functions in FUNCTIONS.items():
        for function in functions:
            x = torch.randn(2, 3, *[8] * dims, requires_grad=True)
            expected, found = function(x), function(x)
            weights = torch.randn_like(expected)
            (exact,) = torch.autograd.grad(expected, x, weights)
            with OtherValues() as mode:
                (got,) = torch.autograd.grad(found, x, weights)
            assert torch.equal(exact, got)
            seen |= mode.seen
    assert seen == SHAPE_ONLY
