"""pytest plugin: limits on planned memory as marks, plans as a fixture (docs/pytest.md).

pytest imports it wherever ciuic-compile is installed, so torch is imported only for tests that plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

from .announcing import listening
from .errors import BaselineError, CiuicError, OutputError, SettingsError

if TYPE_CHECKING:
    from .gate.compare import Verdict
    from .gate.record import Record
    from .types import Plan

_MARKS: Final = {
    "max_vram": "peak of the planned step, with parameters and inputs",
    "max_saved": "bytes saved between forward and backward",
}
_SHOWN: Final = 5  # plans in the terminal section
_BYTES: Final = "a whole number of bytes, or a string such as '10 GiB'"


@dataclass(frozen=True)
class Step:
    """What was planned at one time: one graph of torch.compile, or all graphs of one ``memory_plan``."""

    plans: tuple[Plan, ...]
    record: Record

    @property
    def vram(self) -> int:
        """Bytes: the planned peak, with parameters, buffers and inputs."""
        return self.record.total_bytes


@dataclass
class Planned:
    """What a test planned, its limits in bytes by mark, and what its baseline said."""

    limits: dict[str, int]
    steps: list[Step] = field(default_factory=list)
    verdict: Verdict | None = None


_PLANNED: Final = pytest.StashKey[Planned]()
_SESSION: Final = pytest.StashKey["Session"]()


# ---------------------------------------------------------------- options and marks


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ciuic", "planned GPU memory (ciuic-compile)")
    group.addoption(
        "--ciuic-device", metavar="NAME", help="device that memory_plan plans for, e.g. h200; no GPU is needed"
    )
    group.addoption(
        "--ciuic-update-baseline",
        action="store_true",
        help="write what the tests that run plan into the baseline, in place of comparing",
    )
    parser.addini("ciuic_baseline", "file of accepted plans of tests", default="ciuic-tests-baseline.json")


def pytest_configure(config: pytest.Config) -> None:
    for name, what in _MARKS.items():
        config.addinivalue_line("markers", f"{name}(bytes): fail if the {what}, is above that, e.g. '10 GiB'")
    if (device := config.getoption("--ciuic-device")) is not None:
        from .config import parse_options

        try:
            parse_options({"device": device})
        except CiuicError as error:
            raise pytest.UsageError(f"--ciuic-device: {error}") from None
    config.stash[_SESSION] = Session()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        limits = {name: _limit(item, mark) for name in _MARKS if (mark := item.get_closest_marker(name))}
        if limits or "memory_plan" in getattr(item, "fixturenames", ()):
            item.stash[_PLANNED] = Planned(limits)


def _limit(item: pytest.Item, mark: pytest.Mark) -> int:
    """The bytes of a mark."""
    from .config import parse_size

    where = ":".join(map(str, (item.location[0], (item.location[1] or 0) + 1)))
    if len(mark.args) != 1 or mark.kwargs:
        given = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
        raise pytest.UsageError(
            f"{where}: {item.name}: @pytest.mark.{mark.name}({given}) needs one size\n"
            f"  valid: {_BYTES}\n  fix: write e.g. @pytest.mark.{mark.name}('10 GiB')"
        )
    try:
        return parse_size(mark.name, mark.args[0])
    except CiuicError as error:
        raise pytest.UsageError(f"{where}: {item.name}: @pytest.mark.{mark.name}: {error}") from None


# ---------------------------------------------------------------- while a test runs


@pytest.fixture
def memory_plan(request: pytest.FixtureRequest) -> MemoryPlan:
    """``memory_plan(model, inputs, loss_fn=None, **options) -> Plan``, without weights, GPU or execution."""
    device = request.config.getoption("--ciuic-device")
    return MemoryPlan(request.node.nodeid, device, request.node.stash[_PLANNED].steps)


class MemoryPlan:
    """The fixture ``memory_plan``."""

    def __init__(self, name: str, device: str | None, steps: list[Step]) -> None:
        self._name = name
        self._device = device
        self._steps = steps

    def __call__(
        self, model: Any, inputs: Any, loss_fn: Callable[..., Any] | None = None, **options: Any
    ) -> Plan:
        """Plan one training step: ``loss_fn(model(x), *rest)`` (docs/cli.md says how inputs are given).

        Args:
            model: an ``nn.Module``; on the meta device it takes no memory.
            inputs: a tensor, a tuple ``(x, *rest)`` or a dict of keyword arguments.
            loss_fn: computes the loss; None: what the model returns is kept until the backward.
            options: docs/options.md, and ``autocast="bfloat16"``; ``device`` overrides ``--ciuic-device``.

        Returns:
            The plan of the step's graph; where it breaks, :meth:`graphs` returns those of all its parts.

        Raises:
            TargetError: the step cannot be planned, or has several graphs.
            OptionError, InfeasibleBudgetError: as torch.compile would.
        """
        from .errors import TargetError

        plans = self.graphs(model, inputs, loss_fn, **options)
        if len(plans) > 1:
            raise TargetError(
                f"the step has {len(plans)} graphs: Dynamo broke it (TORCH_LOGS=graph_breaks says where)\n"
                "  fix: remove the breaks, or call memory_plan.graphs(...), which returns every graph's plan"
            )
        return plans[0]

    def graphs(
        self, model: Any, inputs: Any, loss_fn: Callable[..., Any] | None = None, **options: Any
    ) -> tuple[Plan, ...]:
        """The same for a step of any number of graphs; limits apply to the step as a whole."""
        from .planning import plan

        device = options.pop("device", self._device)
        autocast = options.pop("autocast", None)
        plans = plan(model, inputs, loss_fn, options=options, device=device, autocast=autocast)
        named = {"device": str(device) if device is not None else None, "autocast": autocast}
        self._steps.append(_step(plans, self._name, options, named, model, inputs))
        return plans


def _step(
    plans: Sequence[Plan],
    name: str,
    options: dict[str, Any],
    more: dict[str, Any],
    model: Any = None,
    inputs: Any = (),
) -> Step:
    from .gate.record import record
    from .gate.settings import Entry

    return Step(tuple(plans), record(plans, Entry(name, name, options, **more), model, inputs))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Listen to what the test compiles; hold what was planned against its limits and its baseline."""
    planned = item.stash.get(_PLANNED, None)
    if planned is None:
        return (yield)
    made: list[Plan] = []
    with listening(made.append):
        result = yield
    planned.steps += [_step([plan], item.nodeid, {}, {}) for plan in made]
    over = [line for name, limit in planned.limits.items() for line in _over(name, limit, planned.steps)]
    if planned.limits and not planned.steps:
        over.append(
            f"{', '.join(planned.limits)}: the test planned nothing to hold against the limit\n"
            "  fix: call the fixture memory_plan, or train a model of torch.compile(..., backend='ciuic')"
        )
    over += _regressions(item, planned)
    if over:
        pytest.fail("\n".join(over), pytrace=False)
    return result


