"""``ciuic check``, ``accept`` and ``diff`` on a small model, planned for an H200 that is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ciuic_compile.report import to_json
from ciuic_compile.types import Plan
from tests.gate.conftest import MODEL, SETTINGS, Ran

Run = Callable[..., Ran]
BREAK = "            x = block(x)\n            torch._dynamo.graph_break()"
Edit = Callable[..., int]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The baseline of the model as it is, made once."""
    folder = tmp_path_factory.mktemp("accepted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        (folder / "model.py").write_text(MODEL)
        (folder / "ciuic.toml").write_text(SETTINGS)
        from ciuic_compile.cli import main

        assert main(["accept", "--all", "-m", "first baseline"]) == 0
    return (folder / "ciuic-baseline.json").read_text()


@pytest.fixture
def guarded(project: Path, accepted: str) -> Path:
    """The folder, with its baseline."""
    (project / "ciuic-baseline.json").write_text(accepted)
    return project


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_what_is_accepted_passes_and_accepting_again_changes_nothing(guarded: Path, ciuic: Run) -> None:
    before = files(guarded)
    ran = ciuic("check")
    assert (ran.status, ran.err) == (0, "") and "1 of 1 entry passed" in ran.out
    again = ciuic("accept", "net", "-m", "again")
    assert again.status == 0 and "unchanged" in again.out
    assert files(guarded) == before


def test_a_grown_step_fails_names_the_line_and_can_be_accepted(guarded: Path, edit: Edit, ciuic: Run) -> None:
    line = edit("F.gelu(wide)", "F.gelu(wide) * torch.tanh(wide @ torch.eye(256))")
    failed = ciuic("check", "--format", "json")
    assert failed.status == 1
    entry = json.loads(failed.out)["entries"][0]
    assert (entry["culprits"][0]["file"], entry["culprits"][0]["line"]) == ("model.py", line)
    assert "ciuic accept net -m" in entry["fix"]
    assert ciuic("accept", "net", "-m", "a gate, wanted").status == 0
    assert ciuic("check").status == 0
    history = json.loads((guarded / "ciuic-baseline.json").read_text())["entries"]["net"]["history"]
    assert [h["reason"] for h in history] == ["first baseline", "a gate, wanted"]
    assert history[0]["date"] == "1970-01-01" and history[1]["before_bytes"] == history[0]["peak_bytes"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    batch = 512", "    batch = 640", "the inputs changed"),
        ("layers=2", "layers=3", "parameter blocks.*"),
        ("            x = block(x)", BREAK, "a graph break"),
        ("x = block(x)", "x = torch.sort(block(x)).values", "likely culprit"),
    ],
)  # fmt: skip
def test_regressions_are_caught(
    guarded: Path, edit: Edit, ciuic: Run, old: str, new: str, words: str
) -> None:
    line = edit(old, new, new.splitlines()[-1 if "graph_break" in new else 0])
    ran = ciuic("check", "--format", "github")
    assert ran.status == 1 and words in ran.out
    assert f"::error file=model.py,line={line}," in ran.out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class Net", "# the model\n\n\nclass Net"),
        ("wide", "inner"),
        ("x = block(x)", "x = block.forward(x)"),
        ("class Block(nn.Module):", 'class Block(nn.Module):\n    """A feed-forward."""\n'),
    ],
)
def test_edits_that_change_nothing_pass(guarded: Path, edit: Edit, ciuic: Run, old: str, new: str) -> None:
    edit(old, new)
    ran = ciuic("check")
    assert ran.status == 0 and "unchanged" in ran.out


def test_an_improvement_passes_and_says_how_to_hold_it(guarded: Path, edit: Edit, ciuic: Run) -> None:
    edit("    batch = 512", "    batch = 256")
    ran = ciuic("check")
    assert ran.status == 0 and "to hold the gain: ciuic accept net" in ran.out


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def of_another(folder: Path) -> None:
    path = folder / "ciuic-baseline.json"
    path.write_text(path.read_text().replace('"target": "model.py:make"', '"target": "vit.py:make"'))


