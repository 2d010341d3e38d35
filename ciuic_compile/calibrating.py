"""Measure a model's error coefficients: :func:`calibrate`.

The model is captured and partitioned as for a lossy plan, but its graphs are run op by op, without codecs and
without generating code. Each backward runs once as it is, which gives the energy of every gradient, and once
for each group of saved tensors (mostly: class) with all of it through a codec and back. Only the backward
differs between those runs, so the difference is the codecs' error and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from . import compat, markers
from .analyze import MemoryModel
from .calibration import Calibration, GraphCalibration
from .codecs import Codec
from .config import CompileConfig, parse_options
from .errors import CalibrationError
from .fingerprint import fingerprint
from .partitioner import partition_joint
from .planner import Selection
from .planner.error_model import ErrorModel, group_of

#: The coarsest codec up to this error of its own measures a group: rounding to bfloat16, which differs from
#: run to run as soon as anything does, must be small beside it.
_MOST = 0.01


@dataclass
class Measured:
    """One compiled graph, and the sums of squares that were measured of it over all calls of its backward.

    Attributes:
        energy: of each gradient.
        device: type of the gradients' device.
        mse: group -> codec -> relative mean squared error of each of its tensors at each call.
        wrong: group of saved tensors -> of the error that the group made in all gradients.
    """

    model: MemoryModel
    selection: Selection
    energy: Tensor | None = None
    device: str = "cpu"
    mse: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    wrong: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @cached_property
    def groups(self) -> dict[str, list[fx.Node]]:
        """Group -> the saved tensors of it that a codec may store lossily."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.model.storages_of(self.selection.saved):
            if self._lossy(node):
                found.setdefault(group_of(self.model.classes, node), []).append(node)
        return found

    @torch.no_grad()
    def run(self, backward: fx.GraphModule, arguments: Sequence[Any]) -> Any:
        """The gradients, exact; measured on the way."""
        exact = backward(*arguments)
        energy = _energies(exact)
        self.energy = energy if self.energy is None else self.energy + energy
        self.device = next(g.device.type for g in exact if isinstance(g, Tensor))
        given = dict(zip(_inputs(backward), arguments, strict=True))
        for group, nodes in self.groups.items():
            for node in nodes:
                for codec in self._lossy(node):
                    self.mse[group][codec.name].append(_relative_mse(given[node.name], codec.name))
            coarse = {node.name: self._probe(node) for node in nodes}
            self.wrong[group] += float(
                _energies(backward(*through(backward, arguments, coarse)), exact).sum()
            )
        return exact

    def result(self) -> GraphCalibration:
        """Shares, gains and the codecs' own errors.

        Raises:
            CalibrationError: the gradients are zero, or not finite.
        """
        assert self.energy is not None
        whole = float(self.energy.sum())
        if not 0 < whole < float("inf"):
            raise CalibrationError(f"the gradients' sum of squares is {whole}; calibrate on ordinary batches")
        shares = (self.energy / whole).tolist()
        mse = {
            group: {codec: fmean(known) for codec, all_ in codecs.items() if (known := _finite(all_))}
            for group, codecs in self.mse.items()
        }
        errors = ErrorModel(self.model.captured, self.model.classes, list(self.selection.saved))
        gains = {}
        for group, nodes in self.groups.items():
            each = errors.gradient_errors({n: mse[group].get(self._probe(n), 0.0) for n in nodes})
            predicted = sum(s * e * e for s, e in zip(shares, each, strict=True))
            gain = self.wrong[group] / whole / predicted if predicted else 1.0
            if gain < float("inf"):  # false for NaN as well: nothing is known of the group then
                gains[group] = gain
        return GraphCalibration(tuple(shares), gains, mse)

    def _lossy(self, node: fx.Node) -> list[Codec]:
        return [codec for codec in self.model.codecs(node) if codec.relative_mse > 0]

    def _probe(self, node: fx.Node) -> str:
        """The codec that a tensor's group is measured with."""
        usable = [codec for codec in self._lossy(node) if codec.relative_mse <= _MOST]
        return max(usable or self._lossy(node), key=lambda codec: codec.relative_mse).name


def through(backward: fx.GraphModule, arguments: Sequence[Any], codecs: Mapping[str, str]) -> list[Any]:
    """A backward's arguments, with these saved tensors (by name) through these codecs and back."""
    named = zip(_inputs(backward), arguments, strict=True)
    return [_there_and_back(a, codecs[name]) if name in codecs else a for name, a in named]


def _inputs(backward: fx.GraphModule) -> list[str]:
    return [n.name for n in backward.graph.find_nodes(op="placeholder")]


def _there_and_back(x: Tensor, codec: str) -> Tensor:
    order = markers.storage_order(x)
    return markers.decode(markers.encode(x, codec, order), codec, [x.shape[d] for d in order], order, x.dtype)


def _relative_mse(x: Tensor, codec: str) -> float:
    """Of one tensor; NaN where it is zero."""
    wrong, energy = _energies([_there_and_back(x, codec), x], [x, torch.zeros_like(x)])
    return float(wrong / energy)


