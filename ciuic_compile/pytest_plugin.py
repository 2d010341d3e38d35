"""pytest plugin: limits on planned memory as marks, plans as a fixture (docs/testing.md).

pytest imports it wherever ciuic-compile is installed, so torch is imported only for tests that plan.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .announcing import listening
from .errors import CiuicError, TargetError

if TYPE_CHECKING:
    from .gate.baseline import Baseline
    from .gate.record import Record
    from .gate.settings import Entry
    from .types import Plan

_MARKS: Final = {
    "max_vram": "planned peak of a step, parameters and inputs included,",
    "max_saved": "bytes that a step saves between forward and backward",
}
_SHOWN: Final = 5  # plans in the terminal section
_UPDATE: Final = "--ciuic-update-baseline"


@dataclass(frozen=True)
class Step:
    """What was planned at one time: a graph of torch.compile, or all graphs of a ``memory_plan``."""

    plans: tuple[Plan, ...]
    entry: Entry
    record: Record


@dataclass
class Planned:
    """What a test planned, and its limits in bytes by mark, which are known when it has run."""

    steps: list[Step] = field(default_factory=list)
    limits: Mapping[str, int] = field(default_factory=dict)


_PLANNED: Final = pytest.StashKey[Planned]()
_BASELINE: Final = pytest.StashKey["Baseline"]()


# ---------------------------------------------------------------- options and marks


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command line options and the ini setting."""
    group = parser.getgroup("ciuic", "planned GPU memory (ciuic-compile)")
    group.addoption(
        "--ciuic-device", metavar="NAME", help="what memory_plan plans for, e.g. h200; none is needed"
    )
    group.addoption(
        _UPDATE,
        action="store_true",
        help="write what the tests plan into the baseline, instead of comparing it with what is there",
    )
    parser.addini(
        "ciuic_baseline", "file with the accepted plans of tests", default="ciuic-tests-baseline.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks and check the options."""
    for name, what in _MARKS.items():
        config.addinivalue_line("markers", f"{name}(size): fail if the {what} is above that, e.g. '10 GiB'")
    if (device := config.getoption("--ciuic-device")) is not None:
        from .config import parse_options

        try:
            parse_options({"device": device})
        except CiuicError as error:
            raise pytest.UsageError(f"--ciuic-device: {error}") from None
    config.pluginmanager.register(_Summary(config), "ciuic-summary")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check the marks of all tests, and the baseline if one needs it, before the first one runs."""
    guarded = [_limits(item) or "memory_plan" in getattr(item, "fixturenames", ()) for item in items]
    if any(guarded):
        _accepted(config)


def _limits(item: pytest.Item) -> dict[str, int]:
    """The bytes of each mark that a test has at this moment: fixtures and the test itself may add some."""
    return {name: _limit(item, mark) for name in _MARKS if (mark := item.get_closest_marker(name))}


def _accepted(config: pytest.Config) -> Baseline:
    """The baseline, read once; an empty one where there is no file."""
    if _BASELINE not in config.stash:
        from .gate import baseline

        try:
            config.stash[_BASELINE] = baseline.load_if_there(_baseline_path(config))
        except CiuicError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[_BASELINE]


def _limit(item: pytest.Item, mark: pytest.Mark) -> int:
    """The bytes that a mark gives."""
    from .config import parse_size

    where = f"{item.location[0]}:{(item.location[1] or 0) + 1}: {item.name}: @pytest.mark.{mark.name}"
    if len(mark.args) != 1 or mark.kwargs:
        given = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
        raise pytest.UsageError(
            f"{where}({given}): one size is needed\n"
            "  valid: bytes, or a string such as '10 GiB' or '800 MB'\n"
            f"  fix: write e.g. @pytest.mark.{mark.name}('10 GiB')"
        )
    try:
        return parse_size(mark.name, mark.args[0])
    except CiuicError as error:
        raise pytest.UsageError(f"{where}: {error}") from None


def _baseline_path(config: pytest.Config) -> Path:
    return config.rootpath / str(config.getini("ciuic_baseline"))


# ---------------------------------------------------------------- while a test runs


class MemoryPlan:
    """The fixture ``memory_plan``: plans a training step without weights, GPU or execution."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def __call__(
        self, model: Any, inputs: Any, loss_fn: Callable[..., Any] | None = None, **options: Any
    ) -> Plan:
        """Plan the step ``loss_fn(model(x), *rest)``.

        Args:
            model: an ``nn.Module``; on the meta device it takes no memory.
            inputs: a tensor, a tuple ``(x, *rest)``, or a dict of keyword arguments.
            loss_fn: computes the loss; None: all that the model returns is kept until the backward.
            options: docs/options.md, and ``autocast``; ``device`` is that of ``--ciuic-device`` if not given.

        Raises:
            TargetError: the step cannot be planned, or has several graphs.
            OptionError: a wrong option.
            InfeasibleBudgetError: no plan fits ``budget``.
        """
        plans = self.graphs(model, inputs, loss_fn, **options)
        if len(plans) > 1:
            raise TargetError(
                f"the step has {len(plans)} graphs: Dynamo broke it (TORCH_LOGS=graph_breaks says where)\n"
                "  fix: remove the breaks, or use memory_plan.graphs(...), which returns the plan of each"
            )
        return plans[0]

    def graphs(
        self, model: Any, inputs: Any, loss_fn: Callable[..., Any] | None = None, **options: Any
    ) -> tuple[Plan, ...]:
        """The same for a step of any number of graphs; limits hold for the step as a whole."""
        from .planning import plan

        device = options.pop("device", self._item.config.getoption("--ciuic-device"))
        autocast = options.pop("autocast", None)
        plans = plan(model, inputs, loss_fn, options=options, device=device, autocast=autocast)
        settings = {"options": options, "device": getattr(device, "name", device), "autocast": autocast}
        planned = self._item.stash.setdefault(_PLANNED, Planned())
        planned.steps.append(_step(self._item, len(planned.steps) + 1, plans, settings, model, inputs))
        return plans


