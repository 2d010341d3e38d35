"""Device profiles: what the time model knows about a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProfile:
    """What the planner knows about a device.

    Attributes:
        bytes_per_us: memory bandwidth, bytes read plus written per microsecond.
        caches: whether torch's caching allocator stands between (CUDA).
        context_bytes: what a process takes beside the allocator's segments (CUDA context,
            loaded kernels); None where it was not measured.
    """

    name: str
    bytes_per_us: float
    context_bytes: int | None = None
    caches: bool = True

    def microseconds(self, nbytes: int) -> float:
        """Time to move ``nbytes`` at full bandwidth, in microseconds."""
        return nbytes / self.bytes_per_us


# H200: a device-to-device copy moved 4.0 TB/s and more; its context after a first matmul is that of
# bench/results/workspaces-h200.json. The others: vendors' datasheets.
_PROFILES = (
    DeviceProfile("h200", 4.0e6, context_bytes=623_706_112),
    DeviceProfile("h100", 3.0e6),
    DeviceProfile("a100", 1.7e6),
    DeviceProfile("rtx 4090", 0.95e6),
)
_GENERIC_GPU = DeviceProfile("gpu", 1.0e6)
_CPU = DeviceProfile("cpu", 2.0e4, caches=False)


def profile_for(device: torch.device) -> DeviceProfile:
    """The profile of a device that the graph runs on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _CPU if device.type == "cpu" else _GENERIC_GPU
    name = torch.cuda.get_device_name(device).lower()
    return next((p for p in _PROFILES if p.name in name), _GENERIC_GPU)


def named(name: str) -> DeviceProfile:
    """The profile of that name."""
    return next(p for p in (*_PROFILES, _GENERIC_GPU, _CPU) if p.name == name)
