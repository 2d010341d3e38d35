"""Plans without a GPU, without weights and without running anything."""

from __future__ import annotations

import contextlib
import itertools
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import compat, compat_cuda, compat_fake
from .backend import CUDA_PATCHES, is_training
from .config import CompileConfig, default_config, parse_options
from .confirm import in_memory, storage_sizes
from .devices import DeviceProfile, profile_for
from .errors import CiuicError, OptionError, TargetError
from .partitioner import CiuicPartitioner
from .symbolize import narrowed
from .types import Plan

SIMULATED = "the peak is simulated, not replayed: no code was generated"
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_HERE = str(Path(__file__).parent)
#: One plan at a time: Dynamo's state is set aside for it, and ``step`` is one code object for all.
_ALONE = threading.RLock()
_TORCH = str(Path(torch.__file__).parent)


def plan(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    device: str | DeviceProfile | None = None,
    autocast: str | None = None,
    dynamic: bool | None = None,
) -> tuple[Plan, ...]:
    """Plan the step ``loss_fn(model(x), *rest)``, compiled as one, without running it.

    Dynamo, AOTAutograd, Inductor's passes and the planner run on fake tensors; no memory is allocated for
    weights and no code is generated, so the peak is the simulated one (docs/architecture.md, "Confirm").
    For a GPU, attention and autocast are those of CUDA.

    Args:
        model: with parameters on any device, the meta device among them. It is the same afterwards.
        example_inputs: a batch, as for :func:`ciuic_compile.calibrate`: a tensor ``x``, a tuple
            ``(x, *rest)``, or a dict of keyword arguments. Only shapes, dtypes and strides matter.
        loss_fn: computes the loss; None: the model is planned alone, ``model(x, *rest)``, and all that it
            returns lives until the backward.
        options: docs/options.md; what is not given is as in ``enable_compression``.
        device: the same as the option ``device``.
        autocast: "bfloat16" or "float16": the step is under autocast of that dtype; None: it is not.
        dynamic: as in ``torch.compile``.

    Returns:
        One plan for each call of a training graph, in order: one, unless the graph breaks. Where layers share
        one graph, each call counts; what runs between graphs is not planned.

    Raises:
        OptionError: a wrong option.
        InfeasibleBudgetError: no plan fits ``budget``.
        TargetError: the step failed in the user's code, or nothing in it depends on gradients.
    """
    given = {"report": "off", **(options or {})}
    if device is not None:
        given["device"] = device
    config = parse_options(given, base=default_config())
    if config.mode == "off":
        raise OptionError(
            "ciuic option 'mode': got 'off': there is nothing to plan\n  valid: 'R:1', 'lossless'\n"
            "  fix: use mode 'lossless'; each plan states Inductor's own peak too (baseline_peak_bytes)"
        )
    if autocast is not None and autocast not in _AUTOCAST:
        raise OptionError(
            f"autocast: got {autocast!r}\n  valid: {', '.join(map(repr, _AUTOCAST))}\n"
            "  fix: leave it out for none"
        )
    made: list[Plan] = []
    _run_on_fakes(unwrapped(model), example_inputs, loss_fn, config, made, autocast, dynamic)
    if not made:
        raise TargetError(
            "nothing to plan: no compiled graph of the step depends on gradients\n"
            "  fix: let a parameter or an input require gradients, and let the step return what depends on it"
        )
    return tuple(made)


def call(model: Callable[..., Any], batch: Any, loss_fn: Callable[..., Any] | None) -> Any:
    """What a step returns: the loss, or what the model returns where there is no ``loss_fn``."""
    if isinstance(batch, Mapping):
        found, rest = model(**batch), ()
    elif not isinstance(batch, (tuple, list)):
        found, rest = model(batch), ()
    elif loss_fn is None:
        found, rest = model(*batch), ()
    else:
        found, rest = model(batch[0]), tuple(batch[1:])
    return found if loss_fn is None else loss_fn(found, *rest)


def autocast_on(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a dtype by its name; none for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, _AUTOCAST[dtype])


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped, or the module itself."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def user_frame(error: BaseException) -> str:
    """Where in the user's code an exception came from, as "file:line (source)"; "" where it did not."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith((_TORCH, _HERE, "<"))]
    return f"{users[-1].filename}:{users[-1].lineno} ({users[-1].line})" if users else ""


class _Planner(CiuicPartitioner):
    """Partitions graphs that nobody will run: none of them needs Python code, or codecs as operations."""

    lowers = False

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with compat.without_code():
            return super().__call__(gm, joint_inputs, **kwargs)


def _run_on_fakes(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor] | None,
    config: CompileConfig,
    made: list[Plan],
    autocast: str | None,
    dynamic: bool | None,
) -> None:
    fakes = compat_fake.Fakes()
    failed: list[CiuicError] = []
    numbers = itertools.count()

    cuda = config.device if config.device is not None and config.device.kind == "cuda" else None

    def backend(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        patches = {**(CUDA_PATCHES if cuda else {}), **config.inductor_options}
        partitioner = _Planner(config, "planning", f"graph {next(numbers)}")
        try:
            compiled = compat_fake.partition_only(gm, example_inputs, partitioner, patches, fakes.mode)
        except CiuicError as error:
            failed.append(error)
            raise compat.user_facing(error) from error.__cause__
        if partitioner.plan is None or not is_training(example_inputs):
            return compiled
        plan = _finished(partitioner.plan, example_inputs)

        def called(*args: Any) -> Any:  # a graph of equal layers, each called from Python, counts each time
            made.append(plan)
            return compiled(*args)

        return called

    def step(batch: Any) -> Any:
        return call(model, batch, loss_fn)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_ALONE)
        stack.callback(compat.forget_compiled, step, backend)
        stack.enter_context(compat_fake.first_compile())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(compat.collecting_later())
        try:
            stack.enter_context(fakes.inside(model))
            inputs = fakes.tree(dict(batch) if isinstance(batch, Mapping) else batch)
        except TypeError as error:
            raise TargetError(
                f"the model or its inputs: {error}\n  valid: torch.Tensor and nn.Parameter, on any device\n"
                "  fix: plan the model before it is quantized, sharded or wrapped"
            ) from error
        stack.enter_context(fakes.mode)
        if cuda is not None:
            stack.enter_context(compat_cuda.as_cuda(cuda.prefers_cudnn))
        stack.enter_context(autocast_on(torch.device("cpu"), autocast))
        try:
            torch.compile(step, backend=backend, dynamic=dynamic)(inputs)
        except compat_fake.BackendCompilerFailed:
            raise  # a bug of ours
        except (Exception, SystemExit) as error:
            if failed:  # as it was raised; Dynamo adds advice to it
                raise failed[0] from failed[0].__cause__
            raise _of_users(error) from error


def _finished(plan: Plan, example_inputs: Sequence[object]) -> Plan:
    """A plan as after ``confirm``, but for what generated code would tell."""
    device = plan.profile or profile_for(torch.device("cpu"))
    plan = in_memory(replace(plan, input_bytes=sum(storage_sizes(example_inputs))), device)
    plan = narrowed(plan, example_inputs)
    return replace(plan, notes=(*plan.notes, SIMULATED))


def _of_users(error: BaseException) -> TargetError:
    where = user_frame(error)
    said = " ".join(str(error).split())[:500]
    return TargetError(
        f"the step failed on fake tensors: {type(error).__name__}: {said}\n"
        + (f"  at: {where}\n" if where else "")
        + "  fix: check that it runs with these inputs (shapes, dtypes, missing arguments); what reads a "
        "tensor's values (.item(), if tensor:) between compiled graphs has none here"
    )
