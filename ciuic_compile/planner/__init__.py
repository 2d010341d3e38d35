"""Stage 4: decide for every storage whether to keep, rebuild or compress it, and how far.

First the cut (which values live on at all, ``select.py``), then the codecs (``assign.py``) under the
mode's byte target and the error cap. Where that plan's peak is over the budget, all three are chosen
anew and together (``formulate.py``, ``solve.py``, ``fit.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import fx

from .. import compat
from ..analyze import MemoryModel
from ..capture import owner, tensor
from ..classify import is_contraction
from ..codecs import get_codec
from ..devices import DeviceProfile
from ..errors import InfeasibleBudgetError
from ..rows import FEED_FORWARD_CHUNK, LOSS_CHUNK
from ..simulate import Peaks, tensor_bytes
from ..types import Action, Decision, Plan, Price
from .assign import Option, assign
from .error_model import ErrorModel, relative_mse
from .fit import Fit, Judge, fit
from .formulate import error_as_us, formulate, storable
from .program import evaluate
from .select import NoCut, follows_rules, select_saved
from .timing import node_us


@dataclass(frozen=True)
class Selection:
    """Which nodes live from forward to backward (parameters and inputs included), with notes.

    Attributes:
        codecs: how, where that was decided together (under a budget); else it is decided next.
    """

    saved: tuple[fx.Node, ...]
    notes: tuple[str, ...] = ()
    codecs: Codecs | None = None


@dataclass(frozen=True)
class Codecs:
    """The chosen codec of each saved node (None: kept), and what the optimiser certified."""

    chosen: Mapping[fx.Node, str | None]
    options: Mapping[fx.Node, Option]
    lower_bound: float
    gap: float
    notes: tuple[str, ...] = ()
    tightened: bool = False  # by the budget, beyond the mode's own target
    rebuilt_us: float | None = None  # what the solver counts for what Inductor would not compute again
    price: Price | None = None

    @property
    def by_name(self) -> dict[str, str]:
        """Node name -> codec, compressed ones only."""
        return {node.name: codec for node, codec in self.chosen.items() if codec}

    @property
    def nbytes(self) -> int:
        """Bytes of all saved tensors, as stored."""
        return sum(option.nbytes for option in self.options.values())

    @property
    def variance(self) -> float:
        """Relative variance of the gradients that the codecs add, as the optimiser counts it."""
        return sum(option.variance for option in self.options.values())


def select(model: MemoryModel) -> Selection:
    """Choose the values that live on; torch's own choice where no better cut exists."""
    captured = model.captured
    baseline_bytes = sum(model.baseline.values())
    try:
        saved = select_saved(captured, model.classes, model.stored_bytes, model.config.lossy)
    except NoCut:
        note = "kept Inductor's own choice of saved tensors: no other cut exists"
        return Selection(_by_storage(captured.baseline_saved), (note,))
    stored = sum(model.stored_bytes(n) for n in model.storages_of(saved))
    smaller = stored > min(baseline_bytes, sum(model.stored_bytes(n) for n in model.baseline))
    if smaller and follows_rules(captured, model.classes, captured.baseline_saved, model.config.lossy):
        note = "kept Inductor's own choice of saved tensors: it is smaller"
        return Selection(_by_storage(captured.baseline_saved), (note,))
    return Selection(_by_storage(saved))


