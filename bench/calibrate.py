"""Measured against predicted gradient error of each class of tensor, compressed alone.

For every model: capture its training graph, run forward and backward once without codecs, then the backward
again with one class of saved tensors (or, in the last rows, the whole plan of a mode) through a codec and
back. Only the backward differs, so what is measured is the codecs' error and nothing else. "gain" is measured
over predicted error variance of the whole gradient; where it is far from 1 for a class on every model, the
error model (ciuic_compile/planner/error_model.py) needs another constant. docs/numerics.md has the results.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import ciuic_compile
from bench import common
from bench.measure import GradientError, gradient_error
from bench.models import MODELS, WithLoss
from ciuic_compile import Calibration, partitioner
from ciuic_compile.analyze import MemoryModel
from ciuic_compile.calibrating import through
from ciuic_compile.codecs import get_codec
from ciuic_compile.config import parse_options
from ciuic_compile.partitioner import CiuicPartitioner
from ciuic_compile.passes import Graphs
from ciuic_compile.planner import Selection
from ciuic_compile.planner.error_model import ErrorModel, relative_mse
from ciuic_compile.simulate import Peaks
from ciuic_compile.types import Plan

CODECS = ("int8_group64", "int6_group64", "int5_group64", "int4_group64_affine", "int4_group64")


@dataclass
class Captured:
    """One training step, stopped between forward and backward: run the backward as often as you like.

    Attributes:
        backward: the backward graph, without decodes.
        arguments: what it was called with.
    """

    model: MemoryModel
    selection: Selection
    plan: Plan
    backward: fx.GraphModule
    arguments: list[Any]

    @torch.no_grad()
    def run(self, codecs: Mapping[str, str]) -> dict[str, Tensor]:
        """The gradients, with these saved tensors (by name) through these codecs and back."""
        results = self.backward(*through(self.backward, self.arguments, codecs))
        return {str(i): g for i, g in enumerate(results) if isinstance(g, Tensor)}

    def predict(self, codecs: Mapping[str, str]) -> tuple[float, float]:
        """Predicted relative error of the whole gradient, and the stated bound of any parameter's."""
        nodes = {n.name: n for n in self.selection.saved}
        classes, measured = self.model.classes, self.model.calibration
        mse = {
            nodes[name]: relative_mse(classes, nodes[name], get_codec(codec), measured)
            for name, codec in codecs.items()
        }
        error_model = ErrorModel(self.model.captured, classes, list(self.selection.saved), measured)
        most = {
            nodes[name]: max(mse[nodes[name]], get_codec(codec).relative_mse)
            for name, codec in codecs.items()
        }
        return error_model.whole(error_model.gradient_errors(mse)), error_model.bound(most)

    def by_class(self) -> dict[str, dict[str, str]]:
        """Class, and codec -> the saved tensors of that class on which that codec is legal."""
        groups: dict[str, dict[str, str]] = {}
        for node in self.model.storages_of(self.selection.saved):
            legal = {c.name for c in self.model.codecs(node)}
            for codec in CODECS:
                if codec in legal:
                    key = f"{self.model.classes.kind(node).value} {codec}"
                    groups.setdefault(key, {})[node.name] = codec
        return groups