@pytest.fixture
def memory_plan(request: pytest.FixtureRequest) -> MemoryPlan:
    """``memory_plan(model, inputs, loss_fn=None, **options) -> Plan``: plan a step, without a GPU."""
    return MemoryPlan(request.node)


def _step(
    item: pytest.Item,
    number: int,
    plans: Sequence[Plan],
    settings: dict[str, Any],
    model: Any = None,
    inputs: Any = (),
) -> Step:
    from .gate.record import record
    from .gate.settings import Entry

    name = item.nodeid if number == 1 else f"{item.nodeid} #{number}"
    entry = Entry(name, f"{item.location[0]}:{item.location[2]}", **settings)
    root = item.config.rootpath
    fixtures = [folder / "conftest.py" for folder in item.path.parents if folder.is_relative_to(root)]
    return Step(tuple(plans), entry, record(plans, entry, model, inputs, root, also=fixtures))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Listen to what a test compiles, and hold what it planned against its limits and its baseline."""
    made: list[Plan] = []
    marked = any(item.get_closest_marker(name) for name in _MARKS)
    if marked and (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()  # a graph that an earlier test compiled would not be planned again
    with listening(made.append):
        result = yield
    try:
        problems = list(_judged(item, made))
    except pytest.UsageError as error:  # a mark that was added after the tests were collected
        problems = [str(error)]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    return result


def _judged(item: pytest.Item, made: Sequence[Plan]) -> Iterator[str]:
    """What is wrong with a test that has run, by the marks and the fixture that it has by now."""
    limits = _limits(item)
    if not limits and "memory_plan" not in getattr(item, "fixturenames", ()) and _PLANNED not in item.stash:
        return
    planned = item.stash.setdefault(_PLANNED, Planned())
    planned.limits = limits
    for plan in made:
        settings = {"options": {"mode": plan.mode}}
        planned.steps.append(_step(item, len(planned.steps) + 1, [plan], settings))
    yield from _problems(item, planned)


def _problems(item: pytest.Item, planned: Planned) -> Iterator[str]:
    if planned.limits and not planned.steps:
        yield (
            f"{', '.join(planned.limits)}: the test planned nothing that could be held against it\n"
            "  fix: use the fixture memory_plan, or train what torch.compile(..., backend='ciuic') returned"
        )
    for step in planned.steps:
        for name, limit in planned.limits.items():
            yield from _over(name, limit, step)
    if not planned.steps or item.config.getoption(_UPDATE):
        return
    from .gate.compare import check

    accepted = _accepted(item.config)
    for step in planned.steps:
        if (before := accepted.entries.get(step.entry.name)) is not None:
            found = check(step.entry, step.record, before)
            if found.failed:
                suspects = [f"  {c.where}: {c.code} ({', '.join(c.why)})" for c in found.culprits[:3]]
                fix = f"  fix: if this is meant, run this test with {_UPDATE}, and commit the file"
                yield "\n".join(
                    [f"baseline: {found.title}", *(f"  {d}" for d in found.details), *suspects, fix]
                )


def _over(mark: str, limit: int, step: Step) -> Iterator[str]:
    """What to say where a step is over the limit of a mark."""
    from .report._format import size

    record = step.record
    total, parts = record.saved_bytes, "saved for the backward"
    if mark == "max_vram":
        total = record.total_bytes
        parts = f"planned peak {size(record.peak_bytes)} and parameters and inputs {size(record.input_bytes)}"
    if total <= limit:
        return
    names = ", ".join(plan.name for plan in step.plans)
    yield f"{mark}: {size(total)}, {size(total - limit)} over {size(limit)}: {parts} ({names})"
    kept = sorted((d for p in step.plans for d in p.decisions), key=lambda d: d.saved_bytes, reverse=True)
    for d in kept[:3]:
        if d.saved_bytes:
            source, kind = d.storage.source, d.codec or d.storage.dtype
            yield f"  saved: {size(d.saved_bytes)} as {kind}, {source.where}: {source.code}"


# ---------------------------------------------------------------- after a test, and after all of them


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """Put the plans into the report of a test: plain data, which xdist sends to where reports are shown."""
    report = yield
    planned = item.stash.get(_PLANNED, None)
    if planned is not None and planned.steps and call.when == "call":
        records = [(step.record.total_bytes, step.record) for step in planned.steps]
        total, record = max(records, key=lambda pair: pair[0])
        report.ciuic_plan = {
            "test": item.nodeid,
            "total": total,
            "saved": record.saved_bytes,
            "inductor": record.inductor_peak_bytes + record.input_bytes,
            "limit": planned.limits.get("max_vram"),
        }
        if item.config.getoption(_UPDATE) and report.passed:
            from .gate import baseline

            accepted = baseline.Baseline()
            for step in planned.steps:
                accepted = accepted.accept(step.entry.name, step.record, f"pytest {_UPDATE}", _today())
            report.ciuic_records = baseline.dumps(accepted)
    return report


class _Summary:
    """Collects the plans of all reports; one in each process, of which one shows them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._plans: list[dict[str, Any]] = []
        self._records: dict[str, str] = {}
        self._updated = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (plan := getattr(report, "ciuic_plan", None)) is not None:
            self._plans.append(plan)
        if (records := getattr(report, "ciuic_records", None)) is not None:
            self._records[report.nodeid] = records

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Update the baseline; where that fails, so does the session."""
        if not self._records or hasattr(
            self._config, "workerinput"
        ):  # xdist's workers report to another process
            return
        try:
            self._updated = self._update()
        except CiuicError as error:
            self._updated = f"ERROR: the baseline is as it was: {error}"
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show the biggest plans, and what became of the baseline."""
        if not self._plans:
            return
        from .report._format import size

        terminalreporter.section("planned GPU memory (ciuic)")
        plans = sorted(self._plans, key=lambda p: (-p["total"], p["test"]))
        for p in plans[:_SHOWN]:
            of = f" of {size(p['limit'])}" if p["limit"] is not None else ""
            terminalreporter.line(
                f"{size(p['total']):>8}{of}, {size(p['saved'])} saved; "
                f"by Inductor {size(p['inductor'])}  {p['test']}"
            )
        if len(plans) > _SHOWN:
            terminalreporter.line(f"and {len(plans) - _SHOWN} smaller ones")
        if self._updated:
            terminalreporter.line(self._updated, red=self._updated.startswith("ERROR"))

    def _update(self) -> str:
        """Write the records into the baseline; entries of tests that did not run stay."""
        from .gate import baseline

        path = _baseline_path(self._config)
        accepted = baseline.load_if_there(path)
        count = 0
        for text in self._records.values():
            for name, entry in baseline.loads(text).entries.items():
                accepted = accepted.accept(
                    name, entry.record, entry.history[-1].reason, entry.history[-1].date
                )
                count += 1
        baseline.save(accepted, path)
        return f"baseline: {count} {'entry' if count == 1 else 'entries'} written to {path.name}"


def _today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
