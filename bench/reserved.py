"""Why a step reserves another amount than was planned: the real allocator's events beside the replayed ones.

    python -m bench.reserved --out reserved.json.gz     # on a GPU: measures, writes the file
    python -m bench.reserved --read reserved.json.gz    # anywhere: what the file says

Each cell is one of ``bench.peaks``, measured as there, with torch recording every event of the allocator:
"kept" is its second step from an emptied cache, where cuBLAS's workspaces keep the segments that they were
given while kernels were tuned; "clean" is the second step after those were given back as well.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import json
import linecache
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import common, peaks
from ciuic_compile import backend, confirm
from ciuic_compile.allocator import ROUND, CachingAllocator, _Block
from ciuic_compile.replay import FREE, Event, Joint, Trace, replay

CELLS = (  # model, mode, batch, length; those that compile longest first
    ("unet", "4:1", 64, 64),
    ("resnet50", "6:1", 32, 160),
    ("vit", "6:1", 32, 160),
    ("gpt", "lossless", 4, 512),
    ("gpt", "4:1", 4, 512),
    ("moe", "4:1", 8, 1024),
    ("encdec", "4:1", 8, 256),
    ("llama", "6:1", 8, 1024),
    ("vit", "6:1", 64, 224),
    ("moe", "2:1", 4, 512),
    ("gpt", "6:1", 8, 1024),
    ("llama", "4:1", 2, 2048),
)
Row = tuple[str, int, int, str]  # action, address, bytes asked for, the line of code that asked
MIB = 2**20

# ---------------------------------------------------------------- one cell, in its own process


def record() -> None:
    """From now on, note every event of the allocator."""
    torch.cuda.init()
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", clear_history=True)


def recorded() -> list[Row]:
    """The events since ``record()``; no more are noted."""
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    return [(e["action"], e.get("addr", 0), e["size"], _where(e.get("frames") or ())) for e in trace]


def _where(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost line of generated code, else the innermost line that there is."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_")
    named = [f for f in frames if f["filename"] != "??"]
    for frame in named:
        if cache in frame["filename"]:
            return linecache.getline(frame["filename"], frame["line"]).strip()[:160]
    return f"{Path(named[0]['filename']).name}:{named[0]['line']} {named[0]['name']}" if named else ""


def segments() -> list[dict[str, Any]]:
    """The allocator's segments and their blocks: (address, bytes, in use)."""
    return [
        {
            "address": s["address"],
            "bytes": s["total_size"],
            "small": s["segment_type"] == "small",
            "blocks": [(b["address"], b["size"], b["state"] != "inactive") for b in s["blocks"]],
        }
        for s in torch.cuda.memory._snapshot()["segments"]
    ]


