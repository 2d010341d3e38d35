"""Up to when Inductor computes values in their readers, and several in one kernel: by torch's version."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any

from torch._inductor import config as inductor_config


def most_reads(reused: bool) -> int:
    """From how many buffers Inductor lets a value, read once or more often, be computed in its readers."""
    if reused:
        return int(inductor_config.realize_reads_threshold)
    limit = inductor_config.realize_acc_reads_threshold
    if limit is None:  # 2.13: by device; on a CPU it is more
        limit = inductor_config._realize_acc_reads_threshold_default
    return int(limit)


def most_ops() -> int:
    """Of how many operations Inductor lets a value be computed in its readers."""
    limit = inductor_config.realize_opcount_threshold
    if limit is None:  # 2.13: by device
        limit = inductor_config._realize_opcount_threshold_default
    return int(limit)


def least_reduced() -> int:
    """From how many elements Inductor reduces in a loop; what reduces fewer is computed by its readers."""
    return int(inductor_config.unroll_reductions_threshold)


def most_reads_for_both() -> int:
    """From how many buffers one kernel may reduce rows and columns: 0 if none does."""
    if not getattr(inductor_config.triton, "mix_order_reduction", False):
        return 0
    limit = getattr(inductor_config.triton, "mix_order_reduction_max_reads", 0)  # from 2.13 on
    return int(limit) or sys.maxsize


@functools.cache
def counts_broadcasts() -> bool:
    """Whether Inductor takes a value that is broadcast to be reused: up to 2.12."""
    ir: Any = importlib.import_module("torch._inductor.ir")  # slow to import
    return "graph_reuse" not in inspect.signature(ir.StorageBox.mark_reuse).parameters
