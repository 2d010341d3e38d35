"""Device profiles: what the time model knows about a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProfile:
    """A device's name and memory bandwidth (bytes per microsecond, read plus written)."""

    name: str
    bytes_per_us: float

    def microseconds(self, nbytes: int) -> float:
        """Time to move ``nbytes`` at full bandwidth, in microseconds."""
        return nbytes / self.bytes_per_us


# H200: a device-to-device copy moved 4.0 TB/s and more. The others: vendors' datasheets.
_PROFILES = (
    DeviceProfile("h200", 4.0e6),
    DeviceProfile("h100", 3.0e6),
    DeviceProfile("a100", 1.7e6),
    DeviceProfile("rtx 4090", 0.95e6),
)
_GENERIC_GPU = DeviceProfile("gpu", 1.0e6)
_CPU = DeviceProfile("cpu", 2.0e4)


def profile_for(device: torch.device) -> DeviceProfile:
    """The profile of a device that the graph runs on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _CPU if device.type == "cpu" else _GENERIC_GPU
    name = torch.cuda.get_device_name(device).lower()
    return next((p for p in _PROFILES if p.name in name), _GENERIC_GPU)
