"""Options: what the user asked for, checked before any work, as one frozen object.

``parse_options`` takes the two keyword arguments that ``torch.compile`` hands to a backend and returns a
:class:`CompileConfig`, or raises :class:`~ciuic_compile.errors.OptionError`. docs/options.md lists them all.
"""

from __future__ import annotations

import fnmatch
import fractions
import json
import math
import numbers
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from ciuic_compile import calibration, devices
from ciuic_compile.errors import OptionError, nearest

INDUCTOR_MODES: Final = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GROUP_SIZES: Final = (32, 64, 128)
REPORT_WORDS: Final = ("short", "full", "off")
REPORT_SUFFIXES: Final = (".json", ".html", ".txt", ".md", ".pickle", ".perfetto.json", ".trace.json")
_UNITS: Final = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgtp", 1)
    for infix, base in (("", 1000), ("i", 1024))
}
_MODE_VALID: Final = "'R:1' with R >= 1 (such as '4:1' or '2.5:1'), 'lossless', 'off'"
_SIZE_VALID: Final = "a whole number of bytes, or a string such as '12GiB', '800MB', '1.5 GiB'"
_RESERVED: Final = {
    "custom_partitioner_fn": "ciuic installs its own partitioner there; use backend='inductor' to run yours",
}
_HINTS: Final = {
    "activation_memory_budget": "that is torch's, a fraction; here use 'budget', in bytes",
    "memory_budget": "use 'budget', in bytes",
    "ratio": "use 'mode', e.g. mode='4:1'",
    "lossless": "use mode='lossless'",
    "backend": "backend is an argument of torch.compile, not one of its options",
    "dynamic": "dynamic is an argument of torch.compile, not one of its options",
    "fullgraph": "fullgraph is an argument of torch.compile, not one of its options",
}


@dataclass(frozen=True)
class CompileConfig:
    """Checked options. Make one with :func:`parse_options`; the constructor itself checks nothing.

    Attributes:
        mode: ``"R:1"`` (R as written, without trailing zeros), ``"lossless"`` or ``"off"``.
        budget: bytes that the planned peak of each graph must fit in; None for no limit.
        max_error: cap on the estimated relative gradient error (dimensionless); None for no cap.
        plan_seconds: how long planning one graph under a budget may take; then the best plan so far is taken.
        device: profile of the device to plan for; None: the one that the tensors are on.
        calibration: measured error coefficients of the model; None: guessed from shapes.
        report: ``"short"``, ``"full"``, ``"off"``, or an absolute path with one of ``REPORT_SUFFIXES``.
        allow: patterns; when not empty only what one of them matches may be compressed.
        deny: patterns; what one of them matches is never compressed.
        min_bytes: storages smaller than this many bytes are never compressed.
        group_size: elements that share one scale in the group codecs.
        chunk_loss: whether logits and loss are computed some tokens at a time; ``"auto"``: where it pays.
        loss_chunk_bytes: float32 logits that one chunk may have, in bytes; None: as the device suggests.
        chunk_ffn: whether feed-forwards are computed some tokens at a time; ``"auto"``: where it pays.
        inductor_mode: the Inductor mode in force, ``"default"`` when none was given.
        inductor_explicit: Inductor options the user wrote, by their full names.
    """

    mode: str = "4:1"
    budget: int | None = None
    max_error: float | None = None
    plan_seconds: float = 10.0
    device: devices.DeviceProfile | None = None
    calibration: calibration.Calibration | None = field(default=None, hash=False)
    report: str = "short"
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    min_bytes: int = 16 * 1024
    group_size: int = 64
    chunk_loss: bool | str = "auto"
    loss_chunk_bytes: int | None = None
    chunk_ffn: bool | str = "auto"
    inductor_mode: str = "default"
    inductor_explicit: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def ratio(self) -> float | None:
        """R of mode ``"R:1"``; None for ``"lossless"`` and ``"off"``."""
        return float(self.mode[:-2]) if self.mode.endswith(":1") else None

    @property
    def lossy(self) -> bool:
        """Whether lossy codecs may be used at all: any ``"R:1"`` mode."""
        return self.ratio is not None

    @property
    def shrinks(self) -> bool:
        """Whether the mode asks for fewer saved bytes than Inductor's; if not, only a budget does."""
        return self.ratio is not None and self.ratio > 1

    @property
    def inductor_options(self) -> dict[str, Any]:
        """What to pass to Inductor as ``config_patches``: the mode's options under the explicit ones."""
        if self.inductor_mode == "default":
            return dict(self.inductor_explicit)
        from torch._inductor import list_mode_options

        return {**list_mode_options(self.inductor_mode), **self.inductor_explicit}

    def excluded_because(self, module: str, op: str) -> str | None:
        """Why ``allow``/``deny`` forbid compressing what ``op`` made in ``module``; None when they don't."""
        for pattern in self.deny:
            if _matches(pattern, module, op):
                return f"deny: {pattern!r}"
        if self.allow and not any(_matches(pattern, module, op) for pattern in self.allow):
            return "not in allow"
        return None

    def unmatched(self, made: Iterable[tuple[str, str]]) -> list[str]:
        """Patterns of ``allow`` and ``deny`` that match none of these (module, op) pairs."""
        pairs = sorted(set(made))
        return [p for p in (*self.allow, *self.deny) if not any(_matches(p, *pair) for pair in pairs)]

    def fingerprint(self) -> str:
        """Canonical JSON of everything that can change a plan or the compiled code: all but ``report``.

        Equal in every process for equal options, so it can go into a cache key. An option that is an object
        counts by its ``uuid()`` when it has one, else by its qualified name; torch's own key covers the rest.
        """
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("report", "inductor_explicit")
        }
        values["inductor_options"] = self.inductor_options
        values["schema"] = "ciuic.config/1"
        return json.dumps(_canonical(values), sort_keys=True, separators=(",", ":"))


