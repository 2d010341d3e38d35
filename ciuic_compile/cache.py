"""Plans beside Inductor's on-disk caches: a warm start compiles nothing, yet prints the same plan."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.runtime.cache_dir_utils import cache_dir

from . import compat
from .config import CompileConfig
from .errors import PlanFileError
from .report import from_json, to_json
from .types import Plan
from .writing import write_file


def graph_key(
    gm: fx.GraphModule, example_inputs: Sequence[object], config: CompileConfig, device: str
) -> str:
    """A hash of everything that determines a plan: graph, inputs, options, device, torch, our sources.

    The source lines of the user's program are in it too, because the report names them.
    """
    parts = [config.fingerprint(), torch.__version__, device, _sources_hash()]
    for name, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):
            parts.append(name)
            for node in module.graph.nodes:
                parts.append(f"{node.format_node()} {node.kwargs} {node.meta.get('stack_trace', '')}")
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            sizes = [compat.hint(s) for s in (*value.shape, *value.stride())]
            symbols = [str(s) for s in value.shape]
            parts.append(f"{value.dtype} {value.device} {sizes} {symbols} {value.requires_grad}")
        else:
            parts.append(f"{value} {compat.hint(value) if isinstance(value, torch.SymInt) else ''}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _sources_hash() -> str:
    root = Path(__file__).parent
    files = sorted(str(p) for folder in (root, root / "passes") for p in folder.rglob("*.py"))
    return get_hash_for_files(tuple(dict.fromkeys(files))).hex()


def _path(key: str) -> Path:
    return Path(cache_dir()) / "ciuic" / f"{key}.json"


def store(key: str, plan: Plan) -> None:
    """Write the plan atomically; a full or read-only disk only costs the warm start its report."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(plan))
    except OSError:
        return


def load(key: str) -> Plan | None:
    """The stored plan, or None when there is none that can be read."""
    try:
        return from_json(_path(key).read_text())
    except (OSError, PlanFileError):
        return None