def _by_storage(saved: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The owners of what views among the saved nodes show: a storage is planned, encoded and saved once."""
    return tuple(dict.fromkeys(map(owner, saved)))


def choose_codecs(
    model: MemoryModel, selection: Selection, coefficients: Mapping[fx.Node, float] | None = None
) -> Codecs:
    """Codecs for the saved tensors: least error within the mode's ratio.

    Args:
        coefficients: of the saved tensors' errors, where they are known already.
    """
    if coefficients is None:
        coefficients = _coefficients(model, selection.saved)
    config = model.config
    baseline_bytes = model.baseline_bytes
    sizes = model.storages_of(selection.saved)
    target = int(baseline_bytes / config.ratio) if config.ratio else baseline_bytes
    options = _all_options(model, selection, coefficients)
    codecs = _solve(model, options, target)
    if model.short_of_memory and codecs.nbytes <= target:
        codecs = _below_rounding(model, options, codecs)
    planned = codecs.nbytes
    notes = list(codecs.notes)
    if config.ratio and planned > target and baseline_bytes:
        fixed = max((n for n in sizes if not codecs.chosen.get(n)), key=lambda n: sizes[n], default=None)
        limit = "max_error" if config.max_error is not None else "what must stay exact"
        where = f"; the largest is {fixed.name} ({sizes[fixed] / 2**20:.1f} MiB)" if fixed is not None else ""
        notes.append(
            f"{config.mode} is out of reach: "
            f"{baseline_bytes / planned:.2f}:1 is all that {limit} leaves{where}"
        )
    return replace(codecs, notes=tuple(notes))


def _below_rounding(
    model: MemoryModel, options: Mapping[fx.Node, Sequence[Option]], codecs: Codecs
) -> Codecs:
    """Fewer bytes than the ratio asks for, as far as that adds less error than rounding does."""
    noise = min(rounding_error(model), model.config.max_error or 1.0)
    return _solve(model, options, 0, noise) if codecs.variance < noise**2 else codecs


def rounding_error(model: MemoryModel) -> float:
    """Relative error that rounding alone leaves in the gradients of a graph, roughly (dimensionless).

    1.75 times the machine epsilon of its matmuls' and convolutions' results, the most precise of them: 0.014
    in bfloat16. There Inductor's own gradients were 0.008 to 0.016 off those in float32 (three models under
    autocast), and those of two large Llamas 0.02 to 0.05 off those of another fusion (docs/results.md).
    """
    values = (tensor(n) for n in model.captured.savable if is_contraction(n))
    return 1.75 * min((torch.finfo(v.dtype).eps for v in values if v is not None), default=0.0)


def fit_budget(model: MemoryModel, selection: Selection, judge: Judge, frugal: bool = False) -> Selection:
    """What costs least within the budget; under a ratio, the selection with its codecs wherever that fits.

    Args:
        judge: simulated peaks of the rewritten graphs.
        frugal: take nothing but the selection with its codecs.

    Raises:
        InfeasibleBudgetError: no plan was found within the budget, or what is ``frugal`` is over it.
    """
    config = model.config
    assert config.budget is not None
    coefficients = _coefficients(model, selection.saved)
    codecs = choose_codecs(model, selection, coefficients)
    peaks = judge(selection.saved, codecs.chosen) if config.shrinks or frugal else None
    if peaks is not None and peaks.peak <= config.budget:
        return replace(selection, codecs=codecs)
    if frugal and peaks is not None:
        said = f"budget {config.budget:,} bytes: the mode's own plan needs {peaks.peak:,} bytes"
        raise InfeasibleBudgetError(said, budget_bytes=config.budget, smallest_bytes=peaks.peak)
    everything = storable(model)
    of_all = {**_coefficients(model, everything), **coefficients}
    options = {n: _options(model, n, of_all.get(n, 0.0), model.device) for n in everything}
    formulation = formulate(model, options, {*selection.saved, *model.captured.baseline_saved})
    smallest = _solve(model, _all_options(model, selection, coefficients), 0)
    most = codecs.nbytes if config.shrinks else max(codecs.nbytes, model.baseline_bytes)
    found = fit(
        formulation,
        config.budget,
        formulation.decision(selection.saved, smallest.chosen),
        (formulation.decision(selection.saved, codecs.chosen), peaks),
        judge,
        config.plan_seconds,
        max_saved=most if config.lossy else None,
        max_variance=config.max_error**2 if config.max_error is not None else None,
    )
    notes = selection.notes
    if found.struck:
        late = f"the planner ran into its deadline ({config.plan_seconds:g} s)"
        notes += (f"{late}: another run may find another plan; plan_seconds gives it more",)
    picked = replace(selection, saved=found.saved, notes=notes)
    own = evaluate(formulation.problem, formulation.decision(model.captured.baseline_saved, {}))
    beyond = found.evaluation.time_us - (0.0 if own.missing else own.time_us)
    return replace(picked, codecs=_described(model, picked, found, beyond))


def _described(
    model: MemoryModel,
    selection: Selection,
    found: Fit,
    time_us: float,
) -> Codecs:
    """What the solver chose, with the error of each storage among these saved ones.

    Args:
        time_us: what it takes beyond Inductor's own choice, by the solver's account.
    """
    device, chosen = model.device, found.codecs
    coefficients = _coefficients(model, selection.saved)
    picked: dict[fx.Node, Option] = {}
    for node in model.storages_of(selection.saved):
        options = _options(model, node, coefficients.get(node, 0.0), device)
        picked[node] = next(o for o in options if o.codec == chosen.get(node))
    stored_us = sum(o.time_us for n, o in picked.items() if chosen.get(n))
    return Codecs(
        {n: o.codec for n, o in picked.items()},
        picked,
        found.bound,
        found.gap,
        tightened=True,
        rebuilt_us=max(0.0, time_us - stored_us),
        price=_price(found),
    )


def _price(found: Fit) -> Price | None:
    if found.price is None:
        return None
    return Price(found.price.step_bytes, found.price.more_saves, found.price.less_costs)


def _errors(model: MemoryModel, saved: Sequence[fx.Node]) -> ErrorModel:
    return ErrorModel(model.captured, model.classes, list(saved), model.calibration, model.energy)


def _coefficients(model: MemoryModel, saved: Sequence[fx.Node]) -> dict[fx.Node, float]:
    """What the error of each saved node counts; nothing where no codec makes one."""
    return _errors(model, saved).coefficients() if model.config.lossy else {}


def _all_options(
    model: MemoryModel, selection: Selection, coefficients: Mapping[fx.Node, float]
) -> dict[fx.Node, list[Option]]:
    """What each saved storage may become."""
    return {
        n: _options(model, n, coefficients.get(n, 0.0), model.device)
        for n in model.storages_of(selection.saved)
    }


def _solve(
    model: MemoryModel,
    options: Mapping[fx.Node, Sequence[Option]],
    target: int,
    max_error: float | None = None,
) -> Codecs:
    """Least error within so many bytes, and within the user's ``max_error`` or the one given."""
    most = max_error or model.config.max_error
    if not model.config.lossy:
        target = 0  # only lossless codecs are on offer: take every one of them
    result = assign(list(options.values()), target, most**2 if most is not None else None)
    picked = {n: group[i] for (n, group), i in zip(options.items(), result.choice, strict=True)}
    return Codecs({n: o.codec for n, o in picked.items()}, picked, result.lower_bound, result.gap)


