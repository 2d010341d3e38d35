"""What a baseline remembers of a planned training step, and how it is taken from plans."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ciuic_compile import compat
from ciuic_compile.gate.settings import Entry
from ciuic_compile.gate.source_lines import Text, user_files
from ciuic_compile.report._format import op_label, star
from ciuic_compile.types import Action, Decision, Plan
from ciuic_compile.versions import version

_OP: Final = re.compile(r"([^/]+)#\d+")  # in a block's id


@dataclass(frozen=True, order=True)
class Place:
    """What storages of one row have in common; equal layers of a model are one row.

    Attributes:
        module: path with layer indices as stars, e.g. ``"blocks.*.mlp"``.
        op: e.g. ``"aten.gelu.default"``.
        dtype: e.g. ``"bfloat16"``.
        code: the user's line as text.
        file: the user's file, relative.
        line: its number.
    """

    module: str
    op: str
    dtype: str
    code: str = ""
    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Row:
    """The storages of one place: how many, and their bytes.

    Attributes:
        count: storages that the forward makes and the backward could need.
        nbytes: all of them, uncompressed.
        saved: bytes that the plan keeps from forward to backward.
        inductor_saved: bytes that Inductor's own partition would.
        peak: bytes alive at the plan's peak.
        inductor_peak: bytes alive at the peak of Inductor's own partition.
        returned: bytes alive at the plan's peak because the user gets them.
        codecs: how they are stored, e.g. ``"int8_group x12, recompute x2"``.
        shapes: the distinct shapes, largest first.
        order: where in the forward the first of them is; not kept in a baseline.
    """

    place: Place
    count: int = 0
    nbytes: int = 0
    saved: int = 0
    inductor_saved: int = 0
    peak: int = 0
    inductor_peak: int = 0
    returned: int = 0
    codecs: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    order: int = field(default=0, compare=False)


@dataclass(frozen=True, order=True)
class Fixed:
    """Parameters, buffers or inputs that are alike, alive all along."""

    name: str  # with layer indices as stars; of inputs their position or keyword
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int


@dataclass(frozen=True)
class Record:
    """One entry's figures. Bytes of ``peak`` and ``saved`` are above parameters and inputs.

    ``inputs`` and ``parameters`` are what ``input_bytes`` is made of. ``files``: hashes of the user's lines.
    """

    target: str
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    peak_bytes: int
    saved_bytes: int
    inductor_peak_bytes: int
    inductor_saved_bytes: int
    input_bytes: int
    time_us: float
    error: float
    graphs: int
    dynamic: bool = False
    inputs: tuple[Fixed, ...] = ()
    parameters: tuple[Fixed, ...] = ()
    rows: tuple[Row, ...] = ()
    files: Mapping[str, Text] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Planned peak with parameters and inputs."""
        return self.peak_bytes + self.input_bytes


def record(
    plans: Sequence[Plan],
    entry: Entry,
    model: nn.Module | None = None,
    inputs: object = (),
    root: Path | None = None,
    *,
    files: bool = True,
    also: Sequence[Path] = (),
) -> Record:
    """Sum up the plans of one step.

    Args:
        model: for parameters and source files; None: neither is known.
        inputs: what it is called with.
        root: what files are relative to; None: the working directory.
        files: whether the user's files as they are now are those that were planned.
        also: more of them, which neither target nor model name.

    Where Dynamo made several graphs, each one's peak comes on top of what the graphs before it save: the
    step's peak is the largest of these sums.
    """
    rows, peaks = _rows(plans)
    parameters, example = _parameters(model), _inputs(inputs)
    fixed = sum(f.nbytes for f in (*parameters, *example))
    traced = {row.place.file for row in rows if row.place.file} | {str(path) for path in also}
    texts = user_files(model, entry.target, traced, root or Path.cwd()) if files else {}
    return Record(
        target=entry.target,
        settings=settings_of(entry),
        environment=environment(model),
        peak_bytes=peaks[0],
        saved_bytes=sum(p.planned_saved_bytes for p in plans),
        inductor_peak_bytes=peaks[1],
        inductor_saved_bytes=sum(p.baseline_saved_bytes for p in plans),
        input_bytes=fixed or max((p.input_bytes for p in plans), default=0),
        time_us=sum(p.time_us for p in plans),
        error=max((p.gradient_error for p in plans), default=0.0),
        graphs=len(plans),
        dynamic=any(p.dynamic for p in plans),
        inputs=example,
        parameters=parameters,
        rows=rows,
        files=texts,
    )


def settings_of(entry: Entry) -> dict[str, Any]:
    """What of an entry decides its plan."""
    options = {key: entry.options[key] for key in sorted(entry.options)}
    return {
        "device": entry.device, "autocast": entry.autocast, "dynamic": entry.dynamic, "options": options,
        **{key: entry.shape[key] for key in sorted(entry.shape)},
    }  # fmt: skip


