"""Stage 3: what could live from forward to backward, what each storage may become, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from . import compat
from .calibration import GraphCalibration
from .capture import CapturedGraph, owner, tensor
from .classify import Classifier
from .codecs import Codec, get_codec
from .config import CompileConfig
from .devices import DeviceProfile, profile_for
from .energy import Energy
from .fingerprint import fingerprint
from .identity import stable_ids
from .simulate import tensor_bytes
from .sources import source_of
from .types import Source, Storage

BITMASK = "bitmask"
SHORT_OF_MEMORY = 1 / 8  # of the device's memory
LOSSY_CODECS = ("int8_group{}", "int6_group{}", "int5_group{}", "int4_group{}_affine", "int4_group{}")
"""Names by group size, most precise first."""


@dataclass(frozen=True)
class MemoryModel:
    """Storages of one joint graph under one configuration.

    Attributes:
        captured: the joint graph.
        config: the user's options.
        original: the model of the user's own graph, where this one computes the loss in chunks: the baseline.
    """

    captured: CapturedGraph
    config: CompileConfig
    original: MemoryModel | None = None

    @cached_property
    def classes(self) -> Classifier:
        """Classes of the forward values (numerics rules)."""
        return Classifier(self.captured)

    @cached_property
    def energy(self) -> Energy:
        """How large the values are relative to each other, guessed."""
        return Energy(self.captured, self.classes)

    @cached_property
    def device(self) -> DeviceProfile:
        """The device to plan for: the user's, else an accelerator where one of the values is on one."""
        if self.config.device is not None:
            return self.config.device
        values = (tensor(n) for n in self.captured.savable)
        devices = [v.device for v in values if v is not None]
        accelerators = [d for d in devices if d.type != "cpu"]
        return profile_for((accelerators or devices or [torch.device("cpu")])[0])

    @property
    def kind(self) -> str | None:
        """The type of device that every value counts as being on; None: what each is on."""
        return None if self.config.device is None else self.config.device.kind

    @cached_property
    def baseline(self) -> dict[fx.Node, int]:
        """What Inductor's min-cut saves: storage owner -> bytes, parameters and inputs excluded."""
        return self.storages_of(self.captured.baseline_saved)

    @cached_property
    def baseline_bytes(self) -> int:
        """Bytes that Inductor would save of the user's own graph."""
        return sum((self.original or self).baseline.values())

    @cached_property
    def short_of_memory(self) -> bool:
        """Whether a ratio is asked of a graph so large that memory rather than time is what its user lacks.

        So it is where Inductor would save an eighth of the device's memory or more between forward and
        backward: parameters, gradients and an optimizer's state take their share beside it.
        """
        memory = self.device.memory_bytes
        return self.config.lossy and memory is not None and self.baseline_bytes >= SHORT_OF_MEMORY * memory

    @cached_property
    def baseline_here(self) -> dict[fx.Node, int]:
        """:attr:`baseline` of the user's own graph, as far as its nodes are in this one."""
        if self.original is None:
            return self.baseline
        names = {node.name: node for node in self.captured.graph.nodes}
        found = self.original.baseline.items()
        return {names[node.name]: size for node, size in found if node.name in names}

    @cached_property
    def dissolved(self) -> dict[fx.Node, int]:
        """What Inductor would save and this graph does not have in one piece: logits, in chunks."""
        if self.original is None:
            return {}
        here = {node.name for node in self.captured.graph.nodes}
        return {node: size for node, size in self.original.baseline.items() if node.name not in here}

    @cached_property
    def calibration(self) -> GraphCalibration | None:
        """What the user's calibration knows of this graph; None without one, and where it is of another."""
        if self.config.calibration is None:
            return None
        found = self.config.calibration.graphs.get(fingerprint((self.original or self).captured))
        matches = found is not None and len(found.shares) == len(self.captured.bwd_outputs)
        return found if matches else None

    def storages_of(self, saved: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """Owners of the storages behind saved nodes, with their bytes; parameters and inputs excluded."""
        return {
            base: tensor_bytes(base.meta.get("val"))
            for base in dict.fromkeys(owner(n) for n in saved if tensor(n) is not None)
            if base.op not in ("placeholder", "get_attr")
        }

    def codecs(self, node: fx.Node) -> list[Codec]:
        """Codecs that are legal for the storage of ``node``; empty when it must be kept."""
        if node not in self._codecs:  # asked for several times a node
            self._codecs[node] = self._legal_codecs(node)
        return self._codecs[node]

    @cached_property
    def _codecs(self) -> dict[fx.Node, list[Codec]]:
        return {}

    def _legal_codecs(self, node: fx.Node) -> list[Codec]:
        value = tensor(node)
        if value is None or tensor_bytes(value) < self.config.min_bytes or self.excluded_because(node):
            return []
        if value.dtype == torch.bool and node not in self.classes.pinned:
            return [get_codec(BITMASK)]
        if not self.config.lossy or self.classes.kept_because(node):
            return []
        group = self.config.group_size
        fewest = self.classes.min_bits(node, group)
        names = (name.format(group) for name in LOSSY_CODECS)
        return [c for c in map(get_codec, names) if c.bits >= fewest]

    def stored_bytes(self, node: fx.Node) -> float:
        """Bytes the value would take once stored the way this mode is likely to store it."""
        size = tensor_bytes(node.meta.get("val"))
        codecs = self.codecs(node)
        if not codecs:
            return float(size)
        value = tensor(node)
        assert value is not None
        aggressive = self.config.ratio is not None and self.config.ratio >= 3
        codec = codecs[-1] if aggressive else codecs[0]
        return float(codec.encoded_bytes(compat.hint(value.numel()), value.dtype.itemsize))

    def excluded_because(self, node: fx.Node) -> str | None:
        """Why the user's ``allow``/``deny`` leave this value alone."""
        if not (self.config.allow or self.config.deny):
            return None
        return self.config.excluded_because(self.source(node).module, str(node.target))

    def kept_because(self, node: fx.Node) -> str | None:
        """Why no codec is legal here, or None."""
        if self.codecs(node):
            return None
        if tensor_bytes(node.meta.get("val")) < self.config.min_bytes:
            return f"smaller than min_bytes ({self.config.min_bytes} B)"
        return self.excluded_because(node) or self.classes.kept_because(node) or "mode is lossless"

    def source(self, node: fx.Node) -> Source:
        """The user's line and module that made this value."""
        return source_of(node)

    @cached_property
    def ids(self) -> Mapping[str, str]:
        """Stable ids of the joint graph's values, by node name."""
        return stable_ids(self.captured)

    def storage(self, node: fx.Node) -> Storage:
        """The plan's view of a storage."""
        value = tensor(node)
        assert value is not None
        numel = compat.to_sympy(value.numel())
        return Storage(
            name=node.name,
            id=self.ids[node.name],
            shape=tuple(compat.hint(s) for s in value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            nbytes=tensor_bytes(value),
            symbolic_bytes=str(numel * value.dtype.itemsize),
            kind=self.classes.storage_kind(node),
            op=str(node.target),
            source=self.source(node),
            kept_because=self.kept_because(node),
            min_bits=self.classes.min_bits(node, self.config.group_size),
        )


def analyze(
    captured: CapturedGraph, config: CompileConfig, original: MemoryModel | None = None
) -> MemoryModel:
    """Build the memory model of a captured graph (lazy: nothing is computed before it is read)."""
    return MemoryModel(captured, config, original)