def _options(model: MemoryModel, node: fx.Node, coefficient: float, device: DeviceProfile) -> list[Option]:
    value = tensor(node)
    assert value is not None
    numel, itemsize = compat.hint(value.numel()), value.dtype.itemsize
    options = [Option(None, tensor_bytes(value), 0.0, 0.0)]
    for codec in model.codecs(node):
        moved = codec.kernel_bytes(numel, itemsize)
        time_us = device.microseconds(int(moved.encode) + int(moved.decode))
        options.append(
            Option(
                codec.name,
                int(codec.encoded_bytes(numel, itemsize)),
                coefficient * relative_mse(model.classes, node, codec, model.calibration),
                time_us,
            )
        )
    return options


def make_plan(
    name: str,
    model: MemoryModel,
    selection: Selection,
    codecs: Codecs,
    baseline: Peaks,
    planned: Peaks,
    device: DeviceProfile,
    notes: Sequence[str] = (),
) -> Plan:
    """Write the decisions down, one a storage that Inductor or this plan would save, in forward order."""
    captured = model.captured
    ours = model.storages_of(selection.saved)
    before = model.baseline_here
    nodes = sorted({*ours, *before}, key=captured.order.__getitem__)
    used = {n: get_codec(codec) for n, codec in codecs.chosen.items() if codec}
    mse = {n: relative_mse(model.classes, n, codec, model.calibration) for n, codec in used.items()}
    most = {n: max(mse[n], codec.relative_mse) for n, codec in used.items()}
    errors, gradient_error, bound = dict[fx.Node, float](), 0.0, 0.0
    if any(most.values()):
        error_model = _errors(model, selection.saved)
        share = error_model.coefficients(error_model.weights)
        errors = {node: sqrt(share[node] * mse[node]) for node in mse}
        gradient_error = error_model.whole(error_model.gradient_errors(mse))
        bound = error_model.bound(most)
    rebuilt_us = _rebuilt_us(model, codecs)
    return Plan(
        name=name,
        mode=model.config.mode,
        decisions=(
            *(_decision(model, node, ours, codecs, device, errors.get(node, 0.0)) for node in nodes),
            *_dissolved(model, device),
        ),
        baseline_saved_bytes=model.baseline_bytes,
        planned_saved_bytes=sum(o.nbytes for o in codecs.options.values()),
        baseline_peak_bytes=baseline.peak,
        planned_peak_bytes=planned.peak,
        gradient_error=gradient_error,
        gradient_error_bound=bound,
        time_us=sum(o.time_us for o in codecs.options.values()) + rebuilt_us + _chunks_again_us(model),
        gap=codecs.gap,
        lower_bound=codecs.lower_bound,
        budget_bytes=model.config.budget,
        tightened=codecs.tightened,
        price=codecs.price,
        dynamic=any(compat.is_symbolic(n) for n in captured.graph.find_nodes(op="placeholder")),
        device=device.name,
        profile=device,
        symbolic_saved_bytes=_symbolic_saved(model, codecs),
        notes=(*selection.notes, *codecs.notes, *notes, *_calibrated(model), *_unmatched(model)),
        baseline_saved_count=len(before) + len(model.dissolved),
    )


