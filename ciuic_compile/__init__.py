"""ciuic-compile: a memory compiler for PyTorch.

``torch.compile(model, backend="ciuic")`` needs no import of this package; ``enable_compression`` is
the two-line form, ``plans`` returns what was decided.
"""

from __future__ import annotations

from .api import calibrate, disable_compression, enable_compression, measure_device, plans, register
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

register()
