"""What the benchmarks share: configurations, cells in fresh processes, tables, result files."""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ciuic_compile

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "autocast", "bf16")
FP8 = {  # torch's own activation quantization; use_scaling must be given, its default gives NaN gradients
    "quant_type": "torch.float8_e5m2",
    "use_scaling": True,
    "size_in_mb": 1,
    "exclude_primals": True,
    "allowed_dtypes": "torch.bfloat16",
}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def under_autocast(run: Callable[..., Tensor], precision: str, device: torch.device) -> Callable[..., Tensor]:
    """The same function, called as :func:`autocast` says."""

    def called(*batch: Tensor) -> Tensor:
        with autocast(precision, device):
            return run(*batch)

    return called


def compile_as(model: nn.Module, config: str) -> Callable[..., Tensor]:
    """Compile ``model`` as ``config`` says.

    Args:
        config: "eager", "inductor", "budget-<fraction>" (torch's activation_memory_budget), "fp8" (torch's
            fp8 activation pass; bf16 activations only), or else a mode of ciuic and options after it, e.g.
            "4:1 group_size=128". The switches of torch's own are global: a process for each configuration.
    """
    if config == "eager":
        return model
    if config == "fp8":
        import torch._inductor.config as inductor

        inductor.post_grad_fusion_options["activation_quantization_aten_pass"] = dict(FP8)
    elif config.startswith("budget-"):
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = float(config.removeprefix("budget-"))
    elif config != "inductor":
        mode, *pairs = config.split()
        options = {name: ast.literal_eval(value) for name, value in (p.split("=", 1) for p in pairs)}
        return torch.compile(model, backend="ciuic", options={"mode": mode, **options})
    return torch.compile(model, backend="inductor")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where ``precision`` says so."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else nullcontext()


def plans_summary() -> dict[str, Any]:
    """What ciuic planned in this process; empty when it planned nothing."""
    plans = ciuic_compile.plans()
    if not plans:
        return {}
    return {
        "planned_saved": sum(p.planned_saved_bytes for p in plans),
        "planned_peak": max(p.planned_peak_bytes for p in plans),
        "planned_error": max(p.gradient_error for p in plans),
        "planned_error_bound": max(p.gradient_error_bound for p in plans),
        "notes": [note for p in plans for note in p.notes],
    }


def environment(device: torch.device) -> dict[str, str]:
    """What a number in a result file depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ciuic": ciuic_compile.__version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else "",
    }


def run_cell(module: str, spec: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Run ``python -m module --cell <spec>`` in a fresh process; it prints one line of JSON last.

    Returns:
        That object, or ``{"failed": ...}`` with the end of what the process said; ``spec`` is part of both.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", module, "--cell", json.dumps(spec)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {**spec, "failed": f"not done after {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {
            **spec,
            "failed": "\n".join(done.stderr.strip().splitlines()[-12:]) or f"exit {done.returncode}",
        }
    result: dict[str, Any] = json.loads(lines[-1])
    return {**spec, **result}


def run_cells(
    module: str,
    specs: Sequence[Mapping[str, Any]],
    timeout: float,
    jobs: int,
    label: Callable[[Any], str],
    end: float = math.inf,
    each: Callable[[dict[str, Any]], None] = lambda result: None,
    follow: Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]] = lambda result: (),
) -> list[dict[str, Any]]:
    """Run every cell, ``jobs`` at a time, with a line each on stderr; results in the order of ``specs``.

    None runs past ``end`` (of ``time.monotonic``): those that did not start by then fail. ``each`` is called
    with every result as it comes. ``follow`` may answer one with more cells: they run next, and their
    results come last.
    """
    lock = threading.Lock()
    waiting = deque(enumerate(specs))
    results: dict[int, dict[str, Any]] = {}
    known = len(specs)

    def one(spec: Mapping[str, Any]) -> dict[str, Any]:
        left = end - time.monotonic()
        if left > 0:
            return run_cell(module, spec, min(timeout, left))
        return {**spec, "failed": "not started: no time left"}

    def work(_: int) -> None:
        nonlocal known
        while True:
            with lock:
                if not waiting:
                    return
                index, spec = waiting.popleft()
            start = time.monotonic()
            result = one(spec)
            state = "FAILED\n" + result["failed"] if "failed" in result else "done"
            with lock:
                results[index] = result
                each(result)
                more = follow(result)
                waiting.extendleft(reversed([*enumerate(more, known)]))
                known += len(more)
                print(
                    f"[{len(results)}/{known}] {label(spec)} ({time.monotonic() - start:.0f} s): {state}",
                    file=sys.stderr,
                    flush=True,
                )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))
    return [results[i] for i in sorted(results)]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: through rich where it is installed and there is a terminal, plainly otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        Console = None  # type: ignore[assignment, misc]
    if Console is not None and sys.stdout.isatty():
        pretty = Table(title=title)
        for i, column in enumerate(columns):
            pretty.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            pretty.add_row(*row)
        Console().print(pretty)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for row in [columns, *rows]:
        cells = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


def write_json(path: str | Path | None, data: Mapping[str, Any]) -> None:
    """Write ``data`` where a path is given; folders are made."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(data, indent=1, allow_nan=True) + "\n")


def mib(nbytes: float | None) -> str:
    """Bytes as MiB, for a table."""
    return "-" if nbytes is None else f"{nbytes / 2**20:,.1f}"


def share(value: float | None) -> str:
    """A relative error, for a table."""
    return "-" if value is None else f"{value:.2g}"
