"""A context in which making a model takes no memory, whatever device its author had in mind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors

_META = torch.device("meta")
#: Short schedules and tables: models read their values in Python (a drop rate for each layer).
_SCHEDULES = frozenset(
    {torch.arange, torch.linspace, torch.logspace, torch.tensor, torch.as_tensor, torch.asarray}
)
_MOVES = frozenset({Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.xpu, Tensor.pin_memory})


@contextmanager
def weightless() -> Iterator[None]:
    """New tensors are on the meta device, where they have shapes and no values; nothing is on a GPU.

    ``device="cuda"``, ``.cuda()`` and ``.to("cuda:0")`` are heeded nowhere, so that they need no GPU. What
    ``torch.tensor``, ``arange`` and the like make stays on the CPU, with its values, until it meets a tensor
    without.
    """
    with _Weightless(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-meta parameter in the checkpoint.*")
        yield


class _Weightless(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in _device_constructors():
            given["device"] = torch.device("cpu") if func in _SCHEDULES else _META
            given.pop("pin_memory", None)
            return func(*args, **given)
        if func in _MOVES:
            return _moved(func, args, given)
        tensors = [t for t in pytree.tree_leaves((args, given)) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in tensors}
        if len(kinds) > 1 and "meta" in kinds:
            args, given = pytree.tree_map_only(Tensor, _valueless, (args, given))
        if "device" in given:  # new_zeros, zeros_like
            given["device"] = tensors[0].device if tensors else _META
        return func(*args, **given)


def _valueless(tensor: Tensor) -> Tensor:
    return tensor if tensor.device == _META else tensor.to(_META)


def _moved(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The tensor where it is; a change of dtype or memory format is made."""
    tensor = args[0]
    if func is not Tensor.to:
        return tensor  # type: ignore[no-any-return]
    named = [kwargs.get("dtype"), kwargs.get("other"), *args[1:]]
    dtypes = [x.dtype if isinstance(x, Tensor) else x for x in named if isinstance(x, (Tensor, torch.dtype))]
    memory_format = kwargs.get("memory_format", torch.preserve_format)
    return tensor.to(dtype=next(iter(dtypes), tensor.dtype), memory_format=memory_format)  # type: ignore[no-any-return]
