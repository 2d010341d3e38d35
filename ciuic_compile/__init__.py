"""ciuic-compile: a memory compiler for PyTorch.

``torch.compile(model, backend="ciuic")`` needs no import of this package; ``enable_compression`` is
the two-line form, ``plans`` returns what was decided.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .api import calibrate, disable_compression, enable_compression, measure_device, plans
    from .calibration import Calibration
    from .devices import DeviceProfile
    from .errors import (
        CalibrationError,
        CiuicError,
        InfeasibleBudgetError,
        OptionError,
        PassError,
        PlanFileError,
        SizeError,
        VerificationError,
    )
    from .types import Action, Decision, Plan, Source, Storage, TensorClass

__version__ = "0.1.0"
__all__ = [
    "Action",
    "Calibration",
    "CalibrationError",
    "CiuicError",
    "Decision",
    "DeviceProfile",
    "InfeasibleBudgetError",
    "OptionError",
    "PassError",
    "Plan",
    "PlanFileError",
    "SizeError",
    "Source",
    "Storage",
    "TensorClass",
    "VerificationError",
    "__version__",
    "calibrate",
    "disable_compression",
    "enable_compression",
    "measure_device",
    "plans",
]

# Read from their modules when they are first asked for: torch takes seconds to import, and pytest (which
# imports the plugin of every installed package) and `ciuic --help` may not need it.
_HOMES: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("calibrate", "disable_compression", "enable_compression", "measure_device", "plans"), "api"
    ),
    "Calibration": "calibration",
    "DeviceProfile": "devices",
    **dict.fromkeys(("Action", "Decision", "Plan", "Source", "Storage", "TensorClass"), "types"),
}


def __getattr__(name: str) -> Any:
    """A public name, or a submodule."""
    if name in __all__:
        value = getattr(importlib.import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


if not any(e.name == "ciuic" for e in entry_points(group="torch_dynamo_backends")):
    importlib.import_module(".api", __name__).register()  # not installed: Dynamo would not find the backend
