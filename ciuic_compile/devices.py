"""Device profiles: what the time model knows about a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProfile:
    """What the planner knows about a device.

    Attributes:
        bytes_per_us: memory bandwidth, bytes read plus written per microsecond.
        half_flops: matmuls in bfloat16 or float16, floating-point operations per microsecond.
        full_flops: the same in float32 (no TF32).
        caches: whether torch's caching allocator stands between (CUDA).
        context_bytes: what a process takes beside the allocator's segments (CUDA context,
            loaded kernels); None where it was not measured.
    """

    name: str
    bytes_per_us: float
    half_flops: float
    full_flops: float
    context_bytes: int | None = None
    caches: bool = True

    def microseconds(self, nbytes: int) -> float:
        """Time to move ``nbytes`` at full bandwidth, in microseconds."""
        return nbytes / self.bytes_per_us

    def flops_per_us(self, dtype: torch.dtype) -> float:
        """Matmul rate for operands of this dtype, floating-point operations per microsecond."""
        return self.half_flops if dtype.itemsize == 2 else self.full_flops


# H200: a device-to-device copy moved 4.0 TB/s and more; its context after a first matmul is that of
# bench/results/workspaces-h200.json; large bf16 matmuls reached 700 to 790 TFLOP/s there. The others are
# vendors' datasheets: bandwidth, and three quarters of the dense matmul rates.
_PROFILES = (
    DeviceProfile("h200", 4.0e6, 7.0e8, 5.0e7, context_bytes=623_706_112),
    DeviceProfile("h100", 3.0e6, 7.0e8, 5.0e7),
    DeviceProfile("a100", 1.7e6, 2.3e8, 1.5e7),
    DeviceProfile("rtx 4090", 0.95e6, 1.2e8, 6.0e7),
)
_GENERIC_GPU = DeviceProfile("gpu", 1.0e6, 1.0e8, 1.5e7)
_CPU = DeviceProfile("cpu", 2.0e4, 1.0e5, 1.0e5, caches=False)  # two cores


def profile_for(device: torch.device) -> DeviceProfile:
    """The profile of a device that the graph runs on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _CPU if device.type == "cpu" else _GENERIC_GPU
    name = torch.cuda.get_device_name(device).lower()
    return next((p for p in _PROFILES if p.name in name), _GENERIC_GPU)


def named(name: str) -> DeviceProfile:
    """The profile of that name."""
    return next(p for p in (*_PROFILES, _GENERIC_GPU, _CPU) if p.name == name)
