"""Which lines of the user's program made a step grow.

Two records are compared row by row, and rows are summed by the line they come from. A line's growth is the
largest of three: of the bytes alive at the plan's peak, of those alive at the peak of Inductor's own
partition, and of what Inductor saves. The plan alone would blur it: a plan for a ratio spreads what one line
adds over all of them.

Growth shows where tensors are made, which need not be the line that was edited: a cast makes every line
after it grow, a wider layer is written in ``__init__``, a batch size in a function of its own. So lines
that changed since the baseline (``source_lines.py``) come first, as far as something grew in their class or
function; a changed line where nothing grew comes before unchanged lines only if no other changed line
explains anything.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ciuic_compile.gate.record import Fixed, Place, Record, Row
from ciuic_compile.gate.source_lines import Changes, Text, changes
from ciuic_compile.report._format import size

_RELEVANT = 0.05  # of all growth: less in a class or function is a consequence, no cause
_TOLD = 1024  # bytes; a scalar more is not worth a sentence
_SIZE = re.compile(r"(?<![\w.])\d")
_NAMED = re.compile(r"(?:class |def )?(\w+)\s*(?:[(:][^=]*)?(?:=|:$|\):$)")
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Culprit:
    """A line that probably made the step grow.

    Attributes:
        file: relative; empty where the growth has no line (parameters of a library's model).
        line: its number; 0 with an empty file.
        code: the line's text.
        nbytes: how much what it makes grew; 0: it makes nothing itself.
        count: storages more, or grown.
        module: where in the model, with layer indices as stars.
        changed: whether the line is another one than in the baseline.
        why: what happened there, in words.
    """

    file: str
    line: int
    code: str
    nbytes: int
    count: int = 0
    module: str = ""
    changed: bool = False
    why: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """``file:line``, or the module, or ``?``."""
        return f"{self.file}:{self.line}" if self.file else self.module or "?"


@dataclass
class _Growth:
    """What happened on one line: its rows before and now."""

    before: list[Row] = field(default_factory=list)
    now: list[Row] = field(default_factory=list)

    def by(self, figure: str) -> int:
        now, before = (sum(int(getattr(r, figure)) for r in rows) for rows in (self.now, self.before))
        return now - before

    @property
    def nbytes(self) -> int:
        return max(self.by("peak"), self.by("inductor_peak"), self.by("inductor_saved"))


_Line = tuple[str, int]


def find(before: Record, now: Record, limit: int = 5) -> tuple[Culprit, ...]:
    """The likeliest lines first, at most ``limit`` of them."""
    edits = edited(before, now)
    lines = _by_line(before, now, edits)
    growth = {at: max(g.nbytes, 0) for at, g in lines.items()}
    total = sum(growth.values()) + sum(max(n, 0) for _, n in fixed_growth(before, now))
    direct = {at: g for at, g in growth.items() if g > 0}
    scopes: dict[tuple[str, tuple[int, int]], int] = defaultdict(int)
    for at, g in direct.items():
        if not _is_changed(at, edits):
            scopes[at[0], _scope(now.files, at)] += g
    traced = {(at[0], _scope(now.files, at)) for at in lines}
    touched = {(file, _scope(now.files, (file, n))) for file, edit in edits.items() for n in edit.changed}
    elsewhere = sum(g for scope, g in scopes.items() if scope not in touched)
    wider = any(_casts(g) is not None for g in lines.values())
    scored: list[tuple[tuple[int, float, int, int], _Line]] = []
    for file, edit in edits.items():
        for number in edit.changed:
            at = (file, number)
            scope = (file, _scope(now.files, at))
            explained = direct.get(at, 0) + (scopes[scope] if scope[1] != (0, 0) else 0)
            idle = _is_unused(now, at)
            outside = scope not in traced
            size = at not in lines and _SIZE.search(now.files[file].code(number)) is not None
            if outside and not idle and (size or wider):  # what runs before the step shows everywhere
                explained = sum(direct.values())
            elif (outside and not idle) or size:  # a size shows in classes where no line changed
                explained += elsewhere
            relevant = explained >= _RELEVANT * max(total, 1)
            innocent = at in lines and not direct.get(at)  # it makes what it made before
            unlikely = (
                (not outside) + 2 * (not size) + 4 * (number in edit.removed) + 8 * innocent + 16 * idle
            )
            scored.append(((0 if relevant else 1, -explained, unlikely, number), at))
    order, any_changed = _forward_order(lines), bool(scored)
    for at, g in direct.items():
        if not _is_changed(at, edits):
            # where nothing is known to have changed, a cast comes before what it made wider
            cast_first = not any_changed and _casts(lines[at]) is not None
            unknown = not at[0]  # tracing lost the line: last
            scored.append(((2 + unknown, order[at] - 1e18 if cast_first else -g, 0, at[1]), at))
    ranked = [at for _, at in sorted(scored)]
    return tuple(_culprit(at, lines.get(at, _Growth()), now.files, edits) for at in ranked[:limit])


def edited(before: Record, now: Record) -> dict[str, Changes]:
    """Changes of the files that both records know, by their names; of a new file every line."""
    result: dict[str, Changes] = {}
    gone = [name for name in before.files if name not in now.files]
    for name, text in now.files.items():
        old = before.files.get(name)
        if old is None and gone:  # a file that was renamed: the most similar of those that are gone
            likest = max(gone, key=lambda g: len(set(before.files[g].hashes) & set(text.hashes)))
            shared = set(before.files[likest].hashes) & set(text.hashes)
            old = before.files[likest] if len(shared) * 2 > len(set(text.hashes)) else None
        if old is None:
            result[name] = Changes(frozenset(text.numbers)) if before.files else Changes()
        else:
            result[name] = changes(old, text)
    return result


def fixed_growth(before: Record, now: Record) -> list[tuple[Fixed, int]]:
    """Parameters, buffers and inputs whose bytes changed, the largest growth first."""
    changed: list[tuple[Fixed, int]] = []
    for old, new in ((before.parameters, now.parameters), (before.inputs, now.inputs)):
        had = _by_name(old)
        has = _by_name(new)
        for name in {**had, **has}:
            difference = sum(f.nbytes for f in has.get(name, ())) - sum(f.nbytes for f in had.get(name, ()))
            if difference:
                changed.append(((has.get(name) or had[name])[0], difference))
    return sorted(changed, key=lambda pair: (-pair[1], pair[0]))


def _by_name(fixed: Iterable[Fixed]) -> dict[str, list[Fixed]]:
    table: dict[str, list[Fixed]] = {}
    for f in fixed:
        table.setdefault(f.name, []).append(f)
    return table


def summary(before: Record, now: Record) -> list[str]:
    """What is true of the whole step, in sentences: inputs, factors, graphs, outputs, parameters."""
    said = []
    if [(f.name, f.dtype, f.shape) for f in before.inputs] != [
        (f.name, f.dtype, f.shape) for f in now.inputs
    ]:
        said.append(f"the inputs changed: {_fixed_words(before.inputs)} -> {_fixed_words(now.inputs)}")
    factor = common_factor(before, now)
    if factor is not None:
        cause = ": the inputs' shape is the likely cause" if said else ""
        said.append(f"nearly every activation grew by the same factor, {factor:.3g}{cause}")
    if before.graphs != now.graphs:
        breaks = "a graph break is gone"
        if now.graphs > before.graphs:
            breaks = "a graph break; what runs between graphs is neither compressed nor counted"
        said.append(f"{now.graphs} compiled graphs, {before.graphs} before: {breaks}")
    returned = sum(r.returned for r in now.rows) - sum(r.returned for r in before.rows)
    if returned >= _TOLD:
        said.append(
            f"{size(returned)} more are returned by the model, and stay alive until the backward is over"
        )
    for f, difference in fixed_growth(before, now)[:3]:
        if difference > 0 and f in now.parameters:
            said.append(
                f"parameter {f.name} {_shape(f)}: {size(difference)} more, and as much for its gradient"
            )
    return said


def common_factor(before: Record, now: Record) -> float | None:
    """By what each storage grew alike; None where they did not (less than 80% of the bytes)."""
    had = {_unplaced(r.place): r for r in before.rows if r.nbytes and r.count}
    pairs = [(had[key], r) for r in now.rows if r.count and (key := _unplaced(r.place)) in had]
    votes: dict[float, int] = defaultdict(int)
    for old, new in pairs:
        votes[round(new.nbytes / new.count / (old.nbytes / old.count), 3)] += new.nbytes
    if not votes:
        return None
    factor = max(votes, key=lambda f: votes[f])
    every = sum(r.nbytes for r in now.rows)
    return factor if factor > 1.005 and votes[factor] >= 0.8 * every else None


def _unplaced(place: Place) -> tuple[str, str, str, str]:
    return place.module, place.op, place.dtype, place.code


def _by_line(before: Record, now: Record, edits: Mapping[str, Changes]) -> dict[_Line, _Growth]:
    """Rows by the line that they come from now; those of the baseline by where their line is now."""
    lines: dict[_Line, _Growth] = defaultdict(_Growth)
    texts: dict[tuple[str, str], _Line] = {}
    for row in now.rows:
        at = (row.place.file, row.place.line)
        lines[at].now.append(row)
        texts.setdefault((row.place.file, row.place.code), at)
        texts.setdefault(("", row.place.code), at)
    for row in before.rows:
        p = row.place
        moved = edits[p.file].moved.get(p.line) if p.file in edits and edits[p.file].moved else None
        at = (
            (p.file, moved)
            if moved is not None
            else texts.get((p.file, p.code)) or texts.get(("", p.code)) or (p.file, -p.line)
        )
        lines[at].before.append(row)
    return lines


def _is_changed(at: _Line, edits: Mapping[str, Changes]) -> bool:
    return at[0] in edits and at[1] in edits[at[0]].changed


def _scope(files: Mapping[str, Text], at: _Line) -> tuple[int, int]:
    return files[at[0]].scope(at[1]) if at[0] in files else (0, 0)


def _is_unused(record: Record, at: _Line) -> bool:
    """Whether the line gives a value to a name, or is in a class or function, that is nowhere else."""
    text, scope = record.files[at[0]], _scope(record.files, at)
    header = text.code(scope[0]) if scope != (0, 0) else text.code(at[1])
    name = _NAMED.match(header)
    if name is None or name[1] == record.target.rpartition(":")[2]:
        return False
    word = re.compile(rf"\b{name[1]}\b")
    return sum(len(word.findall(line)) for other in record.files.values() for line in other.lines) == 1


def _forward_order(lines: Mapping[_Line, _Growth]) -> dict[_Line, float]:
    return {at: min((r.order for r in g.now), default=10**9) for at, g in lines.items()}


def _casts(growth: _Growth) -> tuple[str, str] | None:
    """The dtypes before and now, where a line makes wider floats than it did."""
    had = {r.place.dtype for r in growth.before if r.place.dtype in _WIDTHS and r.nbytes}
    has = {r.place.dtype for r in growth.now if r.place.dtype in _WIDTHS and r.nbytes}
    if not had or not has or had == has:
        return None
    old, new = max(had, key=lambda d: _WIDTHS[d]), max(has, key=lambda d: _WIDTHS[d])
    return (old, new) if _WIDTHS[new] > _WIDTHS[old] else None


def _culprit(at: _Line, growth: _Growth, files: Mapping[str, Text], edits: Mapping[str, Changes]) -> Culprit:
    file, line = at
    largest = max(growth.now, key=lambda r: max(r.peak, r.inductor_peak, r.nbytes), default=None)
    code = files[file].code(line) if file in files else largest.place.code if largest else ""
    changed = _is_changed(at, edits)
    return Culprit(
        file=file,
        line=max(line, 0),
        code=code,
        nbytes=max(growth.nbytes, 0),
        count=max(sum(r.count for r in growth.now), 1) if growth.nbytes > 0 else 0,
        module=largest.place.module if largest else "",
        changed=changed,
        why=tuple(_why(growth, file in edits and line in edits[file].removed, changed)),
    )


def _why(growth: _Growth, removed: bool, changed: bool) -> list[str]:
    said = []
    if removed:
        said.append("lines were removed above it")
    elif changed:
        said.append("changed since the baseline")
    if (cast := _casts(growth)) is not None:
        said.append(f"dtype {cast[0]} -> {cast[1]}")
    if growth.now and not growth.before:
        said.append("makes tensors that the baseline does not have")
    elif growth.nbytes > 0:
        count = growth.by("count")
        if count > 0:
            said.append(f"{count} more tensors")
        if growth.by("inductor_saved") > 0 and growth.by("nbytes") <= 0:
            said.append("saved for the backward, and was recomputed before (a checkpoint that is gone?)")
        elif growth.by("nbytes") > 0 and count <= 0 and cast is None:
            said.append(f"larger: {_shapes(growth.before)} -> {_shapes(growth.now)}")
        elif growth.by("saved") > 0 and growth.by("inductor_saved") <= 0:
            said.append(f"stored as {_how(growth.now)}, before as {_how(growth.before)}")
    if growth.by("returned") > 0:
        said.append("is returned by the model now")
    return said


def _shapes(rows: Iterable[Row]) -> str:
    shapes = sorted({s for r in rows for s in r.shapes}, reverse=True)
    return ", ".join("x".join(map(str, s)) or "scalar" for s in shapes[:2]) or "?"


def _how(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(r.codecs for r in rows if r.codecs)) or "?"


def _shape(f: Fixed) -> str:
    return f"{f.dtype}[{','.join(map(str, f.shape))}]" + (f" x{f.count}" if f.count > 1 else "")


def _fixed_words(fixed: Iterable[Fixed]) -> str:
    return ", ".join(f"{f.name} {_shape(f)}" for f in fixed) or "none"