def cell(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One of ``bench.peaks``'s cells, and what the allocator did in it."""
    planned: dict[str, Any] = {}
    details: dict[str, Any] = {}
    real_confirm, real_measure = confirm.confirm, peaks.measured_step

    def confirming(plan: Any, recording: Any, joint: Joint, inputs: Sequence[object]) -> Any:
        if recording.forward is not None and recording.backward is not None:
            planned.update(
                forward=asdict(recording.forward),
                backward=asdict(recording.backward),
                joint=asdict(joint),
                resident=confirm._storage_sizes(inputs),
                workspaces=plan.profile.workspaces,
            )
        return real_confirm(plan, recording, joint, inputs)

    def measuring(step: Callable[[], None], model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
        try:
            warm_up = recorded()
        except Exception:
            warm_up = [("failed", 0, 0, traceback.format_exc())]
        details["warm_up"] = [r for r in warm_up if r[2] >= MIB or r[0].startswith(("segment", "failed"))]
        measured = real_measure(step, model, device)
        try:
            details.update(_recorded_steps(step, model))
        except Exception:
            details["problem"] = traceback.format_exc()
        return measured

    with (
        mock.patch.object(backend, "confirm", confirming),
        mock.patch.object(peaks, "measured_step", measuring),
    ):
        record()
        result = peaks.cell(dict(spec))
    return {**result, "planned": planned, **details}


def _recorded_steps(step: Callable[[], None], model: torch.nn.Module) -> dict[str, Any]:
    """Two steps from an emptied cache, twice: see the module's docstring."""
    found: dict[str, Any] = {}
    for name in ("kept", "clean"):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if name == "clean":
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        found[name] = {"start": segments(), "allocated": torch.cuda.memory_allocated(), "steps": []}
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            record()
            step()
            events = recorded()
            found[name]["steps"].append(
                {
                    "events": events,
                    "before": before,
                    "allocated": torch.cuda.max_memory_allocated(),
                    "reserved": torch.cuda.max_memory_reserved(),
                }
            )
        found[name]["end"] = segments()
    return found


# ---------------------------------------------------------------- what they come to


class Logged(CachingAllocator):
    """An allocator that notes what is asked of it: ("alloc" or "free", handle, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, int]] = []
        self.given: list[tuple[int, int]] = []  # bytes and addresses of the next segments, in order

    def alloc(self, nbytes: int) -> int:
        handle = super().alloc(nbytes)
        self.log.append(("alloc", handle, nbytes))
        return handle

    def free(self, handle: int) -> None:
        self.log.append(("free", handle, 0))
        super().free(handle)

    def _segment(self, size: int, small: bool) -> _Block:
        block = super()._segment(size, small)
        same = next((g for g in self.given if g[0] == block.size), None)
        if same is not None:
            self.given.remove(same)
            del self._blocks[block.address]
            block.address = same[1]
            self._blocks[block.address] = block
        return block

    @classmethod
    def at(cls, found: Sequence[Mapping[str, Any]]) -> Logged:
        """An allocator that holds these segments."""
        made = cls()
        for segment in sorted(found, key=lambda s: int(s["address"])):
            previous: _Block | None = None
            for address, size, used in segment["blocks"]:
                block = _Block(address, size, segment["small"], previous, None, used)
                if previous is not None:
                    previous.next = block
                made._blocks[address] = block
                previous = block
                if used:
                    made.allocated += size
                else:
                    made._free[block.small].append(block.key)
            made.reserved += segment["bytes"]
            made._end = segment["address"] + segment["bytes"] + 2 * MIB
        for keys in made._free.values():
            keys.sort()
        return made


def traces(planned: Mapping[str, Any]) -> tuple[Trace, Trace, Joint]:
    """The recorded plan of a step, from the file."""

    def trace(d: Mapping[str, Any]) -> Trace:
        events: list[Event] = []
        for e in d["events"]:
            events.append(Event(e["storage"], e["nbytes"], lasting=e.get("lasting", False)))
            if e.get("transient"):  # in older files: given back at once
                events.append(Event(e["storage"], FREE))
        return Trace(tuple(d["inputs"]), tuple(d["outputs"]), tuple(events))

    return trace(planned["forward"]), trace(planned["backward"]), Joint(**planned["joint"])


Step = list[tuple[str, int, str]]  # "alloc" or "free", bytes rounded, name or line


def planned_step(planned: Mapping[str, Any], allocator: Logged) -> Step:
    """One replayed step's events with the names of buffers; the allocator plays two."""
    forward, backward, joint = traces(planned)
    alone = Logged()
    replay(forward, backward, joint, alone, steps=1, workspaces=planned.get("workspaces"))
    replay(forward, backward, joint, allocator, workspaces=planned.get("workspaces"))
    names = iter(
        [
            *(e.storage for e in forward.events if e.nbytes != FREE and not e.lasting),
            *(f"tangent {name}" for name in joint.tangents),
            *(e.storage for e in backward.events if e.nbytes != FREE and not e.lasting),
        ]
    )
    live: dict[int, tuple[int, str]] = {}
    step: Step = []
    for action, handle, nbytes in allocator.log[len(alone.log) :]:
        if action == "alloc":
            live[handle] = _rounded(nbytes), next(names)
        if handle >= 0:  # of no bytes, nothing is asked
            step.append((action, *live[handle]))
    return step


def real_step(events: Sequence[Row]) -> Step:
    """The same of a real step; what it freed without having made it is left out."""
    live: dict[int, tuple[int, str]] = {}
    step: Step = []
    for action, address, nbytes, line in events:
        if action == "alloc":
            live[address] = _rounded(nbytes), line
            step.append(("alloc", *live[address]))
        elif action == "free_completed" and address in live:
            step.append(("free", *live.pop(address)))
    return step


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ROUND) * ROUND


def play_real(run: Mapping[str, Any], placed: bool) -> int:
    """Our allocator's reserved bytes when it is asked what the real one was.

    Args:
        placed: new segments get the addresses that the driver gave: equal blocks are told apart by them.
    """
    allocator = Logged.at(run["start"])
    in_the_end = {address for segment in run["end"] for address, _, used in segment["blocks"] if used}
    handles: dict[int, int] = {}
    for step in run["steps"]:
        made = {address for action, address, *_ in step["events"] if action == "alloc"}
        for address in list(handles):  # gradients go between the steps, where nothing is recorded
            if address in made or address not in in_the_end:
                allocator.free(handles.pop(address))
        allocator.given = [
            (nbytes, address)
            for action, address, nbytes, _ in step["events"]
            if placed and action == "segment_alloc"
        ]
        for action, address, nbytes, _ in step["events"]:
            if action == "alloc":
                handles[address] = allocator.alloc(nbytes)
            elif action == "free_completed":
                allocator.free(handles.pop(address, address))
    return allocator.reserved


def at_peak(step: Step) -> tuple[int, Counter[tuple[int, str]]]:
    """The most bytes that a step's own allocations take, and which are alive then."""
    total = most = 0
    live: Counter[tuple[int, str]] = Counter()
    peak: Counter[tuple[int, str]] = Counter()
    for action, nbytes, name in step:
        sign = 1 if action == "alloc" else -1
        total += sign * nbytes
        live[nbytes, name] += sign
        if total > most:
            most, peak = total, +live
    return most, peak


def difference(mine: Counter[tuple[int, str]], other: Counter[tuple[int, str]]) -> list[str]:
    """What is in one and not in the other, by size; the largest first."""
    sizes = Counter(size for size, _ in other.elements())
    lines = []
    for size, name in sorted(mine.elements(), reverse=True):
        if sizes[size]:
            sizes[size] -= 1
        else:
            lines.append(f"{size / MIB:9.3f} MiB  {name}")
    return lines


def alignment(real: Step, planned: Step) -> list[str]:
    """Where two steps' events differ, in order: '+' only real, '-' only planned."""
    matcher = difflib.SequenceMatcher(None, [e[:2] for e in real], [e[:2] for e in planned], autojunk=False)
    lines = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag != "equal":
            lines += [f"@{i:4d} + {a:5s} {n / MIB:9.3f} {name}" for a, n, name in real[i:j]]
            lines += [f"@{i:4d} - {a:5s} {n / MIB:9.3f} {name}" for a, n, name in planned[k:m]]
    return lines


COLUMNS = (
    "cell", "allocated", "real", "start", "kept", "clean", "reserved: planned", "real clean",
    "ours, real events", "and addresses", "ours, real start", "err %", "real kept", "lines",
)  # fmt: skip


def compared(r: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A row of the table, and lines that say where the steps differ. All of it in MiB."""
    planned, predicted, clean, kept = r["planned"], r["predicted"], r["clean"], r["kept"]
    residents = Logged()
    for size in planned["resident"]:
        residents.alloc(size)
    start = residents.reserved
    expected = planned_step(planned, Logged.at(clean["start"]))
    from_start = Logged.at(clean["start"])
    replay(*traces(planned), from_start, workspaces=planned.get("workspaces"))
    last = clean["steps"][-1]
    real = real_step(kept["steps"][-1]["events"])
    differences = alignment(real, expected)
    (real_most, real_live), (most, live) = at_peak(real), at_peak(expected)
    row = [
        peaks.label(r),
        common.mib(predicted["planned_peak_bytes"]),
        common.mib(r["measured"]["allocated"]),
        common.mib(start),
        common.mib(sum(s["bytes"] for s in kept["start"])),
        common.mib(sum(s["bytes"] for s in clean["start"])),
        common.mib(predicted["reserved_bytes"]),
        common.mib(last["reserved"]),
        common.mib(play_real(clean, placed=False)),
        common.mib(play_real(clean, placed=True)),
        common.mib(from_start.reserved),
        peaks.percent(predicted["reserved_bytes"] / last["reserved"] - 1),
        common.mib(kept["steps"][-1]["reserved"]),
        str(len(differences)),
    ]
    said = [
        f"== {peaks.label(r)}: peak of its own allocations {real_most / MIB:.3f}, replayed {most / MIB:.3f}",
        "  alive at the real peak only:",
        *(f"    {line}" for line in difference(real_live, live)[:12]),
        "  alive at the replayed peak only:",
        *(f"    {line}" for line in difference(live, real_live)[:12]),
        "  made in a clean step and not in a kept one (workspaces):",
        *_workspaces(clean, kept),
        f"  {len(differences)} events differ:",
        *(f"    {line}" for line in differences[:40]),
    ]
    return row, said


def _workspaces(clean: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    def made(run: Mapping[str, Any]) -> Counter[tuple[int, str]]:
        step = real_step(run["steps"][0]["events"])
        return Counter((nbytes, name) for action, nbytes, name in step if action == "alloc")

    return [f"    {line}" for line in difference(made(clean), made(kept))]


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Where each cell differs, and the table last."""
    rows = []
    for r in results:
        problem = r.get("failed") or r.get("problem")
        if problem or not r.get("planned"):
            print(f"== {peaks.label(r)}: {problem or 'not replayed'}")
            continue
        row, said = compared(r)
        rows.append(row)
        print("\n".join(said))
    common.table("reserved memory of the second step, MiB", COLUMNS, rows)


def main() -> None:
    """Measure or read, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--read", help="file to read instead of measuring")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=142.0, help="seconds a cell may take")
    parser.add_argument("--limit", type=float, default=146.0, help="seconds for everything")
    parser.add_argument("--out", help="file to write, JSON under gzip")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    if args.read:
        show(json.loads(gzip.decompress(Path(args.read).read_bytes()))["results"])
        return
    end = time.monotonic() + args.limit
    shared = {"precision": "autocast", "size": "medium", "device": "cuda", "budget": None, "fraction": None}
    specs = [
        {"model": m, "config": c, "batch": b, "length": n, **shared, "empty_kernels": False}
        for m, c, b, n in CELLS[: args.cells]
    ]
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    report = {"environment": common.environment(common.pick_device()), "command": " ".join(sys.argv)}
    results: list[dict[str, Any]] = []

    def write(result: dict[str, Any]) -> None:
        results.append(result)
        if args.out:
            text = json.dumps({**report, "results": results})
            Path(args.out).write_bytes(gzip.compress(text.encode()))

    with tempfile.TemporaryDirectory() as caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        common.run_cells("bench.reserved", specs, args.timeout, args.jobs, peaks.label, end, write)
    show(results)


if __name__ == "__main__":
    main()
