"""The command as a user meets it: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from ciuic_compile import cli, verifying
from ciuic_compile.cli import exit_codes, files
from ciuic_compile.errors import CiuicError, InfeasibleBudgetError, OutputError, VerificationError
from ciuic_compile.report import from_json
from ciuic_compile.types import Plan
from tests.cli.conftest import TRAIN, Ran
from tests.training import kernel_cache as kernel_cache
from tests.training import only_kernels_cached

Ciuic = Callable[..., Ran]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan_of() -> Plan:
    """A plan that nothing was planned for."""
    return Plan("graph 0", "4:1", (), 8, 2, 8, 4, 0.01, 0.04, 1.0)


def parsers() -> dict[str, argparse.ArgumentParser]:
    parser, _ = cli._parser()
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples_that_parse(command: str, ciuic: Ciuic) -> None:
    ran = ciuic(command, "--help")
    assert ran.status == 0
    examples = re.findall(r"^  (ciuic .+)$", ran.out.split("examples:")[1], re.MULTILINE)
    assert len(examples) >= 2 or command not in ("plan", "explain", "verify", "calibrate")
    assert any(e.startswith(f"ciuic {command} ") for e in examples)
    parser, _ = cli._parser()
    for example in examples:
        parser.parse_args(shlex.split(example)[1:])  # SystemExit where one is wrong


def test_every_command_is_listed_and_can_show_its_traceback(ciuic: Ciuic) -> None:
    ran = ciuic("--help")
    assert ran.status == 0
    for name, parser in parsers().items():
        assert re.search(rf"^    {name}\b", ran.out, re.MULTILINE)
        assert any("--traceback" in a.option_strings for a in parser._actions)


@pytest.mark.parametrize("argv", [(), ("plam", "x"), ("plan",), ("plan", "x", "--batch", "0")])
def test_wrong_usage_is_status_2(argv: tuple[str, ...], ciuic: Ciuic) -> None:
    ran = ciuic(*argv)
    assert ran.status == exit_codes.USAGE == 2
    assert "usage: ciuic" in ran.err


def test_errors_and_their_statuses() -> None:
    infeasible = InfeasibleBudgetError("", budget_bytes=1, smallest_bytes=2)
    assert exit_codes.of(infeasible) == 4
    assert exit_codes.of(VerificationError()) == exit_codes.of(ZeroDivisionError()) == 70
    assert exit_codes.of(CiuicError()) == 2


# ---------------------------------------------------------------- plan and explain


def test_plan_prints_and_writes(train: Path, ciuic: Ciuic) -> None:
    ran = ciuic(
        "plan", "train.py:make_model", "--device", "h200", "--option", "min_bytes=0", "--json", "plan.json",
        "--html", "plan.html", "--md", "plan.md",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "mode 4:1 | h200" in ran.out and "train.py:13" in ran.out
    plan = from_json((train / "plan.json").read_text())
    assert plan.device == "h200" and plan.planned_saved_bytes * 4 <= plan.baseline_saved_bytes
    assert "<html" in (train / "plan.html").read_text()
    assert "mode 4:1" in (train / "plan.md").read_text()
    assert sorted(p.name for p in train.iterdir() if p.is_file()) == [
        "plan.html", "plan.json", "plan.md", "train.py",
    ]  # fmt: skip


def test_options_reach_the_planner(train: Path, ciuic: Ciuic) -> None:
    ran = ciuic(
        "plan", "train.py:make_model", "--mode", "lossless", "--option", "min_bytes=0", "--json", "p.json"
    )
    assert ran.status == 0, ran.err
    plan = from_json((train / "p.json").read_text())
    assert plan.mode == "lossless" and plan.gradient_error == 0
    assert all(d.codec is None for d in plan.decisions)


def test_each_graph_has_a_file(train: Path, ciuic: Ciuic) -> None:
    broken = TRAIN.replace("return x +", "torch._dynamo.graph_break()\n        return x +")
    (train / "train.py").write_text(broken)
    ran = ciuic("plan", "train.py:make_model", "--option", "min_bytes=0", "--json", "p.json")
    assert ran.status == 0, ran.err
    names = sorted(p.name for p in train.glob("p*.json"))
    assert names[:2] == ["p-2.json", "p-3.json"] and "p.json" in names
    assert len({from_json(p.read_text()).name for p in train.glob("p*.json")}) == len(names)


def test_explain_the_peak_a_line_and_a_module(train: Path, ciuic: Ciuic) -> None:
    common = ("explain", "train.py:make_model", "--option", "min_bytes=0", "--device", "h200")
    ran = ciuic(*common)
    assert ran.status == 0, ran.err
    assert "alive at the simulated peak" in ran.out and "what would change it" in ran.out
    assert re.search(r"saved INT\d +\*\.up +train.py:13  wide", ran.out), ran.out
    for what in ("train.py:13", "*.up", "0.up"):
        ran = ciuic(*common, what)
        assert ran.status == 0, ran.err
        assert "wide = torch.nn.functional.gelu" in ran.out, what
        assert "because" in ran.out and "to change" in ran.out
    wrong = ciuic(*common, "train.py:13000")
    assert wrong.status == 2 and "did you mean 'train.py:13'" in wrong.err


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (("--option", "min_bytes=0"), "deny='0.up' keeps it exact"),
        (("--option", "min_bytes=0", "--option", 'deny=["*.up"]'), "out of deny"),
        (("--option", "min_bytes=1000000"), "a smaller option min_bytes"),
        (("--option", "min_bytes=0", "--mode", "lossless"), "mode R:1"),
    ],
)
def test_what_would_change_a_decision(
    options: tuple[str, ...], change: str, train: Path, ciuic: Ciuic
) -> None:
    ran = ciuic("explain", "train.py:make_model", "0.up", *options)
    assert ran.status == 0, ran.err
    assert change in ran.out


# ---------------------------------------------------------------- what goes wrong


def test_a_budget_that_nothing_fits(train: Path, ciuic: Ciuic) -> None:
    ran = ciuic("plan", "train.py:make_model", "--budget", "10KiB", "--json", "plan.json")
    assert ran.status == exit_codes.INFEASIBLE == 4
    smallest = re.search(r"raise the budget to (\d+) bytes", ran.err)
    assert smallest and int(smallest[1]) > 10240
    assert "Traceback" not in ran.err and "TORCHDYNAMO" not in ran.err
    assert not (train / "plan.json").exists()


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("train.py:make_modle", "", r"no function 'make_modle'; did you mean 'make_model'"),
        ("trian.py:make_model", "", r"no file 'trian.py'; did you mean 'train.py'"),
        ("no.such.module:f", "", r"no module named 'no'"),
        ("train.py", "", r"name the function: train.py:make_model"),
        ("nothing", "", r"no such target"),
        (".", "", r"a Hugging Face folder has a config.json"),
        ("t.py:f", "import nonexistent_dependency", r"t.py:1 \(import nonexistent_dependency\)"),
        ("t.py:f", "x = 1\ny = x / 0", r"ZeroDivisionError.*\n  at: .*t.py:2 \(y = x / 0\)"),
        ("t.py:f", "def f(:", r"SyntaxError.*\n  at: .*t.py:1 \(def f\(:\)"),
        ("t.py:f", "import sys; sys.exit(1)", r"SystemExit"),
        ("t.py:f", "f = 3", r"f is a int, no function"),
        ("t.py:f", "def f(): return 3", r"f\(\) returned a int\n  valid: \(model, example_inputs\)"),
        ("t.py:f", "def f(): return 1, 2", r"returned a int as the model"),
        ("t.py:f", "import torch\ndef f(): return torch.nn.Linear(2, 2), 'x'", r"inputs without a tensor"),
        ("t.py:f", "import torch\ndef f(): return torch.nn.Linear(2, 2), ()", r"inputs without a tensor"),
        ("t.py:f", "import torch\ndef f(): return torch.nn.ReLU(), torch.ones(2), 3", r"int as loss_fn"),
        ("t.py:f", "def f(x): return x", r"TypeError: f\(\) missing 1 required"),
        (
            "t.py:f",
            "import torch\ndef f(): return torch.nn.Bilinear(2, 2, 2), torch.ones(2, 2)",
            r"the step failed.*missing 1 required",
        ),
    ],
)  # fmt: skip
def test_a_broken_target_is_one_message(name: str, source: str, said: str, train: Path, ciuic: Ciuic) -> None:
    (train / "t.py").write_text(source)
    (train / "plan.json").write_text("as it was")
    ran = ciuic("plan", name, "--json", "plan.json")
    assert ran.status == 2
    assert re.search(said, ran.err, re.DOTALL), ran.err
    assert ran.err.startswith("ciuic: ") and "Traceback" not in ran.err and "fix: " in ran.err
    assert (train / "plan.json").read_text() == "as it was"


def test_traceback_on_request(train: Path, ciuic: Ciuic) -> None:
    (train / "t.py").write_text("def f():\n    raise ValueError('why')")
    ran = ciuic("plan", "t.py:f", "--traceback")
    assert ran.status == 2
    assert "Traceback" in ran.err and "ValueError: why" in ran.err


@pytest.mark.parametrize(
    "argv", [("--mode", "3"), ("--device", "h2000"), ("--option", "x"), ("--batch", "2")]
)
def test_wrong_options_end_it_before_the_model_is_made(
    argv: tuple[str, ...], train: Path, ciuic: Ciuic
) -> None:
    (train / "t.py").write_text("raise SystemExit('made')" if argv[0] != "--batch" else TRAIN)
    ran = ciuic("plan", "t.py:make_model", *argv)
    assert ran.status == 2
    assert "made" not in ran.err and "fix: " in ran.err


@pytest.mark.parametrize("path", ["no/folder/plan.json", "folder"])
def test_an_output_that_cannot_be_written_is_told_first(path: str, train: Path, ciuic: Ciuic) -> None:
    (train / "folder").mkdir()
    (train / "t.py").write_text("raise SystemExit('made')")
    ran = ciuic("plan", "t.py:f", "--md", path)
    assert ran.status == 2
    assert f"cannot write {path!r}" in ran.err and "made" not in ran.err


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (("plan", "t.py:f", "--json", "t.py"), "t.py"),
        (("plan", "t.py:f", "--html", "./folder/../t.py"), "./folder/../t.py"),
        (("plan", "t.py:f", "--md", "link.md"), "link.md"),
        (("plan", "t.py:f", "--md", "hard.md"), "hard.md"),
        (("plan", "t:f", "--json", "t.py"), "t.py"),
        (("plan", "package.t:f", "--json", "package/t.py"), "package/t.py"),
        (("plan", "package.t:f", "--json", "package/__init__.py"), "package/__init__.py"),
        (("plan", "folder", "--json", "folder/config.json"), "folder/config.json"),
        (("plan", "t.py:f", "--device", "gpu.json", "--json", "gpu.json"), "gpu.json"),
        (("plan", "t.py:f", "--option", "calibration=c.json", "--json", "c.json"), "c.json"),
        (("calibrate", "folder", "-o", "folder/config.json"), "folder/config.json"),
        (
            ("verify", "t.py:f", "--option", "calibration=c.json", "--option", "report=c.json"),
            "c.json",
        ),
        (("diff", "c.json", "t.py:f", "-o", "t.py"), "t.py"),
        (("diff", "c.json", "t.py:f", "-o", "c.json"), "c.json"),
    ],
)
def test_no_output_overwrites_an_input(
    argv: tuple[str, ...], path: str, train: Path, ciuic: Ciuic, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "raise SystemExit('made')"
    for name in ("t", "package", "package.t"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("t.py", "package/__init__.py", "package/t.py", "folder/config.json", "gpu.json", "c.json"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_text(text)
    (train / "link.md").symlink_to("t.py")
    os.link(train / "t.py", train / "hard.md")
    ran = ciuic(*argv)
    assert ran.status == 2 and ran.out == ""
    assert f"output {path!r}: this command reads that file" in ran.err and "made" not in ran.err
    assert (train / path).read_text() == text


def test_the_files_of_several_graphs_overwrite_neither_inputs_nor_each_other(
    train: Path, ciuic: Ciuic, plan_of: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciuic_compile.cli.steps.plans_of", lambda args: (plan_of, plan_of))
    (train / "p-2.json").write_text("a calibration")
    ran = ciuic("plan", "train.py:f", "--json", "p.json", "--option", "calibration=p-2.json")
    assert ran.status == 2 and "output 'p-2.json': this command reads that file" in ran.err
    ran = ciuic("plan", "train.py:f", "--json", "p.json", "--md", "p-2.json")
    assert ran.status == 2 and "two outputs have the same path" in ran.err
    assert (train / "p-2.json").read_text() == "a calibration"
    assert not (train / "p.json").exists()


def test_a_pipe_takes_all_plans_and_stays_one(
    train: Path, ciuic: Ciuic, plan_of: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciuic_compile.cli.steps.plans_of", lambda args: (plan_of, plan_of))
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDWR | os.O_NONBLOCK)  # so that nobody waits
    try:
        assert ciuic("plan", "train.py:f", "--json", "pipe", "--md", "pipe").status == 0
        read = os.read(reader, 2**16).decode()
    finally:
        os.close(reader)
    assert read.count('"ciuic.plan/') == 2 and (train / "pipe").is_fifo() and not (train / "pipe-2").exists()


def test_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="cannot write"):
        files.write({str(tmp_path / "a"): "new", str(tmp_path / "gone" / "b"): "new"})
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OutputError, match="same path"):
        files.check([str(tmp_path / "a"), str(tmp_path / "link")])
    with pytest.raises(OutputError, match="same path"):
        files.check([str(tmp_path / "a"), str(tmp_path / "." / "a")])


def test_a_bug_is_status_70(train: Path, ciuic: Ciuic, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("ciuic_compile.planning.plan", fails)
    ran = ciuic("plan", "train.py:make_model")
    assert ran.status == exit_codes.INTERNAL == 70
    assert "internal error: ZeroDivisionError: of ours" in ran.err and "Traceback" not in ran.err


# ---------------------------------------------------------------- verify and calibrate


def test_verify(train: Path, ciuic: Ciuic, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_kernels_cached(kernel_cache):
        ran = ciuic("verify", "train.py:make_model", "--on", "cpu", "--option", "min_bytes=0")
        assert ran.status == 0, ran.out + ran.err
        assert "measured" in ran.out and "within the tolerance" in ran.out
        monkeypatch.setattr(verifying.Peak, "nbytes", property(lambda self: 10**6, lambda self, n: None))
        off = ciuic("verify", "train.py:make_model", "--on", "cpu", "--option", "min_bytes=0")
    assert off.status == exit_codes.MEASURED_DIFFERS == 5
    assert "NOT within the tolerance" in off.out


def test_verify_tells_a_device_that_is_not_here(train: Path, ciuic: Ciuic) -> None:
    ran = ciuic("verify", "train.py:make_model", "--on", "cuda:99")
    assert ran.status == 2 and "no such device here" in ran.err


def test_calibrate_writes_what_plan_reads(train: Path, ciuic: Ciuic) -> None:
    ran = ciuic("calibrate", "train.py:make_model", "--on", "cpu", "-o", "c.json")
    assert ran.status == 0, ran.err
    assert json.loads((train / "c.json").read_text())["graphs"]
    common = ("plan", "train.py:make_model", "--option", "min_bytes=0", "--json")
    assert ciuic(*common, "guessed.json").status == 0
    ran = ciuic(*common, "measured.json", "--option", "calibration=c.json")
    assert ran.status == 0, ran.err
    errors = [from_json((train / f"{n}.json").read_text()).gradient_error for n in ("guessed", "measured")]
    assert errors[0] != errors[1]


# ---------------------------------------------------------------- as it is installed


def test_the_module_runs_in_a_process_of_its_own(train: Path) -> None:
    (train / "t.py").write_text("def f(): return 3")
    done = subprocess.run(
        [sys.executable, "-m", "ciuic_compile", "plan", "t.py:f"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ciuic: target 't.py:f'") and not done.stdout


def test_the_console_script_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'ciuic = "ciuic_compile.cli:main"' in text
    scripts = metadata.entry_points(group="console_scripts", name="ciuic")
    for script in scripts:
        assert script.load() is cli.main
