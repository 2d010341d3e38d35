"""Device profiles: what the planner knows about a device, so that it can plan for one that is not here.

A plan depends on the profile alone, never on a device: nothing else in the package asks which there is, but
for where to run codecs' kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from .errors import OptionError, nearest
from .writing import write_file

SCHEMA: Final = "ciuic.device/1"
_FAMILY: Final = "ciuic.device/"
_SUFFIX: Final = ".json"
# What cuBLAS keeps for a thread, in bytes: torch's defaults (CublasHandlePool.cpp; an H200 asked for both,
# python -m bench.reserved). CUBLAS_WORKSPACE_CONFIG and CUBLASLT_WORKSPACE_SIZE are not looked at.
_CUBLAS = 4096 * 1024 * 2 + 16 * 1024 * 8
_CUBLAS_HOPPER = 4096 * 8 * 1024  # and Blackwell
_CUBLASLT = 1024 * 1024


@dataclass(frozen=True)
class DeviceProfile:
    """What the planner knows about a device.

    Attributes:
        name: as the option ``device`` and reports have it.
        bytes_per_us: memory bandwidth, bytes read plus written per microsecond.
        half_flop_per_us: matmuls of 16-bit values, floating point operations per microsecond.
        kind: torch's type of device: "cuda" or "cpu".
        memory_bytes: what the device has; None where that is not known.
        granularity: what the allocator rounds requests up to, in bytes.
        context_bytes: what a process takes beside the allocator's segments (CUDA context,
            loaded kernels); None where it was not measured.
        cublas_bytes, cublaslt_bytes: what these libraries keep for each thread that calls them.
    """

    name: str
    bytes_per_us: float
    half_flop_per_us: float
    kind: str = "cuda"
    memory_bytes: int | None = None
    granularity: int = 512  # CUDACachingAllocator.cpp: kMinBlockSize
    context_bytes: int | None = None
    cublas_bytes: int = _CUBLAS
    cublaslt_bytes: int = _CUBLASLT

    @property
    def caches(self) -> bool:
        """Whether torch's caching allocator stands between (CUDA)."""
        return self.kind != "cpu"

    @property
    def workspaces(self) -> dict[str, int]:
        """Bytes that libraries keep for each thread that calls them, by library."""
        sizes = {"cublas": self.cublas_bytes, "cublaslt": self.cublaslt_bytes}
        return {name: size for name, size in sizes.items() if size}

    @property
    def prefers_cudnn(self) -> bool:
        """Whether torch attends by cuDNN: on Hopper and Blackwell, which cuBLAS's workspace tells."""
        return self.cublas_bytes == _CUBLAS_HOPPER

    def microseconds(self, nbytes: int) -> float:
        """Time to move ``nbytes`` at full bandwidth, in microseconds."""
        return nbytes / self.bytes_per_us

    def flop_per_us(self, itemsize: int) -> float:
        """Matmul rate for elements of so many bytes: float32 may run as TF32, at half the rate of 16 bits."""
        return self.half_flop_per_us * min(1.0, 2 / itemsize)

    def to_json(self) -> str:
        """The file's text: ASCII, sorted; equal profiles give equal text."""
        document = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, for the option ``device``; its folder must exist, its name end in .json."""
        write_file(path, self.to_json())

    def uuid(self) -> str:
        """A hash of the contents, for cache keys."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


# Shares of the data sheet's rates that were reached, taken to be the same for all GPUs. A copy: measured on
# the H200 (4.0 TB/s of 4.8, where bench/results/workspaces-h200.json was made). The matmuls of whole steps:
# on the H100, 686 TFLOP/s of a GPT and 598 of a ViT (docs/budgets.md, from kernels' own times);
# the H200's whole Llama step in bench/results/step_time-h200.json ran at 610, everything else included.
_COPIED = 4.0 / 4.8
_MULTIPLIED = 0.65


def _gpu(name: str, terabytes_per_s: float, teraflops: float, gib: int, **more: Any) -> DeviceProfile:
    """A GPU by its data sheet: memory bandwidth, dense bfloat16 matmuls with float32 sums, memory."""
    rate = terabytes_per_s * 1e6 * _COPIED
    return DeviceProfile(name, rate, teraflops * 1e6 * _MULTIPLIED, memory_bytes=gib * 2**30, **more)


