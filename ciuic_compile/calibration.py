"""What :func:`ciuic_compile.calibrate` measured of one model, as data and as a JSON file.

Planning sees no values, so what each parameter's gradient counts in the whole one is a guess from shapes
(``energy.py``); a calibration has it measured, and one coefficient for each class of saved tensors.
It holds for the model at any batch size and precision, and for every mode.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import OptionError
from .types import TensorClass
from .writing import write_file

#: Gains are relative to the predictions of the error model: where those change much, so does this version.
SCHEMA: Final = "ciuic.calibration/2"
_FAMILY: Final = "ciuic.calibration/"
_GROUPS: Final = frozenset(
    kind.value + special
    for kind in TensorClass
    for special in ("", "/mixed", "/convolution", "/probabilities", "/factor")
)
_VALID: Final = "a Calibration, or the path of a JSON file that its save() wrote"
_AGAIN: Final = "calibrate again: ciuic_compile.calibrate(model, batches).save(path)"


@dataclass(frozen=True)
class GraphCalibration:
    """What was measured of one compiled graph (a model without graph breaks has one).

    Attributes:
        shares: of each gradient that the backward returns, in its order, in the sum of squares of all.
        gains: group of saved tensors -> measured over predicted error variance of the whole gradient. A group
            is a class, but "class/mixed" (several channels in 64 elements), "class/convolution"
            (convolutions' outputs) and, of attention that no kernel fuses, "class/probabilities" and
            "class/factor" (what else its products read) are groups of their own.
        mse: the same -> codec -> its relative mean squared error on these tensors (mean over them).
    """

    shares: tuple[float, ...]
    gains: Mapping[str, float]
    mse: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Calibration:
    """Measured error coefficients of one model.

    Attributes:
        graphs: fingerprint of a joint graph -> what was measured of it.
        steps: training steps that were measured.
        torch: version of torch, and
        device: type of device ("cpu", "cuda") that it was measured with.
    """

    graphs: Mapping[str, GraphCalibration]
    steps: int
    torch: str
    device: str

    def to_json(self) -> str:
        """The file's text: ASCII, sorted; equal calibrations give equal text."""
        graphs = {
            key: {
                "shares": [_short(s) for s in g.shares],
                "gains": _shortened(g.gains),
                "mse": {group: _shortened(codecs) for group, codecs in g.mse.items()},
            }
            for key, g in self.graphs.items()
        }
        document = {
            "schema": SCHEMA,
            "torch": self.torch,
            "device": self.device,
            "steps": self.steps,
            "graphs": graphs,
        }
        return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; its folder must exist."""
        write_file(path, self.to_json())

    def uuid(self) -> str:
        """A hash of the contents, for cache keys."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def from_json(text: str | bytes) -> Calibration:
    """Return the calibration that :meth:`Calibration.to_json` wrote.

    Raises:
        ValueError: not JSON, another kind of file or version, a field missing, unknown or out of range; the
            message says which.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("empty" if not text.strip() else f"not valid JSON: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        if isinstance(schema, str) and schema.startswith(_FAMILY):
            raise ValueError(f"of another version: schema {schema!r}, and this version reads {SCHEMA!r}")
        raise ValueError(f"not a calibration: its schema is {schema!r}, not {SCHEMA!r}")
    _require(set(document) == {"schema", "torch", "device", "steps", "graphs"}, "fields missing or unknown")
    steps, graphs = document["steps"], document["graphs"]
    _require(type(steps) is int and steps >= 1, "'steps' is not a whole number above 0")
    _require(isinstance(graphs, dict) and bool(graphs), "'graphs' is not an object with an entry a graph")
    for name in ("torch", "device"):
        _require(isinstance(document[name], str), f"{name!r} is not a string")
    return Calibration(
        {key: _graph(value) for key, value in graphs.items()}, steps, document["torch"], document["device"]
    )


def load(option: str, value: Any) -> Calibration:
    """The calibration that the value of an option is, or that lies at the path that it is.

    Raises:
        OptionError: anything else; no such file; a file that :func:`from_json` refuses.
    """
    if isinstance(value, Calibration):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong(option, value, "neither of the two", "call ciuic_compile.calibrate(model, batches)")
    try:
        return from_json(Path(value).expanduser().read_bytes())
    except OSError as error:
        raise _wrong(option, value, f"cannot be read: {error.strerror or error}", _AGAIN) from error
    except ValueError as error:  # a path with a null byte as well
        raise _wrong(option, value, str(error), _AGAIN) from error


def _graph(data: Any) -> GraphCalibration:
    _require(isinstance(data, dict) and set(data) == {"shares", "gains", "mse"}, "a graph's fields")
    shares, gains, mse = data["shares"], data["gains"], data["mse"]
    _require(isinstance(shares, list) and all(map(_is_amount, shares)), "'shares' are not numbers from 0 up")
    _require(abs(sum(shares) - 1) < 1e-3, "'shares' do not add up to 1")
    _require(isinstance(mse, dict) and all(isinstance(v, dict) for v in mse.values()), "'mse' is no table")
    for amounts in (gains, *mse.values()):
        _require(
            isinstance(amounts, dict) and all(map(_is_amount, amounts.values())),
            "'gains' or 'mse' are not numbers from 0 up",
        )
    unknown = sorted({*gains, *mse} - _GROUPS)
    _require(not unknown, f"an unknown class {unknown[:1]}")
    return GraphCalibration(tuple(map(float, shares)), gains, mse)


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"damaged: {what}")


def _shortened(amounts: Mapping[str, float]) -> dict[str, float]:
    return {key: _short(value) for key, value in amounts.items()}


def _short(value: float) -> float:
    """Six digits: more were not measured."""
    return float(f"{value:.6g}")


def _wrong(option: str, value: Any, why: str, fix: str) -> OptionError:
    shown = repr(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else f"<{type(value).__name__}>"
    return OptionError(f"ciuic option {option!r}: got {shown[:300]}: {why}\n  valid: {_VALID}\n  fix: {fix}")