OPTION_NAMES: Final = tuple(f.name for f in fields(CompileConfig) if f.name != "inductor_explicit")


def parse_options(
    options: Mapping[str, Any] | None, mode: str | None = None, *, base: CompileConfig | None = None
) -> CompileConfig:
    """Check what the user wrote and return it as a :class:`CompileConfig`.

    Args:
        options: ``torch.compile(options=...)``: ours, and any option of ``torch._inductor.config``.
        mode: ``torch.compile(mode=...)``: an Inductor mode or, as a convenience, one of ours ("4:1").
        base: where options that are not given come from (``default_config()``); ours when None.

    Raises:
        OptionError: unknown name, wrong value or contradiction; nothing has been done by then.
    """
    if options is not None and not isinstance(options, Mapping):
        raise _wrong(
            "options", options, "a dict such as {'mode': '4:1'}", "pass options={...} or leave it out"
        )
    given = _with_mode(dict(options or {}), mode)
    config = base or CompileConfig()
    values: dict[str, Any] = {}
    explicit: dict[str, Any] = {}
    for name, value in given.items():
        if name in _PARSERS:
            values[name] = _PARSERS[name](name, value)
        else:
            key, checked = _inductor_option(name, value)
            if key in explicit:
                raise _wrong(
                    str(name), value, "each Inductor option once", f"{key!r} was given in two spellings"
                )
            explicit[key] = checked
    if values.get("mode") == "off":
        values.setdefault("budget", None)  # a budget of the base does not bind a model switched off
    config = replace(config, **values, inductor_explicit={**config.inductor_explicit, **explicit})
    if config.mode == "off" and config.budget is not None:
        valid = "no budget with mode 'off', which compresses nothing and so cannot make anything fit"
        raise _wrong("budget", given["budget"], valid, "leave budget out, or use mode 'lossless' or '4:1'")
    both = sorted(set(config.allow) & set(config.deny))
    if both:
        raise _wrong(
            "allow", both[0], "patterns that are not also in deny", f"take {both[0]!r} out of one of the two"
        )
    return config


