"""Whether a planned step is as its baseline allows, and what to say when it is not."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ciuic_compile.cli import exit_codes
from ciuic_compile.gate.baseline import Accepted
from ciuic_compile.gate.culprits import Culprit, find, summary
from ciuic_compile.gate.record import Record
from ciuic_compile.gate.settings import Entry, Limits
from ciuic_compile.gate.source_lines import digest
from ciuic_compile.report._format import duration, percent, size


class Status(str, Enum):
    """How a check ended."""

    PASS = "pass"
    IMPROVED = "improved"  # passes, and could be lowered
    REGRESSION = "regression"
    ENVIRONMENT = "environment"  # beyond a limit, by another torch and not by the user's code
    MISSING = "missing"  # no baseline for this entry
    INCOMPATIBLE = "incompatible"  # the baseline is of another model or device
    INFEASIBLE = "infeasible"
    ERROR = "error"  # the target cannot be planned


#: Exit status of each; a whole run has that of the first of ``SEVEREST`` that occurs.
EXIT = {
    Status.PASS: exit_codes.PASS,
    Status.IMPROVED: exit_codes.PASS,
    Status.REGRESSION: exit_codes.REGRESSION,
    Status.ENVIRONMENT: exit_codes.BASELINE,
    Status.MISSING: exit_codes.BASELINE,
    Status.INCOMPATIBLE: exit_codes.BASELINE,
    Status.INFEASIBLE: exit_codes.INFEASIBLE,
    Status.ERROR: exit_codes.USAGE,
}
SEVEREST = (exit_codes.USAGE, exit_codes.INFEASIBLE, exit_codes.REGRESSION, exit_codes.BASELINE)


_NONE = Limits()


@dataclass(frozen=True)
class Measure:
    """One figure before and now.

    Attributes:
        name: as people read it, e.g. ``"peak"``.
        unit: ``"bytes"``, ``"us"``, ``"fraction"`` or ``""``, a number.
        before: None: there is no baseline.
        limit: the most that it may be now; None: it is not limited.
    """

    name: str
    unit: str
    before: float | None
    now: float
    limit: float | None = None

    @property
    def exceeded(self) -> bool:
        """Whether it is over its limit."""
        return self.limit is not None and self.now > self.limit

    @property
    def words(self) -> str:
        """``12.0 MiB -> 14.0 MiB (+2.00 MiB, +17%)``."""
        if self.before is None:
            return self.figure(self.now)
        if self.before == self.now:
            return f"{self.figure(self.now)} (unchanged)"
        difference = self.now - self.before
        share = (
            f", {'+' if difference > 0 else ''}{percent(difference / abs(self.before))}"
            if self.before
            else ""
        )
        sign = "+" if difference > 0 and not self.figure(difference).startswith("+") else ""
        return (
            f"{self.figure(self.before)} -> {self.figure(self.now)} ({sign}{self.figure(difference)}{share})"
        )

    def figure(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "bytes":
            return size(int(value))
        if self.unit == "us":
            return duration(value)
        return percent(value) if self.unit == "fraction" else f"{value:g}"


@dataclass(frozen=True)
class Check:
    """One entry's verdict.

    Attributes:
        title: one sentence on what happened.
        details: more sentences.
        culprits: likeliest first.
        fix: what to do about it.
        line: of ``ciuic.toml``, where the entry begins.
    """

    name: str
    status: Status
    title: str
    measures: tuple[Measure, ...] = ()
    details: tuple[str, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    fix: str = ""
    settings_file: str = ""
    line: int = 0

    @property
    def failed(self) -> bool:
        """Whether it makes the run fail."""
        return self.exit_code != exit_codes.PASS

    @property
    def exit_code(self) -> int:
        """The exit status that this entry alone would have."""
        return EXIT[self.status]


def exit_code(checks: Sequence[Check]) -> int:
    """The exit status of a run: that of what must be mended first."""
    codes = {check.exit_code for check in checks}
    return next((code for code in SEVEREST if code in codes), exit_codes.PASS)


def check(
    entry: Entry,
    now: Record,
    accepted: Accepted | None,
    *,
    environment: str = "fail",
    settings_file: str = "ciuic.toml",
) -> Check:
    """Compare a planned step with what was accepted.

    Args:
        environment: ``"fail"`` or ``"warn"``: what a figure beyond its limit does where versions changed and
            the user's code did not.
        settings_file: what the verdict calls the file that the entry is in.
    """
    before = accepted.record if accepted else None
    measures = measure(now, before, entry.limits)
    accept = f"ciuic accept {shlex.quote(entry.name)} -m"
    too_much = _too_much(now, entry.limits)
    if before is None:
        status = Status.REGRESSION if too_much else Status.MISSING
        title = too_much or "no baseline: it was never accepted"
        found = Check(entry.name, status, title, measures, fix=f"to accept it as it is: {accept} 'why'")
    elif why := incompatible(before, now):
        fix = f"to begin anew with this one: {accept} 'why'"
        found = Check(entry.name, Status.INCOMPATIBLE, why, measures, fix=fix)
    else:
        settings = _settings_changed(before, now)
        place = f"{settings_file}:{entry.line}"
        details = [f"settings of the entry changed ({place}): {settings}"] if settings else []
        found = Check(entry.name, Status.PASS, "", measures, (*details, *summary(before, now)))
        over = [f"{m.name} {m.words}, limit {m.figure(m.limit or 0)}" for m in measures if m.exceeded]
        if over or too_much:
            found = replace(found, title="; ".join(filter(None, [too_much, *over])))
            # a limit that does not depend on the baseline holds whatever the versions
            fixed = bool(too_much) or any(m.exceeded for m in measures if m.unit == "fraction")
            found = _failed(found, before, now, accept, bool(over), fixed, environment)
            if settings and found.status is Status.REGRESSION:
                first = Culprit(settings_file, entry.line, "", 0, changed=True, why=(f"changed: {settings}",))
                found = replace(found, culprits=(first, *found.culprits[:4]))
        else:
            found = _passed(found, before, now, accept, entry.limits)
    return replace(found, settings_file=settings_file, line=entry.line)


def _failed(
    found: Check, before: Record, now: Record, accept: str, grew: bool, fixed: bool, environment: str
) -> Check:
    """A check over its limits: whether code or versions are to blame, which lines, and what to do."""
    versions = _versions_changed(before, now)
    if not grew:
        fix = "raise hard_limit of this entry, or make the step smaller"
        return replace(found, status=Status.REGRESSION, fix=fix)
    same_code = digest(before.files) == digest(now.files) and before.settings == now.settings
    if versions and same_code and not fixed:
        return replace(
            found,
            status=Status.ENVIRONMENT if environment == "fail" else Status.PASS,
            details=(f"{versions}; no line of your code did ({_files(now)})", *found.details),
            fix=f"look at the change, then accept it for the new version: {accept} '{versions}'",
        )
    if versions and not same_code:
        both = f"{versions}, and your code as well: check with the old version to tell them apart"
        found = replace(found, details=(both, *found.details))
    fix = f"if this is meant: {accept} 'why'"
    return replace(found, status=Status.REGRESSION, culprits=find(before, now), fix=fix)


def _files(record: Record) -> str:
    """Which files were compared: what a program reads besides is not known."""
    names = [*record.files]
    return (
        ", ".join(names[:4]) + (f" and {len(names) - 4} more files" if names[4:] else "")
        or "no file is known"
    )


def _passed(found: Check, before: Record, now: Record, accept: str, limits: Limits) -> Check:
    gain = before.peak_bytes - now.peak_bytes
    improved = gain > max(limits.max_increase.of(before.peak_bytes), limits.min_abs)
    versions = _versions_changed(before, now)
    return replace(
        found,
        status=Status.IMPROVED if improved else Status.PASS,
        title=f"peak {found.measures[0].words}",
        details=(*found.details, *([f"{versions}, and the figures hold"] if versions else [])),
        fix=f"to hold the gain: {accept} 'why'" if improved else "",
    )


def measure(now: Record, before: Record | None, limits: Limits = _NONE) -> tuple[Measure, ...]:
    """The figures of a record beside those of a baseline, with what they may be."""

    def grow(name: str, old: int | None, new: int) -> Measure:
        limit = None if old is None else old + max(limits.max_increase.of(old), limits.min_abs)
        return Measure(name, "bytes", old, new, limit)

    old = before
    time = None
    if old is not None and (limits.max_time_increase.share, limits.max_time_increase.amount) != (None, None):
        time = old.time_us + limits.max_time_increase.of(old.time_us)
    return (
        grow("peak", old.peak_bytes if old else None, now.peak_bytes),
        grow("parameters and inputs", old.input_bytes if old else None, now.input_bytes),
        Measure("saved", "bytes", old.saved_bytes if old else None, now.saved_bytes),
        Measure(
            "peak by Inductor", "bytes", old.inductor_peak_bytes if old else None, now.inductor_peak_bytes
        ),
        Measure("time", "us", old.time_us if old else None, now.time_us, time),
        Measure("gradient error", "fraction", old.error if old else None, now.error, limits.max_error),
        # what runs between compiled graphs is neither planned nor counted: more of it is never an improvement
        Measure("compiled graphs", "", old.graphs if old else None, now.graphs, old.graphs if old else None),
    )


def incompatible(before: Record, now: Record) -> str:
    """Why a baseline cannot be compared with; empty where it can."""
    if before.target != now.target:
        return f"the baseline is of another target: {before.target!r}, and this entry's is {now.target!r}"
    if before.settings.get("device") != now.settings.get("device"):
        old, new = before.settings.get("device"), now.settings.get("device")
        return f"the baseline is of another device: {old!r}, and this entry's is {new!r}"
    shapes = [{(f.dtype, f.shape) for f in r.parameters} for r in (before, now)]
    names = [{f.name for f in r.parameters} for r in (before, now)]
    codes = [{r.place.code for r in record.rows} for record in (before, now)]
    pairs = (shapes, names, codes)
    if all(a and b for a, b in pairs[:1]) and not any(a & b for a, b in pairs):
        return "the baseline is of another model: no parameter and no line of the program is the same"
    return ""


def _too_much(now: Record, limits: Limits) -> str:
    if limits.hard_limit is None or now.total_bytes <= limits.hard_limit:
        return ""
    parts = f"peak {size(now.peak_bytes)} and parameters and inputs {size(now.input_bytes)}"
    return f"{parts} are {size(now.total_bytes)} together, over the hard limit of {size(limits.hard_limit)}"


def _versions_changed(before: Record, now: Record) -> str:
    old, new = before.environment, now.environment
    names = [
        n for n in (*old, *(n for n in new if n not in old)) if n != "python" and old.get(n) != new.get(n)
    ]
    return ", ".join(f"{n} {old.get(n, 'none')} -> {new.get(n, 'none')}" for n in names)


def _settings_changed(before: Record, now: Record) -> str:
    old = {**before.settings, **before.settings.get("options", {})}
    new = {**now.settings, **now.settings.get("options", {})}
    names = sorted(({*old} | {*new}) - {"options", "device"})
    return ", ".join(f"{n} {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n))
