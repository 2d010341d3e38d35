"""CPU tensors that are treated as CUDA's while a step is traced: attention, autocast, decompositions.

A CPU build of torch cannot differentiate fake CUDA tensors. Where its operators choose by device what to
run, the GPU's choice is registered for the CPU here by ``torch.library``, and in Inductor's table of
decompositions by ``compat_cuda_decompositions.py``. Beside ``compat.py``, all that is private to torch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils import _pytree as pytree

from .compat_cuda_decompositions import as_on_a_gpu

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_MOST_HEAD_DIM = 256  # of flash attention
_MOST_HEAD_DIM_OF_CUDNN = 128
_BIAS_ALIGNMENT = 16  # elements that a row of efficient attention's mask is padded to
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
_POLICIES = ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE")
Kernel = Callable[..., Any]


@contextlib.contextmanager
def as_cuda(prefers_cudnn: bool = False) -> Iterator[None]:
    """In this block CPU tensors are attended to, autocast and decomposed as CUDA's.

    ``autocast("cuda")`` is for them.

    Args:
        prefers_cudnn: attention is cuDNN's where it can be, as on Hopper.
    """
    library = Library("aten", "IMPL")
    changed: list[Any] = []

    def register(name: str, kernel: Kernel, key: str) -> None:
        library.impl(name, kernel, key, allow_override=True)
        changed.append(_overload(name))

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return _attention(*args, **kwargs, prefers_cudnn=prefers_cudnn)

    autocast = torch.amp.autocast_mode.autocast
    real = autocast.__init__

    @functools.wraps(real)  # Dynamo reads its signature
    def init(
        self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        real(self, device_type, dtype, *args, **kwargs)

    try:
        register("scaled_dot_product_attention", attention, "AutogradCPU")
        with warnings.catch_warnings():
            # of kernels that take others' places: these are meant to, and go again
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in _of_the_cpu_alone():
                register(name, fallthrough_kernel, "AutocastCPU")
        for policy, names in autocast_ops().items():
            for name in names:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                    register(name, _KERNELS[policy](_overload(name)), "AutocastCPU")
        _forget_dispatch(changed)
        with mock.patch.object(autocast, "__init__", init), as_on_a_gpu():
            yield
    finally:
        library._destroy()
        _forget_dispatch(changed)


def _forget_dispatch(ops: list[Any]) -> None:
    """Look kernels up anew: torch's Python dispatcher, on in tracing, remembers what it found."""
    for op in ops:
        op._dispatch_cache.clear()


@functools.cache
def autocast_ops() -> dict[str, tuple[str, ...]]:
    """CUDA's operators by autocast policy, e.g. "sum.dim_IntList" under "FP32_SET_OPT_DTYPE", in this torch.

    They are in the header that torch is installed with; nothing in Python tells them.
    """
    text = _HEADER.read_text().replace("\\\n", " ")
    found = {}
    for policy in _POLICIES:
        body = re.search(rf"#define AT_FORALL_{policy}\(_\)(.*)", text)
        names = re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body[1]) if body else []
        known = (f"{name}.{overload}" if overload else name for name, overload in names)
        found[policy] = tuple(name for name in known if _overload(name) is not None)
    return found


@functools.cache
def _of_the_cpu_alone() -> tuple[str, ...]:
    """Operators that autocast changes on a CPU and not on CUDA: concatenation and 3-D pooling, say.

    Not Fourier transforms: a CPU's check that they get no half precision, where some of CUDA's do.
    """
    cpu, cuda = (
        set(torch._C._dispatch_get_registrations_for_dispatch_key(key))
        for key in ("AutocastCPU", "AutocastCUDA")
    )
    names = sorted(name.removeprefix("aten::") for name in cpu - cuda if name.startswith("aten::"))
    return tuple(n for n in names if _overload(n) is not None and not n.startswith(("fft_", "stft")))


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet, None), overload or "default", None)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    prefers_cudnn: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` with the kernel that CUDA takes (sdp_utils.cpp, attention.cpp)."""
    size = query.shape[-1]
    fused = query.dim() == 4 and key.dim() == value.dim() == 4 and not (attn_mask is not None and is_causal)
    # a transposed last dimension (channels before pixels, say) is for no fused kernel
    fused = fused and all(t.stride(-1) == 1 for t in (query, key, value))
    same = query.dtype == key.dtype == value.dtype and key.shape[-1] == value.shape[-1] == size
    learned = attn_mask is not None and attn_mask.requires_grad
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if (
        prefers_cudnn
        and fused
        and same
        and query.dtype in _HALF
        and size % 8 == 0
        and size <= _MOST_HEAD_DIM_OF_CUDNN
        and key.shape[2] != 1
        and not learned
        and not dropout_p  # some versions of cuDNN have none
        and torch.backends.cuda.cudnn_sdp_enabled()
    ):
        bias = None if attn_mask is None else _added(attn_mask, query)
        return aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
            query, key, value, bias, needed, dropout_p, is_causal, scale=scale
        )[0]
    if (
        fused
        and same
        and attn_mask is None
        and query.dtype in _HALF
        and size <= _MOST_HEAD_DIM
        and torch.backends.cuda.flash_sdp_enabled()
    ):
        padded = [_padded(t, 8) for t in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, scale=size**-0.5 if scale is None else scale
        )[0]
        return out[..., :size] if size % 8 else out  # type: ignore[no-any-return]
    grouped = enable_gqa and query.shape[1] != key.shape[1]
    if (
        fused
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (*_HALF, torch.float32)
        and not grouped
        and not learned
        and torch.backends.cuda.mem_efficient_sdp_enabled()
    ):
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, bias, needed, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    extra = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, extra)) if extra else tensor


def _added(mask: Tensor, query: Tensor) -> Tensor:
    return torch.where(mask, 0.0, float("-inf")).to(query.dtype) if mask.dtype == torch.bool else mask


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as efficient attention takes it: to be added, for every head, its rows aligned."""
    mask = _added(mask, query)
    size = mask.shape[-1]
    if size % _BIAS_ALIGNMENT:
        mask = _padded(mask, _BIAS_ALIGNMENT)[..., :size]
    return mask.expand(*query.shape[:3], key.shape[2])


def _eligible(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if _eligible(t) else t, values)


def _to(op: Any, dtype: Callable[[list[Tensor]], torch.dtype]) -> Kernel:
    """A kernel that casts all tensors to what ``dtype`` says of them."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            args, kwargs = _cast((args, kwargs), dtype(tensors))
            return op(*args, **kwargs)

    return kernel


def _lower(tensors: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _widest(tensors: list[Tensor]) -> torch.dtype:
    wide = any(_eligible(t) and t.dtype == torch.float32 for t in tensors)
    return torch.float32 if wide else _lower(tensors)


def _with_dtype(op: Any) -> Kernel:
    """A kernel that asks for a float32 result where the caller named no dtype."""
    position = [a.name for a in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            given = args[position] if position < len(args) else kwargs.get("dtype")
            if given is None and _eligible(args[0]):
                args, kwargs = args[:position], {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return kernel


_KERNELS: dict[str, Callable[[Any], Kernel]] = {
    "LOWER_PRECISION_FP": lambda op: _to(op, _lower),
    "FP32": lambda op: _to(op, lambda tensors: torch.float32),
    "FP32_SET_OPT_DTYPE": _with_dtype,
    "PROMOTE": lambda op: _to(op, _widest),
}