_default: CompileConfig = CompileConfig()


def default_config() -> CompileConfig:
    """Return the process-wide defaults; pass them as ``parse_options(..., base=default_config())``."""
    return _default


def set_default_config(
    options: CompileConfig | Mapping[str, Any] | None = None, mode: str | None = None
) -> CompileConfig:
    """Set the process-wide defaults, checked as ``parse_options`` does, and return them; no argument resets.

    Raises:
        OptionError: as :func:`parse_options`; the defaults are then unchanged.
    """
    global _default
    _default = options if isinstance(options, CompileConfig) else parse_options(options, mode)
    return _default


def parse_size(option: str, value: Any) -> int:
    """Return ``value`` in bytes: an int, or a string with a unit (KB, ...: powers of 1000; KiB, ...: 1024).

    Raises:
        OptionError: anything else, and negative numbers; ``option`` is the name to say it of.
    """
    size: int | None = None
    fix = "write e.g. 12884901888 or '12GiB'"
    if (whole := _integer(value)) is not None:
        size = whole
    elif isinstance(value, float) and 0 <= value <= 1:
        fix += "; this is bytes, not torch's fraction"
    elif isinstance(value, float) and math.isfinite(value) and value > 1:
        fix = f"write {int(value)} or a string with a unit"
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", value, re.ASCII)
        number, unit = (match[1], match[2]) if match else ("", "")
        if match and unit.lower() in _UNITS:
            exact = fractions.Fraction(number) * _UNITS[unit.lower()]
            size = int(exact) if exact.denominator == 1 or exact > 1024 else None
        elif unit.lower() in ("k", "m", "g", "t", "p"):
            fix = (
                f"say which: '{number}{unit.upper()}iB' (powers of 1024) or '{number}{unit.upper()}B' (1000)"
            )
        elif match:
            fix = (
                f"unknown unit {unit!r}{nearest(unit, ('KiB', 'MiB', 'GiB', 'TiB', 'KB', 'MB', 'GB', 'TB'))}"
            )
    if size is None or size < 0:
        raise _wrong(option, value, _SIZE_VALID, fix)
    return size


def _with_mode(given: dict[Any, Any], mode: Any) -> dict[Any, Any]:
    """Merge the ``mode=`` argument into the options: Inductor's modes and ours share that one argument."""
    if mode is None:
        return given
    if isinstance(mode, str) and mode in INDUCTOR_MODES:
        name, value = "inductor_mode", mode
    else:
        name, value = "mode", _parse_mode("mode", mode, INDUCTOR_MODES)
    if name in given and _PARSERS[name](name, given[name]) != value:
        raise _wrong(
            name, given[name], "one value", f"mode={mode!r} was given beside it; keep one of the two"
        )
    return given | {name: value}


def _parse_mode(name: str, value: Any, also: tuple[str, ...] = ()) -> str:
    """Return our mode in its canonical spelling; ``also``: modes the message calls valid as well."""
    valid = _MODE_VALID + (f", or an Inductor mode: {_join(also)}" if also else "")
    fix = "write e.g. mode='4:1'"
    if (number := _finite(value)) is not None and number >= 1:
        fix = f"write it as a string: mode='{number:g}:1'"
    elif isinstance(value, str):
        if value in ("lossless", "off"):
            return value
        match = re.fullmatch(r"\s*0*(\d{1,20})(?:\.(\d{1,20}))?\s*:\s*(\d{1,20})\s*", value, re.ASCII)
        if match and match[3] == "1" and int(match[1]) >= 1:
            return (
                f"{match[1]}.{match[2] or ''}".rstrip("0").rstrip(".") + ":1" if match[2] else f"{match[1]}:1"
            )
        if match and match[1] == "1" and int(match[3]) > 1:
            fix = f"original bytes come first: mode='{match[3]}:1'"
        elif value in INDUCTOR_MODES:
            fix = f"that is Inductor's: 'inductor_mode': {value!r}, or torch.compile(mode={value!r})"
    raise _wrong(name, value, valid, fix, near=("lossless", "off", *also))