def _finite(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def calibrate(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[..., Tensor] | None, steps: int
) -> Calibration:
    """:func:`ciuic_compile.calibrate`."""
    if steps < 1:
        raise CalibrationError(f"steps={steps}: at least one step is needed")
    while hasattr(model, "_orig_mod"):  # what torch.compile has wrapped
        model = model._orig_mod  # type: ignore[assignment]
    if not isinstance(model, nn.Module):
        raise CalibrationError(f"calibrate takes the module, not a {type(model).__name__}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise CalibrationError("no parameter of the model requires a gradient")
    graphs: list[Measured] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    recorder = _recorder(graphs)
    compiled = torch.compile(step, backend=recorder, dynamic=False)
    count = 0
    with _left_as_found(model):
        try:
            for batch in itertools.islice(batches, steps):
                torch.autograd.grad(_loss(compiled, batch, loss_fn), parameters, allow_unused=True)
                count += 1
        finally:
            compat.forget_compiled(step, recorder)
    if not count:
        raise CalibrationError("no batch was given")
    measured = _merged(graphs)
    if not measured:
        raise CalibrationError("no compiled graph of the model had a backward")
    devices = sorted({graph.device for graph in measured.values()})
    results = {key: graph.result() for key, graph in measured.items()}
    return Calibration(results, count, torch.__version__, devices[-1])


def _recorder(graphs: list[Measured]) -> Callable[..., Any]:
    """A backend that runs partitioned graphs op by op and appends what it measures of each."""
    # cut as a plan at the default ratio cuts; the loss whole, since its chunks have the same gradients
    config = parse_options({"mode": "4:1", "min_bytes": 0, "chunk_loss": False, "report": "off"})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        partitioner = _Partitioner(config)

        def run_graph(graph: fx.GraphModule, example_inputs: object, **kwargs: Any) -> Any:
            measured = partitioner.measured if kwargs.get("is_backward") else None
            if measured is not None:
                graphs.append(measured)

            def call(args: list[Any]) -> Any:
                arguments = list(args)
                args.clear()
                return graph(*arguments) if measured is None else measured.run(graph, arguments)

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        # Inductor's own random numbers have no kernel that runs op by op from a seed
        patches = {"custom_partitioner_fn": partitioner, "fallback_random": True}
        with torch._functorch.config.patch(enable_autograd_cache=False, donated_buffer=False):
            return compile_fx(gm, example_inputs, inner_compile=run_graph, config_patches=patches)

    return backend


class _Partitioner(CustomPartitionerFn):
    """Partitions as for a plan; what was selected is kept, no codec inserted."""

    def __init__(self, config: CompileConfig) -> None:
        self._config = config
        self.measured: Measured | None = None

    def uuid(self) -> None:
        return None

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs, candidate = partition_joint(gm, joint_inputs, self._config, None, 0, **kwargs)
        if candidate is not None:
            self.measured = Measured(candidate.model, candidate.selection)
        return graphs.forward, graphs.backward


def _merged(graphs: Sequence[Measured]) -> dict[str, Measured]:
    """By fingerprint; the same layers may have been compiled several times."""
    found: dict[str, Measured] = {}
    for graph in graphs:
        if graph.energy is None:
            continue
        first = found.setdefault(fingerprint(graph.model.captured), graph)
        if first is not graph:
            assert first.energy is not None
            first.energy = first.energy + graph.energy
            for group, wrong in graph.wrong.items():
                first.wrong[group] += wrong
            for group, codecs in graph.mse.items():
                for codec, errors in codecs.items():
                    first.mse[group][codec] += errors
    return found


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics) and random number generators are put back."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])


def _loss(model: Callable[..., Any], batch: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    """The loss of one batch; docs/options.md says how batches are unpacked."""
    rest: Sequence[Any] = ()
    if isinstance(batch, Mapping):
        found = model(**batch)
    elif isinstance(batch, (tuple, list)) and loss_fn is None:
        found = model(*batch)
    elif isinstance(batch, (tuple, list)):
        found, rest = model(batch[0]), batch[1:]
    else:
        found = model(batch)
    if loss_fn is not None:
        found = loss_fn(found, *rest)
    elif not isinstance(found, Tensor):
        found = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        raise CalibrationError(
            "the model returns no loss (a tensor of one element with gradients); pass loss_fn"
        )
    return found


def _energies(gradients: Sequence[Any], reference: Sequence[Any] | None = None) -> Tensor:
    """Sum of squares of each gradient, or of its difference to the reference; in float64 on the CPU."""
    sums = []
    for i, gradient in enumerate(gradients):
        if isinstance(gradient, Tensor):
            wide = torch.promote_types(gradient.dtype, torch.float32)
            value = gradient.to(wide)
            if reference is not None:
                value = value - reference[i]
            sums.append(torch.linalg.vector_norm(value).double().cpu() ** 2)
    return torch.stack(sums)