def cost_us(model: MemoryModel, codecs: Codecs, rebuilt: bool = True) -> float:
    """What a plan costs a step, in microseconds: codecs, what is computed again, gradient error as time.

    Args:
        rebuilt: whether what cheap operations rebuild counts; what chunks make again does.
    """
    time_us = sum(o.time_us for o in codecs.options.values()) + (
        _rebuilt_us(model, codecs) if rebuilt else 0.0
    )
    error_us = error_as_us(model) * codecs.variance if codecs.variance else 0.0
    return time_us + _chunks_again_us(model) + error_us


def _rebuilt_us(model: MemoryModel, codecs: Codecs) -> float:
    """Time of what the backward computes again: the solver's, or that of moving what Inductor would save."""
    if codecs.rebuilt_us is not None:
        return codecs.rebuilt_us
    missing = (size for n, size in model.baseline_here.items() if n not in codecs.options)
    return sum(model.device.microseconds(2 * size) for size in (*missing, *model.dissolved.values()))


def _chunks_again_us(model: MemoryModel) -> float:
    """Time of the matmuls that make a chunk's logits or feed-forward a second time, in microseconds."""
    total = 0.0
    for node in model.captured.graph.nodes:
        marked = node.meta.get(LOSS_CHUNK) or node.meta.get(FEED_FORWARD_CHUNK)
        if marked and model.captured.is_backward(node):
            factor, made = node.args[-2].meta["val"], node.meta["val"]
            flop = 2 * compat.hint(made.numel()) * compat.hint(factor.shape[-1])
            total += flop / model.device.flop_per_us(made.dtype.itemsize)
    return total


def _calibrated(model: MemoryModel) -> list[str]:
    """Whether the stated errors rest on the user's calibration."""
    given = model.config.calibration
    if given is None or not model.config.lossy:
        return []
    if model.calibration is None:
        return ["the calibration is not of this graph: its errors are guessed from shapes; calibrate again"]
    where = f"{given.steps} step{'s' if given.steps > 1 else ''} on {given.device} (torch {given.torch})"
    return [f"errors are those of the calibration: {where}"]


def _unmatched(model: MemoryModel) -> list[str]:
    """A typing error in ``allow``/``deny`` must not go unnoticed; another graph may hold what it names."""
    if not (model.config.allow or model.config.deny):
        return []
    calls = (n for n in model.captured.savable if n.op == "call_function")
    patterns = model.config.unmatched((model.source(n).module, str(n.target)) for n in calls)
    return [f"allow/deny: {p!r} matches no module and no op of this graph" for p in patterns]


def _decision(
    model: MemoryModel,
    node: fx.Node,
    ours: Mapping[fx.Node, int],
    codecs: Codecs,
    device: DeviceProfile,
    error: float,
) -> Decision:
    storage = model.storage(node)
    before = model.baseline_here.get(node, 0)
    if node not in ours:
        again = is_contraction(node)
        time_us = node_us(node, device) if again else device.microseconds(2 * before)
        reason = "computed again in the backward" if again else "rebuilt in the backward by cheap operations"
        return Decision(storage, Action.RECOMPUTE, None, 0, before, 0.0, time_us, reason)
    option = codecs.options[node]
    if option.codec is None:
        reason = storage.kept_because or "compressing it was not needed for the target"
        return Decision(storage, Action.KEEP, None, option.nbytes, before, 0.0, 0.0, reason)
    reason = (
        "packed to one bit each" if get_bits(option.codec) == 1 else "least error for the bytes it gives up"
    )
    return Decision(
        storage,
        Action.COMPRESS,
        option.codec,
        option.nbytes,
        before,
        error,
        option.time_us,
        reason,
    )


def _dissolved(model: MemoryModel, device: DeviceProfile) -> list[Decision]:
    """Decisions on what the user's graph has in one piece and this one makes in chunks."""
    original = model.original
    if original is None:
        return []
    reason = "made chunk by chunk, in the backward again: never all alive"
    made = []
    for node, size in model.dissolved.items():
        storage = original.storage(node)
        storage = replace(storage, id=f"{storage.id}@whole")  # its chunks may have its id
        time_us = device.microseconds(2 * size)
        made.append(Decision(storage, Action.RECOMPUTE, None, 0, size, 0.0, time_us, reason))
    return made


def get_bits(codec: str) -> int:
    """Payload bits of a codec by name."""
    return get_codec(codec).bits


def _symbolic_saved(model: MemoryModel, codecs: Codecs) -> str:
    total = compat.to_sympy(0)
    for node, codec in codecs.chosen.items():
        value = tensor(node)
        assert value is not None
        numel = compat.to_sympy(value.numel())
        size = value.dtype.itemsize
        total += get_codec(codec).encoded_bytes(numel, size) if codec else numel * size
    return str(total)