def _parse_budget(name: str, value: Any) -> int | None:
    if value is None:
        return None
    size = parse_size(name, value)
    if size == 0:
        raise _wrong(name, value, f"more than 0 bytes: {_SIZE_VALID}", "leave budget out for no limit")
    return size


def _parse_max_error(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = _finite(value)
    if number is None or number <= 0:
        raise _wrong(
            name, value, "a finite number above 0, e.g. 0.05 for 5%", "leave max_error out for no cap"
        )
    return number


def _parse_plan_seconds(name: str, value: Any) -> float:
    number = _finite(value)
    if number is None or number <= 0:
        raise _wrong(name, value, "a finite number of seconds above 0", "10 is the default")
    return number


def _parse_device(name: str, value: Any) -> devices.DeviceProfile | None:
    return None if isinstance(value, str) and value == "auto" else devices.load(name, value)


def _parse_calibration(name: str, value: Any) -> calibration.Calibration | None:
    return None if value is None else calibration.load(name, value)


def _integer(value: Any) -> int | None:
    """Return an integer of any kind as an int; None for everything else, bools among it."""
    return None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)


def _finite(value: Any) -> float | None:
    """Return a real, finite number as a float; None for everything else, bools among it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _parse_group_size(name: str, value: Any) -> int:
    if (size := _integer(value)) in GROUP_SIZES:
        return size
    raise _wrong(name, value, _join(GROUP_SIZES), "64 is the default; smaller is more exact and less compact")


def _parse_chunk(name: str, value: Any) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value == "auto"):
        return value
    valid = "'auto', True or False"
    raise _wrong(name, value, valid, "'auto' is where it lowers the peak", near=("auto",))


def _parse_loss_chunk_bytes(name: str, value: Any) -> int | None:
    if value is None:
        return None
    size = parse_size(name, value)
    if size == 0:
        raise _wrong(name, value, f"more than 0 bytes: {_SIZE_VALID}", "write e.g. '64MiB'")
    return size


def _parse_inductor_mode(name: str, value: Any) -> str:
    if isinstance(value, str) and value in INDUCTOR_MODES:
        return value
    raise _wrong(
        name, value, _join(INDUCTOR_MODES), "leave inductor_mode out for 'default'", near=INDUCTOR_MODES
    )


def _parse_patterns(name: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    valid = "a string or a list of strings: module paths or op names, with * ? [] as in fnmatch"
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise _wrong(name, value, valid, f"write e.g. {name}=['blocks.*.mlp', 'aten.mm']")
    for item in items:
        if not isinstance(item, str) or not item.strip():
            raise _wrong(
                name, item, valid, "give the name, e.g. 'blocks.0.mlp', as named_modules() spells it"
            )
    if name == "allow" and not items:
        raise _wrong(
            name, value, valid, "to compress nothing use mode='lossless'; to allow everything leave allow out"
        )
    return tuple(sorted({item.strip() for item in items}))


def _parse_report(name: str, value: Any) -> str:
    valid = f"{_join(REPORT_WORDS)}, or a path ending in {_join(REPORT_SUFFIXES)}"
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _wrong(name, value, valid, "report='off' prints nothing")
    if text in REPORT_WORDS:
        return text
    if not text.endswith(REPORT_SUFFIXES) or os.path.basename(text) in REPORT_SUFFIXES or "\0" in text:
        raise _wrong(name, value, valid, "e.g. report='plan.json'", near=REPORT_WORDS)
    path = os.path.abspath(os.path.expanduser(text))
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise _wrong(name, value, "a path in an existing directory", f"create {parent!r} first")
    if os.path.isdir(path):
        raise _wrong(name, value, "the path of a file", f"{path!r} is a directory; name a file in it")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _wrong(name, value, "a path in a directory that can be written", f"{parent!r} cannot")
    return path


_PARSERS: Final[Mapping[str, Any]] = {
    "mode": _parse_mode,
    "budget": _parse_budget,
    "max_error": _parse_max_error,
    "plan_seconds": _parse_plan_seconds,
    "device": _parse_device,
    "calibration": _parse_calibration,
    "report": _parse_report,
    "allow": _parse_patterns,
    "deny": _parse_patterns,
    "min_bytes": parse_size,
    "group_size": _parse_group_size,
    "chunk_loss": _parse_chunk,
    "loss_chunk_bytes": _parse_loss_chunk_bytes,
    "chunk_ffn": _parse_chunk,
    "inductor_mode": _parse_inductor_mode,
}


def _inductor_option(name: Any, value: Any) -> tuple[str, Any]:
    """Return the full name and the value of an Inductor option; its type is checked where torch knows one."""
    from torch._inductor import config as inductor_config

    known = inductor_config.get_config_copy()
    spelling = name.replace("-", "_") if isinstance(name, str) else ""
    key = spelling if spelling in known else next((k for k in known if k.replace(".", "_") == spelling), None)
    if key is None:
        near = "" if spelling in _HINTS else nearest(spelling, OPTION_NAMES) or nearest(spelling, known)
        raise OptionError(
            f"unknown ciuic option {_short(name)} (value {_short(value)}){near}\n"
            f"  valid: {', '.join(OPTION_NAMES)}; or any Inductor option, e.g. 'triton.cudagraphs'\n"
            f"  fix: {_HINTS.get(spelling, 'correct the name or remove the option')}"
        )
    if key in _RESERVED:
        raise _wrong(key, value, "no value: this Inductor option is taken", _RESERVED[key])
    expected = inductor_config.get_type(key)  # type: ignore[attr-defined]  # installed by install_config_module
    if expected is not types.NoneType and not _fits(value, expected):
        words = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
        raise _wrong(
            key, value, f"{words} (an Inductor option)", f"Inductor's default is {_short(known[key])}"
        )
    return key, value


def _fits(value: Any, expected: Any) -> bool:
    """Whether ``value`` may be of type ``expected``; True where that cannot be told, as in torch."""
    origin = typing.get_origin(expected)
    if origin is typing.Literal:
        return value in typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(expected))
    if not isinstance(expected, type) or origin is not None:
        return True
    if isinstance(value, bool) and expected in (int, float):
        return False
    return isinstance(value, (int, float) if expected is float else expected)


def _matches(pattern: str, module: str, op: str) -> bool:
    """Whether a pattern names this module, one around it, or this op (namespace and overload optional)."""
    parts = module.split(".") if module else []
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    words = op.split(".") if op else []
    names += [".".join(words[a:b]) for a, b in ((0, None), (0, 2), (1, 2)) if words[a:b]]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _canonical(value: Any) -> Any:
    """``value`` as data that ``json`` can write the same way in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_canonical(v) for v in value), key=repr)
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    uuid = getattr(value, "uuid", None)
    if callable(uuid) and not isinstance(value, type) and (known := uuid()) is not None:
        return repr(known)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _wrong(option: str, value: Any, valid: str, fix: str, *, near: Iterable[str] = ()) -> OptionError:
    hint = nearest(value, near) if isinstance(value, str) else ""
    return OptionError(f"ciuic option {option!r}: got {_short(value)}{hint}\n  valid: {valid}\n  fix: {fix}")


def _short(value: Any) -> str:
    try:
        return reprlib.repr(value) if not isinstance(value, str) or len(value) > 200 else repr(value)
    except Exception:  # a broken __repr__ must not hide the message
        return f"<{type(value).__name__}>"


def _join(values: Iterable[object]) -> str:
    return ", ".join(repr(v) for v in values)
