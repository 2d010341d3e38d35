"""Train a byte-level language model twice, with Inductor and with ciuic, and compare.

The text is the Python standard library's own source. Both runs start from the same weights and see the same
batches. On 2 CPU cores this takes under 4 minutes; where there is a GPU the model has 25 million parameters.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from bench import common, plot, text, train
from bench.language import TransformerConfig

QUICK = train.Setting(
    TransformerConfig(2, 64, 2, 2, 256, text.VOCAB, 64, 4), steps=6, warmup=1, validation_batches=2
)


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    parser.add_argument("--mode", default="4:1", help="ciuic's mode")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument("--device")
    parser.add_argument("--out", default="out", help="folder for demo.json and demo.png")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    setting = QUICK if args.quick else train.GPU if device.type == "cuda" else train.CPU
    setting = replace(setting, steps=args.steps or setting.steps)
    corpus = text.load(limit=1 << 20 if args.quick else 32 << 20)
    out = Path(args.out)

    runs = [train.train(setting, config, corpus, device) for config in ("inductor", args.mode)]
    inductor, ours = runs
    name = f"ciuic {args.mode}"
    print(
        f"\n{inductor.parameters / 1e6:.1f}M parameters, {setting.precision}, {setting.steps} steps, {device}"
    )
    common.table(
        "one training step, measured",
        ("", "saved MiB", "peak MiB", "step ms", "compile s", "train loss", "validation"),
        [
            [
                label,
                common.mib(run.saved),
                common.mib(run.peak),
                f"{run.step_ms:.1f}",
                f"{run.first_step_s:.1f}",
                f"{run.curve[-1][1]:.4f}",
                f"{run.validation[-1][1]:.4f}",
            ]
            for label, run in zip(("Inductor", name), runs, strict=True)
        ],
    )
    if ours.saved and ours.peak:
        print(
            f"saved {inductor.saved / ours.saved:.2f}x less, peak {inductor.peak / ours.peak:.2f}x less"
            " (peak: forward and backward with its gradients, above parameters and optimizer)"
        )
    difference = ours.validation[-1][1] - inductor.validation[-1][1]
    print(f"validation loss: {difference:+.4f} nat a byte against Inductor")
    picture = out / "demo.png"
    curves = {f"{n} (training loss)": r.curve for n, r in zip(("Inductor", name), runs, strict=True)}
    plot.write_curves(picture, "byte-level language model, Python's standard library (nats a byte)", curves)
    common.write_json(
        out / "demo.json",
        {
            "environment": common.environment(device),
            "runs": [r.as_dict() for r in runs],
            "validation_difference": difference,
        },
    )
    print(f"both loss curves: {picture}")


if __name__ == "__main__":
    main()
