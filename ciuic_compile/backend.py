"""``torch.compile(model, backend="ciuic")``: the stages of docs/architecture.md, top to bottom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.compile_fx import compile_fx

from . import cache, compat, report
from .config import CompileConfig, default_config, parse_options
from .devices import profile_for
from .errors import CiuicError
from .partitioner import CiuicPartitioner
from .types import Plan

# What Inductor does otherwise, and what it cost on a Llama-shaped backward (docs/torch-internals.md):
_CUDA_PATCHES: dict[str, Any] = {
    # keeps a dead buffer until a later one of its size takes its place, across layers: 688 MiB of a 3.1 GiB
    # peak. The caching allocator reuses at once.
    "allow_buffer_reuse": False,
    # moves decodes to the start of the backward (its estimate ignores saved tensors): we place them.
    "reorder_for_peak_memory": False,
}
_plans: list[Plan] = []
_counter = itertools.count()


def ciuic(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: Inductor, with activations planned and compressed between forward and backward.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs (fake or real tensors, symbolic sizes).
        mode: ``torch.compile(mode=...)``: an Inductor mode, or a ratio such as "4:1".
        options: ``torch.compile(options=...)``: docs/options.md.

    Raises:
        OptionError: a wrong option. ``torch.compile`` itself raises it, before any tracing.
        InfeasibleBudgetError: no plan fits ``budget``.
    """
    try:
        config = parse_options(options, mode, base=default_config())
        return _compile(gm, example_inputs, config)
    except CiuicError as error:
        raise compat.user_facing(error) from error.__cause__


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[object], config: CompileConfig
) -> Callable[..., Any]:
    patches: dict[str, Any] = dict(config.inductor_options)
    if config.mode == "off":
        return _inductor(gm, example_inputs, patches)
    name = f"graph {next(_counter)}"
    if not _is_training(example_inputs):
        report.emit_note(
            f"{name}: inference (no gradients): compiled as Inductor would, nothing is compressed", config
        )
        return _inductor(gm, example_inputs, patches)
    key = cache.graph_key(gm, example_inputs, config, profile_for(_device(example_inputs)).name)
    plans: list[Plan] = []

    def announce(plan: Plan) -> None:
        plans.append(plan)
        _plans.append(plan)
        report.emit(plan, config)

    partitioner = CiuicPartitioner(config, key, name, announce)
    patches["custom_partitioner_fn"] = partitioner
    if _device(example_inputs).type == "cuda":
        patches = {**_CUDA_PATCHES, **patches}
    compiled = _inductor(gm, example_inputs, patches)
    if plans:
        cache.store(key, plans[-1])
    elif (stored := cache.load(key)) is not None:  # Inductor's cache was warm: the partitioner never ran
        announce(replace(stored, name=name))
    elif _hit_cache():  # warm, but the plan was lost: plan again rather than run unannounced
        with (
            inductor_config.patch(force_disable_caches=True),
            functorch_config.patch(enable_autograd_cache=False),
        ):
            compiled = _inductor(gm, example_inputs, patches)
    return compiled


def plans() -> tuple[Plan, ...]:
    """Plans of every training graph compiled in this process, in the order they were compiled."""
    return tuple(_plans)


def reset() -> None:
    """Forget the plans (``torch._dynamo.reset()`` calls this)."""
    _plans.clear()


def _inductor(
    gm: fx.GraphModule, example_inputs: Sequence[object], patches: dict[str, Any]
) -> Callable[..., Any]:
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[arg-type]
    return compiled  # type: ignore[no-any-return]


def _is_training(example_inputs: Sequence[object]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def _device(example_inputs: Sequence[object]) -> torch.device:
    devices = [v.device for v in example_inputs if isinstance(v, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _hit_cache() -> bool:
    return bool(inductor_config.fx_graph_cache) and not inductor_config.force_disable_caches


def _check(*, mode: str | None = None, options: Mapping[str, Any] | None = None) -> None:
    parse_options(options, mode, base=default_config())


ciuic.reset = reset  # type: ignore[attr-defined]
compat.check_options_early(ciuic, _check)
