"""Device profiles: what the time model knows about a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# What cuBLAS keeps for a thread, in bytes: torch's defaults (CublasHandlePool.cpp; an H200 asked for both,
# python -m bench.reserved). CUBLAS_WORKSPACE_CONFIG and CUBLASLT_WORKSPACE_SIZE are not looked at.
_CUBLAS = {"cublas": 4096 * 1024 * 2 + 16 * 1024 * 8, "cublaslt": 1024 * 1024}
_CUBLAS_HOPPER = _CUBLAS | {"cublas": 4096 * 8 * 1024}


@dataclass(frozen=True)
class DeviceProfile:
    """What the planner knows about a device.

    Attributes:
        bytes_per_us: memory bandwidth, bytes read plus written per microsecond.
        half_flop_per_us: matmuls of 16-bit values, floating point operations per microsecond.
        caches: whether torch's caching allocator stands between (CUDA).
        context_bytes: what a process takes beside the allocator's segments (CUDA context,
            loaded kernels); None where it was not measured.
        memory_bytes: memory of the device, as its vendor states it; None where it varies.
        workspaces: bytes that libraries keep for each thread that calls them, by library.
    """

    name: str
    bytes_per_us: float
    half_flop_per_us: float
    context_bytes: int | None = None
    caches: bool = True
    workspaces: Mapping[str, int] = field(default_factory=lambda: _CUBLAS)
    memory_bytes: int | None = None

    def microseconds(self, nbytes: int) -> float:
        """Time to move ``nbytes`` at full bandwidth, in microseconds."""
        return nbytes / self.bytes_per_us

    def flop_per_us(self, itemsize: int) -> float:
        """Matmul rate for elements of so many bytes: float32 may run as TF32, at half the rate of 16 bits."""
        return self.half_flop_per_us * min(1.0, 2 / itemsize)


# Bandwidths. H200: a device-to-device copy moved 4.0 TB/s and more; its context after a first matmul is that
# of bench/results/workspaces-h200.json. The other GPUs: vendors' datasheets.
# Matmul rates of GPUs: datasheets, dense bfloat16. Real ones are lower (an H200's whole Llama step in
# bench/results/step_time-h200.json ran at 610 TFLOP/s), so what is weighed against matmuls weighs less.
_PROFILES = (
    DeviceProfile(
        "h200",
        4.0e6,
        989e6,
        context_bytes=623_706_112,
        workspaces=_CUBLAS_HOPPER,
        memory_bytes=141_000_000_000,
    ),
    DeviceProfile("h100", 3.0e6, 989e6, workspaces=_CUBLAS_HOPPER, memory_bytes=80_000_000_000),
    DeviceProfile("a100", 1.7e6, 312e6),
    DeviceProfile("rtx 4090", 0.95e6, 165e6, memory_bytes=24_000_000_000),
)
_GENERIC_GPU = DeviceProfile("gpu", 1.0e6, 200e6)  # assumed: as many operations a byte as the others
# Two cores of an EPYC: 18 GB/s, 261 GFLOP/s in bf16.
_CPU = DeviceProfile("cpu", 2.0e4, 2.6e5, caches=False, workspaces={})


def profile_for(device: torch.device) -> DeviceProfile:
    """The profile of a device that the graph runs on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _CPU if device.type == "cpu" else _GENERIC_GPU
    name = torch.cuda.get_device_name(device).lower()
    return next((p for p in _PROFILES if p.name in name), _GENERIC_GPU)


def named(name: str) -> DeviceProfile:
    """The profile of that name."""
    return next(p for p in (*_PROFILES, _GENERIC_GPU, _CPU) if p.name == name)
