"""Write the table of docs/budgets.md from the files in bench/results/: no figure in it is typed by hand.

python -m bench.budgets_table            # writes it, and prints what the text below it states
python -m bench.budgets_table --check    # exit code 1 where it differs
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench import budgets, common
from bench.results_page import RESULTS

PAGE = common.ROOT / "docs" / "budgets.md"
BEGIN, END = "<!-- table: python -m bench.budgets_table -->\n", "<!-- /table -->"
#: A fraction that an earlier file lacks is taken from a later one.
SOURCES: dict[str, list[str]] = {
    "GPT": ["gpt-h100"],
    "Llama": ["llama-h100"],
    "MoE": ["moe-h100"],
    "encoder-decoder": ["encdec-h100"],
    "ViT": ["vit-h100", "vit-h100-rest", "vit-h200"],
    "ResNet": ["resnet50-h100", "resnet50-h200"],
    "UNet": ["unet-h200", "unet-h200-88", "unet-h200-56"],
}
GPU = "H100"  # where a model or a row has another, it says so
EVENLY = [f"{i / 16:.2f}" for i in range(15, 0, -1)]
HEADER = """\
| model, batch | Inductor: peak, ms | torch's own: fraction | peak | x | \
fastest of ours at no higher peak: peak | x |
|---|---|---|---|---|---|---|
"""


class Point(NamedTuple):
    """One of torch's fractions, the GPU, and what was measured there."""

    fraction: str
    gpu: str
    match: budgets.Match


def read(files: Sequence[str]) -> list[dict[str, Any]]:
    """The result files."""
    return [json.loads((RESULTS / f"budgets-{file}.json").read_text()) for file in files]


def gpu(report: dict[str, Any]) -> str:
    """The short name of a file's GPU: "NVIDIA H100 80GB HBM3" is an H100."""
    return str(report["environment"]["device"].split()[1])


def mark(there: str, usual: str) -> str:
    """What names a GPU that is not the usual one."""
    return "" if there == usual else f" ({there})"


def points(reports: Sequence[dict[str, Any]]) -> list[list[Point]]:
    """A model's fractions, larger ones first, those with the same plan in one list."""
    alike: dict[tuple[int, str], list[Point]] = {}
    seen = set[str]()
    for i, report in enumerate(reports):
        found = [m for m in budgets.matches(report["rows"]) if m.config not in seen]
        seen |= {m.config for m in found}
        for m in found:
            point = Point(m.config.removeprefix("torch "), gpu(report), m)
            alike.setdefault((i, m.theirs["config"]), []).append(point)
    groups = [sorted(group, key=lambda p: p.fraction, reverse=True) for group in alike.values()]
    return sorted(groups, key=lambda group: group[0].fraction, reverse=True)


def spans(fractions: Sequence[str]) -> str:
    """Fractions in words: three neighbours and more by the first and the last."""
    neighbours = set(itertools.pairwise(EVENLY))
    runs: list[list[str]] = []
    for f in fractions:
        if runs and (runs[-1][-1], f) in neighbours:
            runs[-1].append(f)
        else:
            runs.append([f])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def mib(nbytes: int) -> str:
    """Whole MiB."""
    return f"{nbytes / 2**20:,.0f}"


def lines(model: str, reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A model's part of the table."""
    first = reports[0]
    base = next(r for r in first["rows"] if r["config"] == "inductor")
    head = f"{model}, {first['spec']['batch']}{mark(gpu(first), GPU)}"
    head += f" | {mib(base['peak'])}, {base['step_ms']:.1f}"
    for group in points(reports):
        _, there, m = group[0]
        fractions = spans([p.fraction for p in group]) + mark(there, gpu(first))
        ours = "none | -"
        if m.ours is not None:
            x = f"{m.ours['ratio']:.3f}"
            ours = f"{mib(m.ours['peak'])} | {f'**{x}**' if m.faster else x}"
        theirs = f"{mib(m.theirs['peak'])} | {m.theirs['ratio']:.3f}"
        yield f"| {head} | {fractions} | {theirs} | {ours} |\n"
        head = "|"


def page() -> str:
    """The page as it should be."""
    text = PAGE.read_text()
    start = text.index(BEGIN) + len(BEGIN)
    body = (line for model, files in SOURCES.items() for line in lines(model, read(files)))
    return text[:start] + HEADER + "".join(body) + text[text.index(END, start) :]


class Claims(NamedTuple):
    """What the text states of a model, or of all."""

    faster: int
    reached: int  # of torch's fractions
    over: float  # a budget, at worst
    off: float  # planned against measured, at worst
    plans: int
    rises: int  # neighbouring budgets where the peak does not fall
    smallest: tuple[int, float]  # measured peak of ours, its x


def claims(reports: Sequence[dict[str, Any]]) -> Claims:
    """Those of one model."""
    matches = [p.match for group in points(reports) for p in group]
    by_file = [budgets.timed(report["rows"]) for report in reports]
    ours = [o for rows in by_file for o in rows]
    return Claims(
        faster=sum(m.faster for m in matches),
        reached=len(matches),
        over=budgets.over(ours),
        off=max((o["planned"] / o["peak"] - 1 for o in ours), key=abs),
        plans=len(ours),
        rises=sum(map(budgets.rises, by_file)),
        smallest=min((o["peak"], o["ratio"]) for o in ours),
    )


def stated() -> dict[str, Claims]:
    """Those of each model, and of all of them."""
    each = {model: claims(read(files)) for model, files in SOURCES.items()}
    faster, reached, over, off, plans, rises, smallest = zip(*each.values(), strict=True)
    worst = max(over), max(off, key=abs)
    return {
        **each,
        "all": Claims(sum(faster), sum(reached), *worst, sum(plans), sum(rises), min(smallest)),
    }


def main() -> None:
    """Write the table and print the summary, or compare the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args()
    if args.check:
        if PAGE.read_text() != page():
            sys.exit("docs/budgets.md is out of date: python -m bench.budgets_table")
        return
    PAGE.write_text(page())
    columns = ("", "faster", "over budget %", "planned off %", "plans", "rises", "smallest MiB", "x")
    rows = []
    for model, c in stated().items():
        shares = [f"{100 * share:+.3f}" for share in (c.over, c.off)]
        smallest = [mib(c.smallest[0]), f"{c.smallest[1]:.3f}"]
        rows.append([model, f"{c.faster} of {c.reached}", *shares, str(c.plans), str(c.rises), *smallest])
    common.table("what docs/budgets.md and the README state", columns, rows)


if __name__ == "__main__":
    main()
