"""Options that say which step is planned and how, for every command that takes a target."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ciuic_compile.cli import files
from ciuic_compile.errors import OptionError, TargetError
from ciuic_compile.writing import is_special

if TYPE_CHECKING:
    import torch

    from ciuic_compile.targets import Target
    from ciuic_compile.types import Plan

TARGET_HELP = (
    "FILE.py:FUNCTION or MODULE:FUNCTION, which returns (model, example_inputs[, loss_fn]); "
    "a folder with a Hugging Face config.json; or transformers.NAMEConfig"
)


def add_target(parser: argparse.ArgumentParser) -> None:
    """The target, and what a Hugging Face model is called with."""
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    group = parser.add_argument_group("batch of a Hugging Face model")
    group.add_argument("--batch", type=_positive, metavar="N", help="sequences or images (default: 1)")
    group.add_argument(
        "--seq", type=_positive, metavar="N", help="tokens in a sequence (default: at most 2048)"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the parameters")
    group.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing (default: as in config.json)",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of the planner."""
    group = parser.add_argument_group("plan")
    group.add_argument("--mode", metavar="R:1", help="4:1 (default), any R:1, or lossless")
    group.add_argument("--budget", metavar="SIZE", help="most that the peak may be, e.g. 12GiB")
    group.add_argument(
        "--device", metavar="NAME", help="plan for this GPU: h200, a100-80, ..., or a profile's .json file"
    )
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other of docs/options.md",
    )
    add_step_options(parser)


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """How the step is run."""
    group = parser.add_argument_group("step")
    group.add_argument("--autocast", choices=("bfloat16", "float16"), help="the step is under autocast")
    group.add_argument("--dynamic", action="store_true", help="symbolic sizes: torch.compile(dynamic=True)")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """ciuic's options, as ``torch.compile(options=...)`` takes them, from what was written."""
    options: dict[str, Any] = {"report": "off"}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(
                f"--option {text!r}: no value\n  valid: NAME=VALUE\n  fix: write e.g. --option min_bytes=4096"
            )
        options[name] = _value(value)
    for name in ("mode", "budget", "device"):
        if getattr(args, name) is not None:
            options[name] = _value(args.budget) if name == "budget" else getattr(args, name)
    return options


def inputs_of(args: argparse.Namespace) -> list[str]:
    """The files that planning the target with these options reads, as far as that is known before."""
    return files.read_for(args.target, options_of(args))


def load(args: argparse.Namespace, allocate: torch.device | None = None) -> Target:
    """The target that was named, with the batch that was asked for."""
    from ciuic_compile import hugging_face, targets

    shape = hugging_face.Shape(args.batch or 1, args.seq, args.dtype, args.checkpointing)
    return targets.load(args.target, shape, allocate=allocate)


def plans_of(args: argparse.Namespace, device: str | None = None) -> tuple[Plan, ...]:
    """The plans of the target's step, made without weights and without a GPU.

    Args:
        device: profile to plan for where the user named none; None: a CPU.
    """
    from ciuic_compile import config, planning

    options = options_of(args)
    if device is not None:
        options.setdefault("device", device)
    config.parse_options(options)  # a wrong one ends it before the user's code runs
    target = load(args)
    return planning.plan(
        target.model,
        target.inputs,
        target.loss_fn,
        options=options,
        autocast=args.autocast,
        dynamic=True if args.dynamic else None,
    )


def device(text: str | None) -> torch.device:
    """The device of ``--on``; a GPU where there is one if it was left out."""
    import torch

    try:
        found = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        found = torch.device("meta")
    there = found.type == "cuda" and (found.index or 0) < torch.cuda.device_count()
    if found.type != "cpu" and not there:
        raise TargetError(
            f"--on {text!r}: no such device here\n  valid: cpu"
            + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
            + "\n  fix: name one of these, or leave it out"
        )
    return found


def numbered(path: str, count: int) -> Sequence[str]:
    """Paths for so many plans: ``plan.json``, ``plan-2.json``, ...; a device or a pipe takes them all."""
    from ciuic_compile.report.emit import numbered

    if is_special(path):
        return [path] * count
    return [numbered(path, number) for number in range(1, count + 1)]


def _value(text: str) -> Any:
    """A number, a bool, null or a list where it reads as JSON; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value