def environment(model: nn.Module | None = None) -> dict[str, str]:
    """Versions that a plan may depend on: torch's, ours, and of the packages that define the model."""
    found = {
        "torch": torch.__version__.partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    packages = {"ciuic-compile"}
    roots = {type(m).__module__.partition(".")[0] for m in model.modules()} if model is not None else set()
    owners = metadata.packages_distributions() if roots - {"torch", "__main__"} else {}
    for root in roots - {"torch", "__main__"}:
        packages.update(owners.get(root, ()))
    return found | {package: text for package in sorted(packages) if (text := version(package))}


def _rows(plans: Sequence[Plan]) -> tuple[tuple[Row, ...], tuple[int, int]]:
    """Rows of all plans, and the step's peaks: ours and Inductor's."""
    table: dict[Place, Row] = {}
    codecs: dict[Place, Counter[str]] = {}
    before = ours = inductor = 0
    ours_at = inductor_at = 0
    for i, plan in enumerate(plans):
        held = sum(p.planned_saved_bytes for p in plans[:i])
        if held + plan.planned_peak_bytes > ours:
            ours, ours_at = held + plan.planned_peak_bytes, i
        before = sum(p.baseline_saved_bytes for p in plans[:i])
        if before + plan.baseline_peak_bytes > inductor:
            inductor, inductor_at = before + plan.baseline_peak_bytes, i
    for i, plan in enumerate(plans):
        for d in plan.decisions:
            place = _place(d)
            row = table.get(place) or Row(place, order=len(table))
            codecs.setdefault(place, Counter())[_codec(d)] += 1
            table[place] = replace(
                row,
                count=row.count + 1,
                nbytes=row.nbytes + d.storage.nbytes,
                saved=row.saved + d.saved_bytes,
                inductor_saved=row.inductor_saved + d.baseline_bytes,
                # of the graph at the peak, the timeline knows better; without one, saved tensors stand for it
                peak=row.peak + d.saved_bytes * (i < ours_at or not _timeline(plan)),
                inductor_peak=row.inductor_peak + d.baseline_bytes * (i < inductor_at or not _timeline(plan)),
                shapes=_shapes((*row.shapes, d.storage.shape)),
            )
        if i == ours_at:
            _add_alive(table, plan, "planned")
        if i == inductor_at:
            _add_alive(table, plan, "baseline")
    done = (replace(r, codecs=_words(codecs.get(p, Counter()))) for p, r in table.items())
    return tuple(sorted(done, key=lambda row: row.place)), (ours, inductor)


def _timeline(plan: Plan) -> Any:
    return getattr(plan, "timeline", None)


def _add_alive(table: dict[Place, Row], plan: Plan, track: str) -> None:
    """Add what is alive at the peak of a plan's own track, or at that of Inductor's ("baseline")."""
    timeline = _timeline(plan)
    if timeline is None:
        return
    made = {replace(place, dtype=""): place for place in table}
    shown = getattr(timeline, track)
    for block in shown.alive(shown.peak_step):
        line = timeline.line(block)
        named = _OP.search(block.id)
        op = op_label(named[1]) if named else ""
        place = Place(star(block.module), op, block.dtype, line.code, _relative(line.file), line.line)
        if block.codec is not None:  # a payload has a dtype of its own: it belongs to what it was made from
            place = made.get(replace(place, dtype=""), place)
        row = table.get(place) or Row(place, order=len(table))
        if track == "planned":
            returned = block.nbytes if block.role.value == "returned" else 0
            row = replace(row, peak=row.peak + block.nbytes, returned=row.returned + returned)
        else:
            row = replace(row, inductor_peak=row.inductor_peak + block.nbytes)
        table[place] = replace(row, shapes=_shapes((*row.shapes, block.shape)))


def _relative(file: str) -> str:
    """A path as a reader of the repository knows it; what is installed, below its package's folder."""
    slashed = file.replace("\\", "/")
    for installed in ("/site-packages/", "/dist-packages/"):
        if installed in slashed:
            return slashed.rpartition(installed)[2]
    path = Path(file)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else slashed


def _place(d: Decision) -> Place:
    s = d.storage
    return Place(
        star(s.source.module), op_label(s.op), s.dtype, s.source.code, _relative(s.source.file), s.source.line
    )


def _codec(d: Decision) -> str:
    return (d.codec or "compress") if d.action is Action.COMPRESS else d.action.value


def _words(codecs: Counter[str]) -> str:
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in sorted(codecs.items()))


def _shapes(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(sorted(set(shapes), reverse=True))[:4]


def _parameters(model: nn.Module | None) -> tuple[Fixed, ...]:
    if model is None:
        return ()
    named = [*model.named_parameters(), *model.named_buffers()]  # both list what is shared once
    return _fixed((name, value) for name, value in named)


def _inputs(inputs: object) -> tuple[Fixed, ...]:
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    paths, _ = torch.utils._pytree.tree_flatten_with_path(inputs)
    tensors = [
        (torch.utils._pytree.keystr(path).strip("[]'\""), value)
        for path, value in paths
        if isinstance(value, torch.Tensor)
    ]
    return _fixed(((name, value) for name, value in tensors), stars=False)


def _fixed(named: Any, stars: bool = True) -> tuple[Fixed, ...]:
    table: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, value in named:
        shape = tuple(int(compat.hint(size)) for size in value.shape)
        nbytes = int(compat.hint(value.numel())) * value.dtype.itemsize
        dtype = str(value.dtype).removeprefix("torch.")
        sums = table.setdefault((star(name) if stars else name, dtype, shape), [0, 0])
        sums[0] += 1
        sums[1] += nbytes
    return tuple(sorted(Fixed(*key, *sums) for key, sums in table.items()))
