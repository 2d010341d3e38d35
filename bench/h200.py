"""Everything that needs a GPU, in one call: `PYTHONPATH=. python3 bench/h200.py --out "$OUT"`.

Tests, saved bytes, step times, the demo at its larger size, convergence; each with a time limit of its own,
each selectable with --only. Leaves h200.json (all results), h200.log (all output) and the pictures in --out;
prints a short table last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import common


@dataclass(frozen=True)
class Item:
    """One command. ``{tmp}`` in it stands for a scratch folder; ``results`` names what it writes there."""

    name: str
    command: Sequence[str]
    timeout: float
    results: str = ""
    picture: str = ""


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
ITEMS = (
    Item("gpu-tests", (*PYTEST, "-m", "gpu"), 300),
    Item("tests", (*PYTEST, "-n", "8"), 480),
    Item("step_time", ("-m", "bench.step_time", "--out", "{tmp}/step_time.json"), 480, "step_time.json"),
    Item("saved", ("-m", "bench.saved", "--jobs", "4", "--out", "{tmp}/saved.json"), 480, "saved.json"),
    Item("demo", ("-m", "bench.demo", "--out", "{tmp}"), 240, "demo.json", "demo.png"),
    Item(
        "convergence",
        ("-m", "bench.convergence", "--out", "{tmp}"),
        420,
        "convergence.json",
        "convergence.png",
    ),
)


def run(item: Item, scratch: Path, out: Path, limit: float) -> dict[str, Any]:
    """Run one item; whatever it wrote before its limit still counts."""
    command = [sys.executable, *(part.replace("{tmp}", str(scratch)) for part in item.command)]
    paths = [str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "CIUIC_SAY_AT_ONCE": "1",
    }
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=common.ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # its own session: its children hold the GPU too
            process.wait()
        output.seek(0)
        said = output.read()
    with (out / "h200.log").open("a") as log:
        log.write(f"\n===== {item.name}: {' '.join(item.command)} -> {code}\n{said}")
    if item.picture and (scratch / item.picture).is_file():
        (out / item.picture).write_bytes((scratch / item.picture).read_bytes())
    results = scratch / item.results
    return {
        "exit": code,
        "seconds": round(time.perf_counter() - start, 1),
        "results": json.loads(results.read_text()) if item.results and results.is_file() else None,
        "closing": closing_line(said),
        "said": said,
    }


def closing_line(said: str) -> str:
    """pytest's closing line, or the last line of all."""
    lines = said.strip().splitlines() or [""]
    counts = [x for x in lines if re.search(r"\d+ (passed|failed|skipped|error)", x)]
    return (counts or lines)[-1].strip("= ")[:100]


def main() -> None:
    """Run the items and print what each came to."""
    names = [item.name for item in ITEMS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--args", default="", help="added to the command, when --only names one item")
    parser.add_argument("--budget", type=float, default=585.0, help="seconds for everything")
    parser.add_argument("--out", default=os.environ.get("OUT", "out"))
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.budget
    report: dict[str, Any] = {"environment": common.environment(common.pick_device())}
    rows = []
    for item in ITEMS:
        if item.name not in args.only:
            continue
        limit = min(item.timeout, deadline - time.perf_counter())
        if limit < 20:
            rows.append([item.name, "no time left", "-", ""])
            continue
        if args.args and len(args.only) == 1:
            item = Item(
                item.name, (*item.command, *args.args.split()), item.timeout, item.results, item.picture
            )
        print(f"-- {item.name} (at most {limit:.0f} s)", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            result = run(item, Path(scratch), out, limit)
        said = result.pop("said")
        print("\n".join(said.strip().splitlines()[-30:]), flush=True)
        report[item.name] = result
        common.write_json(out / "h200.json", report)
        rows.append([item.name, str(result["exit"]), f"{result['seconds']:.0f}", result["closing"]])
    common.table("h200", ("item", "exit", "s", "said last"), rows)
    sys.exit(0 if all(row[1] == "0" for row in rows) else 1)


if __name__ == "__main__":
    main()