def edited(old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "ciuic-baseline.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return edit


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (remove("model.py"), 2, "no file 'model.py'"),
        (write("model.py", MODEL.replace("def make", "def made")), 2, "did you mean 'made'?"),
        (write("model.py", "import torch\nimport nonexistent_thing\n"), 2, "model.py:2"),
        (write("model.py", "def make(:\n"), 2, "SyntaxError"),
        (write("ciuic.toml", "[ciuic\n"), 2, "not valid TOML"),
        (remove("ciuic.toml"), 2, "does not exist"),
        (write("ciuic.toml", SETTINGS.replace("mode", "mod")), 2, "did you mean 'mode'?"),
        (remove("ciuic-baseline.json"), 3, "no baseline"),
        (write("ciuic-baseline.json", '{"schema": "ciuic.baseline/1", "entr'), 3, "truncated"),
        (write("ciuic-baseline.json", '{"schema": "ciuic.baseline/9"}'), 3, "another version"),
        (edited('"options": {"mode": "lossless"}', '"options": 3'), 3, "/settings/options: expected object"),
        (edited('"count": 1', '"count": "1"'), 3, "/count: expected integer, found '1'"),
        (edited('"shape": [512', '"shape": ["512"'), 3, "/shape/0: expected integer, found '512'"),
        (edited('"net": {', '"net": {}, "net": {'), 3, "has the key 'net' twice"),
        (of_another, 3, "another target"),
        (write("ciuic.toml", SETTINGS + 'budget = "1 KiB"\n'), 4, "1,024 bytes"),
        (write("ciuic.toml", SETTINGS + 'hard_limit = "1 KiB"\n'), 1, "hard limit"),
    ],
)
def test_broken_input_is_one_clear_message(
    guarded: Path, ciuic: Run, change: Callable[[Path], object], status: int, words: str
) -> None:
    change(guarded)
    before = files(guarded)
    ran = ciuic("check", "-o", "verdict.txt")
    assert ran.status == status, ran
    assert words in ran.out + ran.err
    assert {k: v for k, v in files(guarded).items() if k != "verdict.txt"} == before
    # accepting mends a baseline that is missing or of something else; one that cannot be read stays
    mended = words in ("no baseline", "another target", "hard limit")
    assert ciuic("accept", "net", "-m", "x").status == (0 if mended else status)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check", "nett"], "did you mean 'net'?"),
        (["check", "-o", "missing/out.xml"], "no folder"),
        (["check", "-o", "."], "it is a folder"),
        (["check", "-o", "ciuic-baseline.json"], "this command reads that file"),
        (["check", "-o", "ciuic.toml"], "this command reads that file"),
        (["check", "--format", "sarif", "-o", "model.py"], "this command reads that file"),
        (["accept", "--all", "-m", "x", "--baseline", "model.py"], "this command reads that file"),
        (["accept", "--all", "-m", "x", "--baseline", "missing/b.json"], "no folder"),
        (["diff", "ciuic-baseline.json", "model.py:make", "-o", "model.py"], "this command reads that file"),
        (["accept", "net"], "needs a reason"),
        (["accept", "-m", "x"], "names of entries or --all"),
        (["diff", "a.json", "b.json"], "cannot be read"),
        (["diff", "ciuic.toml", "model.py:make"], "no such target"),
    ],
)
def test_wrong_usage_does_nothing(guarded: Path, ciuic: Run, argv: list[str], words: str) -> None:
    before = files(guarded)
    ran = ciuic(*argv)
    assert ran.status == 2 and words in ran.err and ran.out == ""
    assert files(guarded) == before


def test_a_pipe_takes_the_outcome_and_stays_one(guarded: Path, ciuic: Run) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDWR | os.O_NONBLOCK)  # so that nobody waits
    try:
        assert ciuic("check", "--format", "json", "-o", "pipe").status == 0
        assert json.loads(os.read(reader, 2**16))["exit_code"] == 0
    finally:
        os.close(reader)
    assert (guarded / "pipe").is_fifo()


def test_accept_writes_all_or_nothing(guarded: Path, ciuic: Run) -> None:
    (guarded / "ciuic.toml").write_text(SETTINGS + '[[entry]]\nname = "b"\ntarget = "model.py:nothing"\n')
    before = files(guarded)
    assert ciuic("accept", "--all", "-m", "x").status == 2
    assert files(guarded) == before


def test_accept_all_drops_what_is_gone(guarded: Path, ciuic: Run) -> None:
    (guarded / "ciuic.toml").write_text(SETTINGS.replace('"net"', '"renamed"'))
    assert "has an entry 'net'" in ciuic("check").out
    ran = ciuic("accept", "--all", "-m", "renamed")
    assert "net: dropped" in ran.out and "renamed: accepted" in ran.out
    assert list(json.loads((guarded / "ciuic-baseline.json").read_text())["entries"]) == ["renamed"]


def test_one_broken_target_does_not_hide_the_other_verdicts(guarded: Path, ciuic: Run) -> None:
    (guarded / "ciuic.toml").write_text(SETTINGS + '[[entry]]\nname = "b"\ntarget = "model.py:nothing"\n')
    ran = ciuic("check", "--format", "json")
    assert ran.status == 2
    assert [e["status"] for e in json.loads(ran.out)["entries"]] == ["pass", "error"]


def test_diff_of_plans_baselines_and_targets(guarded: Path, edit: Edit, ciuic: Run) -> None:
    for name, peak in (("a", 4), ("b", 8)):
        plan = Plan("graph 0", "4:1", (), 8, 2, 8, peak, 0.01, 0.04, 1.0, device="h200")
        (guarded / f"{name}.json").write_text(to_json(plan))
    ran = ciuic("diff", "a.json", "b.json")
    assert ran.status == 0 and "a -> b: peak 4 B -> 8 B (+4 B, +100%)" in ran.out
    line = edit("layers=2", "layers=4")
    ran = ciuic("diff", "ciuic-baseline.json", "model.py:make", "--format", "md")
    assert ran.status == 0 and f"model.py:{line}" in ran.out
    assert "unchanged" in ciuic("diff", "ciuic-baseline.json", "ciuic-baseline.json").out
    (guarded / "broken.json").write_text("{")
    assert ciuic("diff", "broken.json", "b.json").status == 2


def test_help_has_examples_that_parse(ciuic: Run) -> None:
    import shlex

    from ciuic_compile.cli import _parser

    for command in ("check", "accept", "diff"):
        out = ciuic(command, "--help").out
        examples = [line.strip() for line in out.splitlines() if line.startswith("  ciuic ")]
        assert len(examples) >= 2
        for example in examples:
            _parser()[0].parse_args(shlex.split(example)[1:])