# Dense bfloat16 of NVIDIA's data sheets, which state twice that "with sparsity" for all but the A100; each
# does TF32 at half that rate. Data sheets say GB of what are GiB.
_PROFILES: Final = (
    # H200 SXM: nvidia.com/en-us/data-center/h200 ("4.8TB/s", "141GB", "1,979 TFLOPS" with sparsity). Its
    # context after a first matmul: bench/results/workspaces-h200.json.
    _gpu("h200", 4.8, 989, 141, context_bytes=623_706_112, cublas_bytes=_CUBLAS_HOPPER),
    # H100 SXM: nvidia.com/en-us/data-center/h100 ("3.35TB/s", "80GB", "1,979 teraFLOPS" with sparsity).
    _gpu("h100", 3.35, 989, 80, cublas_bytes=_CUBLAS_HOPPER),
    # A100 SXM: "NVIDIA A100 Tensor Core GPU" data sheet ("1,555GB/s" and "2,039GB/s", "312 TFLOPS").
    _gpu("a100-40", 1.555, 312, 40),
    _gpu("a100-80", 2.039, 312, 80),
    # RTX 4090: "NVIDIA Ada GPU architecture" white paper, appendix A ("1008 GB/sec", "24 GB", "165.2").
    _gpu("rtx4090", 1.008, 165.2, 24),
    # L4: nvidia.com/en-us/data-center/l4 ("300GB/s", "24GB", "242 teraFLOPS" with sparsity).
    _gpu("l4", 0.3, 121, 24),
    # Assumed, where the GPU is another one: as many operations a byte as the others.
    DeviceProfile("gpu", 1.0e6, 200e6),
    # Measured: two cores of an EPYC, 18 GB/s, 261 GFLOP/s in bf16. torch's CPU allocator hands out what it
    # is asked for.
    DeviceProfile("cpu", 2.0e4, 2.6e5, kind="cpu", granularity=1, cublas_bytes=0, cublaslt_bytes=0),
)
_ALIASES: Final = {"a100": "a100-80"}
#: Words in the driver's name of a device; the first profile whose words are all there.
_WORDS: Final[Mapping[str, frozenset[str]]] = {
    "h200": frozenset({"h200"}),
    "h100": frozenset({"h100"}),
    "a100-40": frozenset({"a100", "40gb"}),
    "a100-80": frozenset({"a100"}),
    "rtx4090": frozenset({"rtx", "4090"}),
    "l4": frozenset({"l4"}),
}
NAMES: Final = (*(p.name for p in _PROFILES), *_ALIASES)
_VALID: Final = (
    f"'auto', {', '.join(map(repr, NAMES))}, a DeviceProfile, or the path of a .json file that its save() "
    "wrote"
)
_AGAIN: Final = "measure again, on that device: ciuic_compile.measure_device().save(path)"


def profile_for(device: torch.device) -> DeviceProfile:
    """The profile of a device that the graph runs on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return named("cpu" if device.type == "cpu" else "gpu")
    words = set(re.findall("[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    return named(next((name for name, all_of in _WORDS.items() if all_of <= words), "gpu"))


def named(name: str) -> DeviceProfile:
    """The built-in profile of that name. Raises ``LookupError`` where there is none."""
    found = [p for p in _PROFILES if p.name == _ALIASES.get(name, name)]
    if not found:
        raise LookupError(name)
    return found[0]


def load(option: str, value: Any) -> DeviceProfile:
    """The profile that the value of an option is or names, or that lies at the path that it is.

    Raises:
        OptionError: anything else; no such file; a file that :func:`from_json` refuses.
    """
    if isinstance(value, DeviceProfile):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong(option, value, "none of these", "write e.g. device='h200'")
    text = os.fspath(value)
    if not str(text).endswith(_SUFFIX):
        try:
            return named(text)
        except LookupError:
            near = nearest(text.lower(), ("auto", *NAMES)) if isinstance(text, str) else ""
            raise _wrong(option, value, f"no profile has that name{near}", "correct the name") from None
    try:
        return from_json(Path(text).expanduser().read_bytes())
    except OSError as error:
        raise _wrong(option, value, f"cannot be read: {error.strerror or error}", _AGAIN) from error
    except ValueError as error:  # a path with a null byte as well
        raise _wrong(option, value, str(error), _AGAIN) from error


def from_json(text: str | bytes) -> DeviceProfile:
    """Return the profile that :meth:`DeviceProfile.to_json` wrote.

    Raises:
        ValueError: not JSON, another kind of file or version, a field missing, unknown or out of range; the
            message says which.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("empty" if not text.strip() else f"not valid JSON: {error}") from error
    schema = document.pop("schema", None) if isinstance(document, dict) else None
    if schema != SCHEMA:
        if isinstance(schema, str) and schema.startswith(_FAMILY):
            raise ValueError(f"of another version: schema {schema!r}, and this version reads {SCHEMA!r}")
        raise ValueError(f"not a device profile: its schema is {schema!r}, not {SCHEMA!r}")
    expected = {f.name for f in fields(DeviceProfile)}
    if different := sorted(expected ^ set(document)):
        what = "missing" if different[0] in expected else "unknown"
        raise ValueError(f"damaged: {different[0]!r} is {what}")
    profile = DeviceProfile(**document)
    if why := _why_invalid(profile):
        raise ValueError(f"damaged: {why}")
    return profile


def _why_invalid(profile: DeviceProfile) -> str:
    """Which field has a value that it cannot have; empty where none has."""
    if not isinstance(profile.name, str) or not re.fullmatch(r"[ -~]{1,100}", profile.name):
        return "'name' is not a string of 1 to 100 ASCII characters"
    if profile.kind not in ("cuda", "cpu"):
        return "'kind' is neither 'cuda' nor 'cpu'"
    for name in ("bytes_per_us", "half_flop_per_us"):
        rate = getattr(profile, name)
        if type(rate) not in (int, float) or not math.isfinite(rate) or rate <= 0:
            return f"{name!r} is not a finite number above 0"
    for name, least, optional in (
        ("memory_bytes", 1, True),
        ("granularity", 1, False),
        ("context_bytes", 0, True),
        ("cublas_bytes", 0, False),
        ("cublaslt_bytes", 0, False),
    ):
        size = getattr(profile, name)
        if not (size is None and optional) and (type(size) is not int or size < least):
            return f"{name!r} is not a whole number of bytes from {least} up"
    return ""


def _wrong(option: str, value: Any, why: str, fix: str) -> OptionError:
    shown = repr(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else f"<{type(value).__name__}>"
    return OptionError(f"ciuic option {option!r}: got {shown[:300]}: {why}\n  valid: {_VALID}\n  fix: {fix}")
