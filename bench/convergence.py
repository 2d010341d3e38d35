"""Does compression change what a model learns? The demo's training, longer, on a GPU.

A byte-level language model of at least 25 million parameters under bf16 autocast, from the same seed and on
the same batches with Inductor and with each mode of ciuic; validation on held-out files all along.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import common, plot, text, train


def main() -> None:
    """Train every configuration, print the differences, write JSON and PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs", nargs="+", default=["inductor", "4:1"], help="the first is the reference"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between validations")
    parser.add_argument("--cpu-size", action="store_true", help="the demo's small model, for a CPU")
    parser.add_argument("--device")
    parser.add_argument("--out", default="out", help="folder for convergence.json and convergence.png")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    setting = replace(
        train.CPU if args.cpu_size else train.GPU,
        steps=args.steps,
        seed=args.seed,
        validate_every=args.every,
    )
    corpus = text.load()
    out = Path(args.out)
    runs: list[train.Run] = []
    for config in args.configs:
        runs.append(train.train(setting, config, corpus, device))
        common.write_json(out / "convergence.json", _results(setting, runs, device))  # keeps what is done
    plot.write_curves(
        out / "convergence.png",
        f"validation loss, nats a byte ({runs[0].parameters / 1e6:.0f}M parameters, {setting.precision})",
        {run.config: run.validation for run in runs},
    )
    reference = runs[0]
    steps = [step for step, _ in reference.validation]
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    common.table(
        f"validation loss: {reference.parameters / 1e6:.1f}M parameters, {args.steps} steps",
        ("", *(f"step {s}" for s in shown), "difference", "saved MiB", "peak MiB", "step ms"),
        [
            [
                run.config,
                *(f"{loss:.4f}" for step, loss in run.validation if step in shown),
                f"{run.validation[-1][1] - reference.validation[-1][1]:+.4f}",
                common.mib(run.saved),
                common.mib(run.peak),
                f"{run.step_ms:.1f}",
            ]
            for run in runs
        ],
    )


def _results(setting: train.Setting, runs: list[train.Run], device: Any) -> dict[str, Any]:
    reference = runs[0].validation[-1][1]
    return {
        "environment": common.environment(device),
        "setting": asdict(setting),
        "validation_difference": {r.config: r.validation[-1][1] - reference for r in runs},
        "runs": [r.as_dict() for r in runs],
    }


if __name__ == "__main__":
    main()