def _over(mark: str, limit: int, steps: Sequence[Step]) -> Iterator[str]:
    """What to say of the steps that are over a limit."""
    from .report._format import size

    for step in steps:
        record = step.record
        found = step.vram if mark == "max_vram" else record.saved_bytes
        if found <= limit:
            continue
        parts = (
            f"planned peak {size(record.peak_bytes)} + parameters and inputs {size(record.input_bytes)} = "
            if mark == "max_vram"
            else "saved for the backward: "
        )
        decisions = sorted((d for p in step.plans for d in p.decisions), key=lambda d: -d.saved_bytes)
        largest = "".join(
            f"\n    {size(d.saved_bytes):>8}  {d.codec or d.action.value}  {d.storage.source.where}"
            f"  {d.storage.source.code}"
            for d in decisions[:3]
            if d.saved_bytes
        )
        names = ", ".join(plan.name for plan in step.plans)
        yield (
            f"{mark}: {parts}{size(found)} is over the limit of {size(limit)} by {size(found - limit)} "
            f"({names}, mode {step.plans[0].mode})"
            + (f"\n  largest of what is saved for the backward:{largest}" if largest else "")
        )


# ---------------------------------------------------------------- reports, also from xdist's workers


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    report: pytest.TestReport = yield
    planned = item.stash.get(_PLANNED, None)
    if planned is not None and planned.steps and call.when == "call":
        largest = max(planned.steps, key=lambda step: step.vram)
        report.ciuic_plan = {  # plain data: xdist sends it to the process that reports
            "vram": largest.vram,
            "saved": largest.record.saved_bytes,
            "inductor": largest.record.inductor_peak_bytes + largest.record.input_bytes,
            "mode": largest.plans[0].mode,
            "limit": planned.limits.get("max_vram"),
        }
    return report


class Session:
    """What the reports of a session say of plans."""

    def __init__(self) -> None:
        self.plans: dict[str, dict[str, Any]] = {}
        self.records: dict[str, str] = {}
