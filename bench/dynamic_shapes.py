"""What a plan with dynamic sizes has to say at others, and how long it takes to say it.

``PYTHONPATH=. python -m bench.dynamic_shapes [--layers 12 48] [--mode lossless]``. Real joint graphs (GPT-2's
form, d 64, 8 x 500 tokens, batch and length dynamic) are planned without generating code.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
import torch._inductor.config as inductor_config

from bench import common
from bench.language import GPT, TransformerConfig
from bench.models import WithLoss
from ciuic_compile.partitioner import CiuicPartitioner
from ciuic_compile.report import from_json, to_json
from ciuic_compile.types import Plan

COLUMNS = ("layers", "plan s", "rows", "terms", "of the file, KiB", "first at() ms", "at() ms")


class _Done(Exception):
    """Raised once the graphs are partitioned: nothing is lowered."""


def planned(layers: int, mode: str) -> tuple[Plan, float]:
    """The plan of a model with dynamic sizes, and the CPU seconds of partitioning."""
    torch.manual_seed(0)
    model = WithLoss(GPT(TransformerConfig(layers, 64, 4, 4, 256, 256, 512, 8)))
    ids = torch.zeros(8, 500, dtype=torch.int64)
    found: list[tuple[Plan, float]] = []
    call = CiuicPartitioner.__call__

    def timed(part: CiuicPartitioner, *args: object, **kwargs: object) -> None:
        start = time.process_time()
        call(part, *args, **kwargs)  # type: ignore[arg-type]
        assert part.plan is not None
        found.append((part.plan, time.process_time() - start))
        raise _Done

    run = torch.compile(model, backend="ciuic", options={"mode": mode, "report": "off"}, dynamic=True)
    torch._dynamo.reset()
    with (
        mock.patch.object(CiuicPartitioner, "__call__", timed),
        inductor_config.patch(force_disable_caches=True),
    ):
        try:
            run(ids, ids)
        except torch._dynamo.exc.BackendCompilerFailed:
            if not found:
                raise
    return found[0]


def row(layers: int, mode: str) -> list[str]:
    """One line of the table."""
    plan, seconds = planned(layers, mode)
    text = to_json(plan)
    plan = from_json(text)
    symbolic = plan.symbolic
    assert symbolic is not None, plan.notes
    without = len(text) - len(to_json(plan.__class__(**{**plan.__dict__, "symbolic": None})))
    times = []
    for more in range(20):
        sizes = {s.name: s.traced + more for s in symbolic.symbols}
        start = time.process_time()
        plan.at(**sizes)
        times.append(1e3 * (time.process_time() - start))
    peak = symbolic.planned_peak
    shape = (
        str(layers),
        f"{seconds:.1f}",
        str(len(peak.rows)),
        str(len(peak.terms)),
        f"{without / 1024:.1f}",
    )
    return [*shape, f"{times[0]:.2f}", f"{statistics.median(times[1:]):.2f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 48])
    parser.add_argument("--mode", default="lossless")
    args = parser.parse_args()
    rows = [row(layers, args.mode) for layers in args.layers]
    common.table(f"plans with dynamic sizes, mode {args.mode}", COLUMNS, rows)


if __name__ == "__main__":
    main()
