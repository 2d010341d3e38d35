"""Inductor's wrapper lines, read as allocation events: beside ``compat.py``, all that is private to torch.

After ``PythonWrapperCodegen.run_wrapper_ir_passes`` the lines are final: allocations, reuses and frees are
what the generated Python will do. Python frees a storage when its last name goes, so names are counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch._functorch.config as functorch_config
from torch._functorch._aot_autograd import graph_compile
from torch._inductor import ir
from torch._inductor.codegen import wrapper
from torch._inductor.utils import get_dtype_size
from torch._inductor.virtualized import V

from . import compat
from .codecs.base import Size
from .replay import FREE, Event, Trace
from .workspace import Operand, blas_libraries, workspaces

Bytes = tuple[int, Size | None]
_SPLIT = "its generated code is split in parts (CUDA graphs, control flow)"
_stage2b_bw_compile = graph_compile._aot_stage2b_bw_compile


@dataclass
class Recording:
    """Traces of the last forward and backward that were generated while recording.

    None where nothing was generated (a cache hit) or the lines could not be read (``problems`` says why).
    """

    forward: Trace | None = None
    backward: Trace | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def missing(self) -> bool:
        """Whether code was not generated here, so that a cache must have had it."""
        return not self.problems and (self.forward is None or self.backward is None)


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Record the allocations of every graph that Inductor generates code for inside the block."""
    recording = Recording()
    original = wrapper.PythonWrapperCodegen.run_wrapper_ir_passes
    split: set[bool] = set()  # is_backward of graphs of which a part was generated

    def run(self: Any, is_inference: bool) -> None:
        original(self, is_inference)
        if is_inference:
            return
        if isinstance(self, wrapper.SubgraphPythonWrapperCodegen):  # comes before the whole
            split.add(V.graph.is_backward)
            return
        trace = None
        try:
            if V.graph.is_backward in split:
                split.remove(V.graph.is_backward)
                raise _Unknown(_SPLIT)
            trace = _Reader().read(self.lines)
        except _Unknown as error:
            recording.problems.append(str(error))
        if V.graph.is_backward:
            recording.backward = trace
        else:
            recording.forward = trace

    # Dynamo compiles under one global lock, so no other compilation runs while this is patched.
    with (
        mock.patch.object(wrapper.PythonWrapperCodegen, "run_wrapper_ir_passes", run),
        mock.patch.object(graph_compile, "_aot_stage2b_bw_compile", _generate_backward_early),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield recording


def _generate_backward_early(*args: Any, **kwargs: Any) -> tuple[Any, None]:
    """Generate the backward's code now, for the record and for Inductor's cache, but let torch ask again.

    Only at the first execution does torch know whether the graph will be retained (``retain_graph=True``);
    then it must not reuse saved tensors in place. Otherwise it finds the code made here in the cache.
    """
    lazy, _ = _stage2b_bw_compile(*args, **kwargs)
    return lazy, None


class _Unknown(Exception):
    """Lines that allocate in a way this module does not know."""


class _Reader:
    def __init__(self) -> None:
        self._events: list[Event] = []
        self._held: dict[str, list[str]] = {}  # name in the generated code -> storages that it keeps alive
        self._holders: Counter[str] = Counter()  # storage -> names that keep it alive

    def read(self, lines: Sequence[Any]) -> Trace:
        inputs = tuple(V.graph.graph_input_names)
        for name in inputs:
            self._hold(name, name)
        for line in lines:
            self._line(line)
        return Trace(inputs, tuple(map(self._output, V.graph.graph_outputs)), tuple(self._events))

    def _line(self, line: Any) -> None:
        match type(line).__name__:
            case "AllocateLine":
                self._allocate(line.node.get_name(), line.node)
            case "ReuseLine":
                old = line.node.get_name()
                self._alias(line.reused_as.get_name(), old)
                if line.delete_old:
                    self._release(old)
            case "ReinterpretLine":
                self._alias(line.reused_as.get_name(), line.node.get_name())
            case "FreeIfNotReusedLine":
                if not line.is_reused:
                    self._release(line.node.get_name())
            case "FreeLine":
                self._release(line.node.get_name())
            case "ExternKernelAllocLine":
                self._external(line.node)
            case "ExternKernelOutLine":
                self._lasting(line.node)
            case "MultiOutputLine":
                if line.result_name in self._holders:
                    self._hold(line.result_name, line.result_name)
                else:
                    self._alias(line.result_name, line.arg_name)
            case "EnterSubgraphLine":
                raise _Unknown(_SPLIT)

    def _external(self, node: Any) -> None:
        """A call that allocates its own results: all of them at once."""
        name, layout = node.get_name(), node.get_output_spec()
        if isinstance(layout, ir.MultiOutputLayout):
            for output in _outputs(node):
                if not output.get_inputs_that_alias_output():
                    self._allocate(output.get_name(), output, holder=name)
        elif node.get_inputs_that_alias_output():
            self._alias(name, node.get_inputs_that_alias_output()[0])
        elif isinstance(layout, ir.Layout) and not isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
            self._allocate(name, node)
        self._lasting(node)
        inside = [
            Event(f"temporary {i} of {name}", nbytes, size=size)
            for i, (nbytes, size) in enumerate(_workspace(node))
        ]
        self._events += inside
        self._events += [Event(event.storage, FREE) for event in inside]

    def _lasting(self, node: Any) -> None:
        """Libraries that keep what they take at a thread's first call."""
        devices = [i.get_device() for i in _tensors(node)]
        if devices and devices[0].type == "cuda":
            kernel = str(node.python_kernel_name).removesuffix(".default").rpartition(".")[2]
            with _without_guards():
                libraries = blas_libraries(kernel, map(_operand, _tensors(node)))
            self._events += [Event(name, 0, lasting=True) for name in libraries]

    def _allocate(self, storage: str, node: Any, holder: str | None = None) -> None:
        if storage in self._holders:
            return  # an output of a multi-output call that was given its buffer before
        nbytes, size = _nbytes(node)
        self._events.append(Event(storage, nbytes, size=size))
        self._hold(holder or storage, storage)

    def _hold(self, name: str, storage: str) -> None:
        self._held.setdefault(name, []).append(storage)
        self._holders[storage] += 1

    def _alias(self, name: str, other: str) -> None:
        for storage in self._held.get(other, []):
            self._hold(name, storage)

    def _release(self, name: str) -> None:
        for storage in self._held.pop(name, []):
            self._holders[storage] -= 1
            if not self._holders[storage]:
                self._events.append(Event(storage, FREE))

    def _output(self, value: Any) -> str | None:
        numbers = (ir.ShapeAsConstantBuffer, ir.NoneAsConstantBuffer)
        if not isinstance(value, ir.IRNode) or isinstance(value, numbers):
            return None
        name = value.get_name()
        name = V.graph.scheduler.mutation_real_name.get(name, name)
        return next(iter(self._held.get(name, [])), None)


def _outputs(node: Any) -> Iterator[Any]:
    """The MultiOutput nodes of a call with several results."""
    stack = [node.outputs]
    while stack:
        value = stack.pop(0)
        if isinstance(value, ir.MultiOutput):
            yield value
        elif isinstance(value, (list, tuple)):
            stack[:0] = value
        elif isinstance(value, dict):
            stack[:0] = value.values()


def _workspace(node: Any) -> list[Bytes]:
    """Bytes of each of a CUDA call's own temporaries."""
    devices = [i.get_device() for i in _tensors(node)]
    if not devices or devices[0].type != "cuda":
        return []
    with _without_guards():
        return [_bytes(compat.exact(n)) for n in workspaces(*_call(node))]


def _tensors(node: Any) -> list[Any]:
    return [i for i in node.inputs if isinstance(i, ir.IRNode) and hasattr(i, "get_size")]


def _call(node: Any) -> tuple[str, list[Operand], Operand | None, dict[str, Any]]:
    """The arguments of ``workspaces``."""
    op = str(getattr(node, "op_overload", "") or "")
    result = _operand(node) if isinstance(node.get_output_spec(), ir.Layout) else None
    return op, [_operand(t) for t in _tensors(node)], result, _arguments(node)


def _operand(node: Any) -> Operand:
    """A buffer or a view as a kernel sees it; comparisons of its dynamic sizes are the example's."""
    shape, strides = (
        tuple(map(_comparable, sizes)) for sizes in (node.get_size(), node.maybe_get_stride() or ())
    )
    return Operand(shape, strides, int(get_dtype_size(node.get_dtype())))


def _comparable(size: Any) -> Any:
    """An int, or torch's symbolic one."""
    sizevars = V.graph.sizevars
    value, exact = _hint(size), compat.exact(sizevars.simplify(size))
    known = not isinstance(exact, int) and not compat.depends_on_data(exact)
    return sizevars.shape_env.create_symintnode(exact, hint=value) if known else value


def _hint(size: Any) -> int:
    return int(V.graph.sizevars.optimization_hint(size, fallback=4096))


def _without_guards() -> contextlib.AbstractContextManager[None]:
    return compat.without_guards(V.graph.sizevars.shape_env)


def _bytes(size: Any) -> Bytes:
    """At the sizes' hints, and as an expression where they are dynamic."""
    return _hint(size), None if isinstance(size, int) else size


def _arguments(node: Any) -> dict[str, Any]:
    """What a call gets beside tensors, by name: as keywords, or, from a fallback, in the schema's order."""
    given = dict(node.kwargs)
    schema = getattr(getattr(node, "op_overload", None), "_schema", None)
    if schema is not None and hasattr(node, "unflatten_args"):
        args, kwargs = node.unflatten_args(node.inputs, node.constant_args)
        given |= {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if not isinstance(value, ir.IRNode)}


def _nbytes(node: Any) -> Bytes:
    """Bytes of a buffer; 0 on another device than the graph's."""
    main = "cuda" if "cuda" in V.graph.device_types else "cpu"
    if node.get_device().type != main:
        return 0, None
    length = V.graph.sizevars.simplify(V.graph.get_allocation_storage_size(node))
    return _bytes(compat.exact(length) * int(get_dtype_size(node.get_dtype())))
