"""``ciuic.toml``: which steps are guarded, and how much they may grow."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from ciuic_compile.config import parse_options, parse_size
from ciuic_compile.errors import OptionError, SettingsError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE: Final = "ciuic.toml"
BASELINE: Final = "ciuic-baseline.json"
ENVIRONMENT: Final = ("fail", "warn")
AUTOCAST: Final = ("bfloat16", "float16")
_DURATIONS: Final = {"us": 1.0, "ms": 1e3, "s": 1e6}
_PERCENT: Final = re.compile(r"\s*(\d{1,6}(?:\.\d{1,9})?)\s*%\s*", re.ASCII)
_DURATION: Final = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(us|ms|s)\s*", re.ASCII)


@dataclass(frozen=True)
class Allowance:
    """How much a figure may grow: by a share of it, by a number of units, or by the smaller of the two.

    Attributes:
        share: of the baseline's figure, e.g. 0.01; None: no limit of that kind.
        amount: in the figure's unit; None: no limit of that kind.
    """

    share: float | None = None
    amount: float | None = None

    def of(self, before: float) -> float:
        """What may be added to ``before``, in its unit; infinite where there is no limit."""
        limits = [
            self.share * abs(before) if self.share is not None else math.inf,
            self.amount if self.amount is not None else math.inf,
        ]
        return min(limits)


@dataclass(frozen=True)
class Limits:
    """What makes a check fail.

    Attributes:
        max_increase: of the planned peak, and apart from it of parameters and inputs (bytes).
        min_abs: bytes; an increase below is never a failure.
        hard_limit: bytes that planned peak, parameters and inputs together may have, whatever the baseline.
        max_time_increase: of the estimated extra time a step (microseconds).
        max_error: the most that the estimated relative gradient error may be (dimensionless).
    """

    max_increase: Allowance = Allowance(0.01, 64 * 2**20)
    min_abs: int = 64 * 2**10
    hard_limit: int | None = None
    max_time_increase: Allowance = Allowance()
    max_error: float | None = None


@dataclass(frozen=True)
class Entry:
    """One guarded training step.

    Attributes:
        name: of the baseline's entry.
        target: as ``ciuic plan`` takes it.
        options: of the backend (docs/options.md), mode and budget among them.
        device: profile to plan for; None: that of the tensors.
        autocast: dtype of the autocast context around the step; None: none.
        dynamic: symbolic sizes, as ``torch.compile(dynamic=True)``.
        shape: ``batch``, ``seq``, ``dtype`` and ``checkpointing`` of a Hugging Face target, as far as given.
        line: of ``ciuic.toml``, where the entry begins.
    """

    name: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    autocast: str | None = None
    limits: Limits = Limits()
    dynamic: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0


@dataclass(frozen=True)
class Settings:
    """A whole ``ciuic.toml``.

    Attributes:
        path: the file.
        baseline: the baseline's path.
        environment: what a figure beyond its limit does where torch changed and the code did not.
    """

    path: Path
    entries: tuple[Entry, ...]
    baseline: Path
    environment: str = "fail"

    def chosen(self, names: Iterable[str]) -> tuple[Entry, ...]:
        """The entries of these names; all of them where no name is given.

        Raises:
            SettingsError: no entry has such a name.
        """
        wanted, known = list(dict.fromkeys(names)), {entry.name: entry for entry in self.entries}
        for name in wanted:
            if name not in known:
                raise SettingsError(
                    f"no entry is called {name!r} in {self.path}{nearest(name, known)}\n"
                    f"  valid: {', '.join(map(repr, known)) or 'there are no entries'}"
                )
        return tuple(known[name] for name in wanted) or self.entries


def load(path: Path) -> Settings:
    """Read and check a settings file; nothing is planned.

    Raises:
        SettingsError: names the file, the line and what is valid.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise SettingsError(
            f"{path} does not exist\n  fix: make one of these three lines, or name another with --config:\n"
            '    [[entry]]\n    name = "train"\n    target = "train.py:make_model"'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}\n  fix: correct that place") from error
    return _Reader(path, text).settings(document)


