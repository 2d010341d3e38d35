"""Plans one entry of ``ciuic.toml`` and takes its record."""

from __future__ import annotations

import contextlib
import linecache
import sys
from pathlib import Path

from ciuic_compile import hugging_face, planning, targets
from ciuic_compile.gate.record import Record, record
from ciuic_compile.gate.settings import Entry


def plan_entry(entry: Entry) -> Record:
    """The record of an entry's step as the program is now. No weights are allocated, nothing is run.

    Raises:
        TargetError: the target cannot be made or planned.
        InfeasibleBudgetError: no plan fits its budget.
    """
    linecache.checkcache()  # a file that changed since this process last planned it has other lines now
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no part of a JSON verdict
        target = targets.load(entry.target, hugging_face.Shape(**entry.shape) if entry.shape else None)
        plans = planning.plan(
            target.model,
            target.inputs,
            target.loss_fn,
            options=entry.options,
            device=entry.device,
            autocast=entry.autocast,
            dynamic=True if entry.dynamic else None,
        )
    return record(plans, entry, target.model, target.inputs, Path.cwd())
