"""Measure a device profile here: a copy's bandwidth and a matmul's rate."""

from __future__ import annotations

import os

import torch
from torch.utils.benchmark import Timer

from .devices import DeviceProfile, named, profile_for
from .errors import CalibrationError, nearest

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # beyond every cache
_SIDE = {"cuda": 8192, "cpu": 1024}
_HOPPER = 9  # major compute capability from which cuBLAS keeps as much as on an H200


def measure_device(device: str | torch.device | None = None, *, seconds: float = 1.0) -> DeviceProfile:
    """See :func:`ciuic_compile.measure_device`."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        near = nearest(str(device), ("cuda", "cpu"))
        raise CalibrationError(f"no device {device!r}{near}; give 'cuda', 'cuda:1' or 'cpu'") from error
    if where.type not in _SIDE or (where.type == "cuda" and not torch.cuda.is_available()):
        raise CalibrationError(
            f"there is no {where.type} device here that can be measured: run this on the machine that has "
            f"it, or name a built-in profile in the option 'device'"
        )
    known = profile_for(where)
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        name, memory = properties.name, properties.total_memory
        cublas = named("h200" if properties.major >= _HOPPER else "gpu").cublas_bytes
    else:
        name, cublas = f"cpu, {torch.get_num_threads()} threads", 0
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceProfile(
        name=f"{name} (measured)",
        bytes_per_us=_bandwidth(where, seconds, memory),
        half_flop_per_us=_matmul_rate(where, seconds),
        kind=where.type,
        memory_bytes=memory,
        granularity=known.granularity,
        context_bytes=known.context_bytes,
        cublas_bytes=cublas,
        cublaslt_bytes=known.cublaslt_bytes,
    )


def _bandwidth(device: torch.device, seconds: float, memory: int) -> float:
    """Bytes read plus written per microsecond by a copy inside the device's memory."""
    size = min(_COPY_BYTES[device.type], memory // 16)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _median_us("target.copy_(source)", seconds, source=source, target=target)


def _matmul_rate(device: torch.device, seconds: float) -> float:
    """Floating point operations per microsecond of a large bfloat16 matmul."""
    side = _SIDE[device.type]
    a, b, out = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(3))
    return float(2 * side**3 / _median_us("torch.mm(a, b, out=out)", seconds, a=a, b=b, out=out))


def _median_us(statement: str, seconds: float, **names: torch.Tensor) -> float:
    """Median time of a statement, in microseconds; the timer waits for CUDA and warms up."""
    timer = Timer(statement, globals={"torch": torch, **names}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median * 1e6)
