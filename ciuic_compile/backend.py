"""``torch.compile(model, backend="ciuic")``: the stages of docs/architecture.md, top to bottom."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.compile_fx import compile_fx

from . import cache, compat, compat_wrapper, report
from .aiming import Aim, Outcome, next_aim
from .announcing import announce
from .compat_order import ByLastValue
from .config import CompileConfig, default_config, parse_options
from .confirm import confirm, main_device
from .devices import profile_for
from .errors import CiuicError, InfeasibleBudgetError, SizeError
from .partitioner import CiuicPartitioner
from .types import Plan

# What Inductor does otherwise, and what it cost on a Llama-shaped backward (docs/torch-internals.md):
CUDA_PATCHES: dict[str, Any] = {
    # keeps a dead buffer until a later one of its size takes its place, across layers: 688 MiB of a 3.1 GiB
    # peak. The caching allocator reuses at once.
    "allow_buffer_reuse": False,
    # moves decodes to the start of the backward (its estimate ignores saved tensors): we place them.
    "reorder_for_peak_memory": False,
}
_plans: list[Plan] = []
_counter = itertools.count()

_AFTER_FUSION = "_post_fusion_custom_pass"


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
    if not is_training(example_inputs):
        report.emit_note(
            f"{name}: inference (no gradients): compiled as Inductor would, nothing is compressed", config
        )
        return _inductor(gm, example_inputs, patches)
    if main_device(example_inputs).type == "cuda":
        patches = {**CUDA_PATCHES, **patches}
    compiled, plan = _planned(gm, example_inputs, config, patches, name)
    if plan is not None:
        _plans.append(plan)
        announce(plan)
        report.emit(plan, config)
        return _told_when_it_breaks(compiled, plan, example_inputs, config)
    return compiled


def _told_when_it_breaks(
    compiled: Callable[..., Any], plan: Plan, example_inputs: Sequence[object], config: CompileConfig
) -> Callable[..., Any]:
    """The same code, with a note before it first runs at sizes where the plan misses its ratio or budget."""
    given = {str(compat.exact(v)): i for i, v in enumerate(example_inputs) if isinstance(v, torch.SymInt)}
    symbols = plan.symbolic.symbols if plan.symbolic is not None else ()
    wanted = config.ratio is not None or config.budget is not None
    if not symbols or not wanted or any(s.name not in given for s in symbols):
        return compiled
    seen = {tuple(s.traced for s in symbols)}

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        sizes = tuple(args[given[s.name]] for s in symbols)
        if sizes not in seen:
            seen.add(sizes)
            with contextlib.suppress(SizeError):  # torch lets it run: that is no reason to stop
                at = plan.at(**{s.name: int(n) for s, n in zip(symbols, sizes, strict=True)})
                if not at.holds:
                    report.emit_note(f"{plan.name}: {at}", config)
        return compiled(*args)

    return run


def _planned(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    config: CompileConfig,
    patches: Mapping[str, Any],
    name: str,
) -> tuple[Callable[..., Any], Plan | None]:
    """Compile and plan; under a budget, plan again on what Inductor's schedule turned out to need."""
    key = cache.graph_key(gm, example_inputs, config, profile_for(main_device(example_inputs)).name)
    stored = cache.load(key)
    frugal = stored is not None and config.budget is not None and not (config.shrinks or stored.tightened)
    aim: Aim | None = Aim(kind="own") if frugal else Aim(stored.correction_bytes if stored else 0)
    attempts: list[tuple[Callable[..., Any], Plan]] = []
    outcomes: list[Outcome] = []
    missed: InfeasibleBudgetError | None = None
    while aim is not None:
        partitioner = CiuicPartitioner(config, key, name, aim.correction, aim.kind == "own")
        theirs = patches.get(_AFTER_FUSION, getattr(inductor_config, _AFTER_FUSION))
        order = ByLastValue(partitioner.is_by_last, theirs)
        ours = {**patches, _AFTER_FUSION: order, "custom_partitioner_fn": partitioner}
        try:
            with compat_wrapper.recorded() as recording:
                compiled = _inductor(gm, example_inputs, ours)
        except InfeasibleBudgetError as error:
            assert config.budget is not None
            missed = error
            least = None if aim.kind == "own" else error.smallest_bytes - aim.correction
            outcomes.append(Outcome(aim, smallest=least))
        else:
            if not partitioner.called and stored is not None:  # Inductor's cache was warm
                return compiled, replace(stored, name=name)
            if not partitioner.called and _caching():  # warm, but the plan was lost: plan again, announce it
                return _planned_anew(gm, example_inputs, config, patches, name)
            if partitioner.plan is None or partitioner.joint is None:  # nothing depends on the gradients
                return compiled, None
            plan = confirm(partitioner.plan, recording, partitioner.joint, example_inputs)
            if not plan.replayed and stored is not None:  # the code came from a cache, under the same key
                plan = replace(stored, name=name)
            elif not plan.replayed and recording.missing and _caching():  # that of a process that was stopped
                return _planned_anew(gm, example_inputs, config, patches, name)
            attempts.append((compiled, plan))
            if config.budget is None or not plan.replayed:
                break
            drift = plan.planned_peak_bytes - plan.simulated_peak_bytes
            outcomes.append(Outcome(aim, plan.planned_peak_bytes, drift, tightened=plan.tightened))
        aim = next_aim(config.budget, outcomes)
    fitting = [attempt for attempt in attempts if _fits(attempt[1])]
    if not attempts and missed is not None:
        raise missed
    if not fitting:
        raise _over_budget([plan for _, plan in attempts])
    compiled, plan = min(fitting, key=lambda attempt: (attempt[1].gradient_error, attempt[1].time_us))
    cache.store(key, plan)
    return compiled, plan


def _planned_anew(*args: Any) -> tuple[Callable[..., Any], Plan | None]:
    """The same without Inductor's caches: they hold code whose allocations nobody wrote down."""
    with (
        inductor_config.patch(force_disable_caches=True),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        return _planned(*args)


def _fits(plan: Plan) -> bool:
    return plan.budget_bytes is None or plan.planned_peak_bytes <= plan.budget_bytes


def _over_budget(tried: Sequence[Plan]) -> InfeasibleBudgetError:
    least = min(plan.planned_peak_bytes for plan in tried)
    budget = tried[0].budget_bytes or 0
    return InfeasibleBudgetError(
        f"budget {budget:,} bytes: Inductor's schedule of the smallest plan found needs {least:,} bytes "
        f"({least / 2**20:.1f} MiB); raise the budget to {least} bytes, or make the batch smaller",
        budget_bytes=budget,
        smallest_bytes=least,
    )


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


def is_training(example_inputs: Sequence[object]) -> bool:
    """Whether a graph with these inputs has a backward."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def _caching() -> bool:
    return bool(inductor_config.fx_graph_cache) and not inductor_config.force_disable_caches


def _check(*, mode: str | None = None, options: Mapping[str, Any] | None = None) -> None:
    parse_options(options, mode, base=default_config())


ciuic.reset = reset  # type: ignore[attr-defined]
compat.check_options_early(ciuic, _check)