def capture(
    model: torch.nn.Module,
    inputs: Sequence[Tensor],
    mode: str,
    min_bytes: int,
    calibration: Calibration | None = None,
) -> Captured:
    """Plan a step of ``model`` (inputs to loss) in ``mode`` and run it without codecs or code generation."""
    config = parse_options(
        {"mode": mode, "min_bytes": min_bytes, "report": "off", "calibration": calibration}
    )
    made: list[tuple[MemoryModel, Selection, Plan]] = []
    calls: list[tuple[fx.GraphModule, list[Any]]] = []
    plan_and_rewrite = partitioner.plan_and_rewrite

    def plan_only(
        name: str,
        memory: MemoryModel,
        selection: Selection,
        baseline: Peaks,
        graphs: Graphs,
        *rest: object,
    ) -> Plan:
        forward, backward = (
            fx.GraphModule(g, copy.deepcopy(g.graph)) for g in (graphs.forward, graphs.backward)
        )
        rewritten = Graphs(forward, backward, graphs.num_fwd_outputs)
        plan = plan_and_rewrite(name, memory, selection, baseline, rewritten)
        made.append((memory, selection, plan))
        return plan

    def run_graph(gm: fx.GraphModule, example_inputs: object, **kwargs: Any) -> Any:
        def call(args: list[Any]) -> Any:
            if kwargs.get("is_backward"):
                calls.append((gm, list(args)))
            return gm(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        part = CiuicPartitioner(config, "calibrate", "graph")
        return compile_fx(
            gm, example_inputs, inner_compile=run_graph, config_patches={"custom_partitioner_fn": part}
        )

    torch._dynamo.reset()
    with (
        mock.patch.object(partitioner, "plan_and_rewrite", plan_only),
        torch._functorch.config.patch(enable_autograd_cache=False, donated_buffer=False),
    ):
        torch.compile(model, backend=backend)(*inputs).backward()
    ((memory, selection, plan),), ((graph, arguments),) = made, calls
    return Captured(memory, selection, plan, graph, arguments)


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Every class of one model, and its plan in every mode."""
    with sdpa_kernel([SDPBackend.MATH]) if spec["unfused"] else contextlib.nullcontext():
        return _measured(spec)


def _measured(spec: dict[str, Any]) -> dict[str, Any]:
    device = torch.device(spec["device"])
    rows, seconds = [], 0.0
    for mode in spec["modes"]:
        torch.manual_seed(0)
        built, batches, loss = MODELS[spec["model"]](spec["size"])
        min_bytes = 256 if spec["size"] == "tiny" else 16 * 1024
        model, calibration = WithLoss(built, loss).to(device), None
        if spec["calibrated"]:  # on other batches than the one that is measured
            started = time.perf_counter()
            calibration = ciuic_compile.calibrate(model, [batches(1, device), batches(2, device)])
            seconds = time.perf_counter() - started
        captured = capture(model, batches(0, device), mode, min_bytes, calibration)
        exact = captured.run({})
        plan = {d.storage.name: d.codec for d in captured.plan.decisions if d.codec}
        groups = {f"plan {mode} ({captured.plan.ratio:.2f}:1)": plan}
        if mode == spec["modes"][-1] and not spec["plans_only"]:
            groups |= captured.by_class()
        for name, codecs in groups.items():
            whole, bound = captured.predict(codecs)
            rows.append(_row(name, len(codecs), gradient_error(exact, captured.run(codecs)), whole, bound))
    return {"rows": rows, "calibration_seconds": seconds}


def _row(name: str, count: int, found: GradientError, whole: float, bound: float) -> dict[str, Any]:
    return {"what": name, "tensors": count, **asdict(found), "stated": whole, "bound": bound}


COLUMNS = (
    "model",
    "compressed",
    "tensors",
    "error",
    "stated",
    "stated/error",
    "gain",
    "worst",
    "bound",
    "bound/worst",
)


def table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One line a measurement."""
    lines = []
    for result in results:
        for r in result.get("rows", []):
            gain = (r["whole"] / r["stated"]) ** 2 if r["stated"] else float("nan")
            looseness = r["bound"] / r["worst"] if r["worst"] else float("inf")
            ratio = r["stated"] / r["whole"] if r["whole"] else float("nan")
            numbers = (r["whole"], r["stated"], ratio, gain, r["worst"], r["bound"], looseness)
            name = f"{result['model']} {result['size']}"
            lines.append([name, r["what"], str(r["tensors"]), *map(common.share, numbers)])
    return lines


def main() -> None:
    """Measure the models asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=("tiny", "small", "full"))
    parser.add_argument("--modes", nargs="+", default=["2:1", "4:1", "6:1"], help="plans to measure")
    parser.add_argument("--calibrated", action="store_true", help="give the plans a calibration")
    parser.add_argument("--plans-only", action="store_true", help="no rows of single classes")
    parser.add_argument("--unfused", action="store_true", help="attention written out, as where no kernel is")
    parser.add_argument("--device")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a model may take")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.cell:
        import json

        print(json.dumps(cell(json.loads(args.cell))))
        return
    device = common.pick_device(args.device)
    specs = [
        {
            "model": model,
            "size": size,
            "modes": args.modes,
            "calibrated": args.calibrated,
            "plans_only": args.plans_only,
            "unfused": args.unfused,
            "device": str(device),
        }
        for size in args.sizes
        for model in args.models
    ]
    results = common.run_cells(
        "bench.calibrate", specs, args.timeout, 1, lambda s: f"{s['model']} {s['size']}"
    )
    common.write_json(args.out, {"environment": common.environment(device), "results": results})
    common.table("gradient error, measured and stated", COLUMNS, table(results))


if __name__ == "__main__":
    main()
