"""Training steps without memory: models on fake tensors, and a compiler that stops before code is generated.

Beside ``compat.py``, all that is private to torch.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
from torch import Tensor, fx, nn
from torch._dynamo import pgo
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from . import compat

__all__ = ["BackendCompilerFailed", "Fakes", "first_compile", "partition_only"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
_MANY = 2**16


class Fakes:
    """Fake tensors on the CPU in place of others: same shapes, strides, dtypes and shared storages.

    They are on the CPU wherever the originals are, because a torch without CUDA cannot differentiate others.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the first, which is held
        self._bases: dict[tuple[int, torch.dtype], Tensor] = {}  # by storage

    def of(self, value: Tensor) -> Tensor:
        """The fake tensor of one tensor: the same one each time. ``TypeError`` for a tensor subclass."""
        if type(value) not in _PLAIN:
            raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} is no plain tensor")
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._fake(value))
        return self._made[id(value)][1]

    def tree(self, values: Any) -> Any:
        """Nested tuples, lists and dicts with every tensor replaced."""
        return pytree.tree_map_only(Tensor, self.of, values)

    def _fake(self, value: Tensor) -> Tensor:
        with self.mode, torch.no_grad():
            fake = self._base(value).as_strided(value.shape, value.stride(), value.storage_offset())
            if isinstance(value, nn.Parameter):
                return nn.Parameter(fake, requires_grad=value.requires_grad)
            return fake.detach().requires_grad_(value.requires_grad)

    def _base(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        key = (storage._cdata, value.dtype)
        if key not in self._bases:
            elements = compat.hint(storage.nbytes()) // value.dtype.itemsize
            self._bases[key] = torch.empty(elements, dtype=value.dtype, device="cpu")
        return self._bases[key]

    @contextlib.contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Parameters, buffers and other tensors that modules hold are fake here, and come back after."""
        taken: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for module in model.modules():
                places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
                for place in places:
                    for name, value in place.items():
                        if isinstance(value, Tensor):
                            fake = self.of(value)
                            taken.append((place, name, value))
                            place[name] = fake
            yield
        finally:
            for place, name, value in taken:
                place[name] = value


def partition_only(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    partitioner: CustomPartitionerFn,
    patches: Mapping[str, Any],
    mode: FakeTensorMode,
) -> Callable[..., Any]:
    """Inductor up to and with the partitioner; what it returns computes nothing but fake results."""

    def no_code(graph: fx.GraphModule, inputs: object, **kwargs: object) -> Callable[[list[Any]], list[Any]]:
        (outputs,) = graph.graph.output_node().args
        values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in outputs]  # type: ignore[union-attr]

        def run(args: list[Any]) -> list[Any]:
            args.clear()
            with mode:
                return [_fresh(value) for value in values]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    with (
        functorch_config.patch(enable_autograd_cache=False),
        # for logs that nobody may have asked for, a tenth of the time
        mock.patch.object(fx.GraphModule, "print_readable", return_value=""),
    ):
        compiled: Any = compile_fx(
            gm,
            example_inputs,  # type: ignore[arg-type]
            inner_compile=no_code,  # type: ignore[arg-type]
            config_patches={**patches, "custom_partitioner_fn": partitioner},
        )
    return compiled  # type: ignore[no-any-return]


def _fresh(value: Any) -> Any:
    """A tensor or number as a graph returned it in tracing, at the example's sizes."""
    if isinstance(value, torch.SymInt):
        return compat.hint(value)
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([compat.hint(s) for s in sizes] for sizes in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


@contextlib.contextmanager
def first_compile() -> Iterator[None]:
    """A context in which Dynamo compiles a function however often it did before, as if it never had.

    It remembers the sizes of every function, and makes those symbolic that were others before: that profile
    is neither read nor written here.
    """
    limits = {"recompile_limit": _MANY, "accumulated_recompile_limit": _MANY}
    profile = {"automatic_dynamic_local_pgo": False, "automatic_dynamic_remote_pgo": False}
    state: defaultdict[pgo.CodeId, pgo.CodeState] = defaultdict(pgo.CodeState)
    with dynamo_config.patch({**limits, **profile}), mock.patch.object(pgo, "_CODE_STATE", state):
        yield