_SHAPE: Final[dict[str, type]] = {"batch": int, "seq": int, "dtype": str, "checkpointing": bool}
_DTYPES: Final = ("float32", "bfloat16", "float16")
_DEFAULTS: Final = {"mode", "budget", "device", "autocast", "dynamic", "options"}
_LIMITS: Final = {f.name for f in fields(Limits)}
_TOP: Final = {"ciuic", "entry"}
_CIUIC: Final = {"baseline", "environment"} | _DEFAULTS | _LIMITS
_ENTRY: Final = {"name", "target"} | _SHAPE.keys() | _DEFAULTS | _LIMITS


@dataclass(frozen=True)
class _Reader:
    """Turns the parsed file into settings; its text is only for the numbers of lines."""

    path: Path
    text: str

    def settings(self, document: Mapping[str, Any]) -> Settings:
        self._keys(document, _TOP, None, "at the top level")
        given, tables = document.get("ciuic", {}), document.get("entry", [])
        if not isinstance(given, dict):
            raise self._wrong("ciuic", None, "is no table", "[ciuic], then its keys below")
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise self._wrong(
                "entry", None, "is no array of tables", "[[entry]] with two brackets, for each step"
            )
        self._keys(given, _CIUIC, "ciuic", "in [ciuic]")
        environment = given.get("environment", "fail")
        if environment not in ENVIRONMENT:
            near = nearest(environment, ENVIRONMENT) if isinstance(environment, str) else ""
            raise self._wrong("environment", "ciuic", f"is {environment!r}{near}", "'fail' or 'warn'")
        baseline = given.get("baseline", BASELINE)
        if not isinstance(baseline, str) or not baseline:
            raise self._wrong("baseline", "ciuic", f"is {baseline!r}", "a path, as seen from this file")
        defaults = self._limits(given, Limits(), "ciuic")
        entries = [self._entry(table, i, given, defaults) for i, table in enumerate(tables)]
        names = [entry.name for entry in entries]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise self._wrong(
                    "name", i, f"{name!r} is taken by another entry", "a name of its own for each"
                )
        if not entries:
            raise SettingsError(f"{self.path} has no [[entry]]\n  valid: at least one, with name and target")
        return Settings(self.path, tuple(entries), self.path.parent / baseline, environment)

    def _entry(self, table: Mapping[str, Any], i: int, given: Mapping[str, Any], limits: Limits) -> Entry:
        self._keys(table, _ENTRY, i, "in [[entry]]")
        for key in ("name", "target"):
            if not isinstance(table.get(key), str) or not table[key].strip():
                what = f"is {table[key]!r}" if key in table else "is missing"
                example = "'train'" if key == "name" else "'train.py:make_model'"
                raise self._wrong(key, i, what, f"a string such as {example}")
        merged = {**{k: v for k, v in given.items() if k in _DEFAULTS - {"options"}}, **table}
        where = {key: i if key in table else "ciuic" for key in _DEFAULTS}
        options: dict[str, Any] = {}
        for source, at in ((given, "ciuic"), (table, i)):
            if not isinstance(source.get("options", {}), dict):
                raise self._wrong("options", at, "is no table", "e.g. options = { deny = 'head' }")
            options |= source.get("options", {})
        for key in ("mode", "budget"):
            if key in merged:
                options[key] = merged[key]
        for key in ("device", "autocast"):
            if key in merged and not isinstance(merged[key], str):
                raise self._wrong(key, where[key], f"is {merged[key]!r}", "a string")
        if merged.get("autocast") not in (None, *AUTOCAST):
            raise self._wrong(
                "autocast", where["autocast"], f"is {merged['autocast']!r}", "'bfloat16' or 'float16'"
            )
        if not isinstance(merged.get("dynamic", False), bool):
            raise self._wrong("dynamic", where["dynamic"], f"is {merged['dynamic']!r}", "true or false")
        shape = {key: table[key] for key in _SHAPE if key in table}
        for key, value in shape.items():
            if type(value) is not _SHAPE[key] or (
                isinstance(value, int) and value < 1 and value is not False
            ):
                valid = {int: "a whole number above 0", str: "a string", bool: "true or false"}[_SHAPE[key]]
                raise self._wrong(key, i, f"is {value!r}", valid)
        if shape.get("dtype", _DTYPES[0]) not in _DTYPES:
            near = nearest(shape["dtype"], _DTYPES)
            raise self._wrong("dtype", i, f"is {shape['dtype']!r}{near}", ", ".join(map(repr, _DTYPES)))
        for key in ("report", "device"):
            if key in options:
                fix = (
                    "write device = '...' beside options"
                    if key == "device"
                    else "leave it out: --format says it"
                )
                raise self._wrong("options", where["options"], f"has {key!r}", fix)
        self._check_options(
            {**options, **({"device": merged["device"]} if "device" in merged else {})}, where
        )
        return Entry(
            name=table["name"],
            target=table["target"],
            options=options,
            device=merged.get("device"),
            autocast=merged.get("autocast"),
            limits=self._limits(table, limits, i),
            dynamic=merged.get("dynamic", False),
            shape=shape,
            line=self._line("name", i),
        )

    def _check_options(self, options: Mapping[str, Any], where: Mapping[str, str | int]) -> None:
        try:
            parse_options(options)
        except OptionError as error:
            named = (key for key in ("mode", "budget", "device") if f"option {key!r}" in str(error))
            key = next(named, "options")
            raise SettingsError(f"{self.path}:{self._line(key, where[key])}: {error}") from error

    def _limits(self, table: Mapping[str, Any], limits: Limits, at: str | int) -> Limits:
        values: dict[str, Any] = {}
        for key in _LIMITS & table.keys():
            value = table[key]
            if key in ("min_abs", "hard_limit"):
                values[key] = self._size(key, value, at)
            elif key == "max_error":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                    raise self._wrong(key, at, f"is {value!r}", "a number above 0, e.g. 0.05 for 5%")
                values[key] = float(value)
            else:
                values[key] = self._allowance(key, value, at)
        return replace(limits, **values)

    def _allowance(self, key: str, value: Any, at: str | int) -> Allowance:
        parts, share, amount = value if isinstance(value, list) else [value], None, None
        for part in parts:
            if isinstance(part, str) and (match := _PERCENT.fullmatch(part)):
                share = float(match[1]) / 100
            elif key == "max_time_increase":
                match = _DURATION.fullmatch(part) if isinstance(part, str) else None
                if match is None:
                    raise self._wrong(key, at, f"is {part!r}", "such as '5%' or '2 ms', or a list of both")
                amount = float(match[1]) * _DURATIONS[match[2]]
            else:
                amount = float(self._size(key, part, at, "such as '2%' or '64 MiB', or a list of both"))
        if not parts or len(parts) > 2 or (len(parts) == 2 and (share is None or amount is None)):
            raise self._wrong(
                key, at, f"is {value!r}", "one share in percent, one amount, or a list of the two"
            )
        return Allowance(share, amount)

    def _size(self, key: str, value: Any, at: str | int, valid: str = "bytes, or e.g. '12 GiB'") -> int:
        try:
            return parse_size(key, value)
        except OptionError as error:
            raise self._wrong(key, at, f"is {value!r}", valid) from error

    def _keys(self, table: Mapping[str, Any], valid: set[str], at: str | int | None, where: str) -> None:
        for key in table:
            if key not in valid:
                raise self._wrong(
                    key, at, f"is no key {where}{nearest(key, valid)}", ", ".join(sorted(valid)), quoted=True
                )

    def _wrong(
        self, key: str, at: str | int | None, what: str, valid: str, *, quoted: bool = False
    ) -> SettingsError:
        line = self._line(key, at)
        place = f"{self.path}:{line}" if line else str(self.path)
        return SettingsError(f"{place}: {repr(key) if quoted else key} {what}\n  valid: {valid}")

    def _line(self, key: str, at: str | int | None) -> int:
        """The line of a key in a table ("ciuic", or the entry of that number), or the table's own."""
        entry = r"\[\[\s*entry\s*\]\]"
        header = None if at is None else r"\[\s*ciuic\s*\]" if at == "ciuic" else entry
        lines, start, seen = self.text.splitlines(), 0, -1
        if header is not None:
            for number, line in enumerate(lines, 1):
                if re.match(rf"\s*{header}", line):
                    seen += 1
                    if seen == (at if isinstance(at, int) else 0):
                        start = number
                        break
            else:
                return 0
        for number, line in enumerate(lines[start:], start + 1):
            if header is not None and re.match(r"\s*\[{1,2}\s*(?:ciuic|entry)\s*\]", line):
                break
            if re.match(rf"\s*\[?\[?\s*[\"']?{re.escape(key)}[\"']?\s*[=\].]", line):
                return number
        return start
