"""The pytest plugin, in pytest sessions of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_compile.gate.baseline
import ciuic_compile.gate.compare
from ciuic_compile.planning import plan
from tests.training import interpreted

pytest_plugins = ["pytester"]

MODEL = """
import pytest
import torch
from torch import nn


def make(hidden=512):
    with torch.device("meta"):
        layers = nn.Linear(256, hidden), nn.GELU(), nn.Linear(hidden, 256)
        return nn.Sequential(*layers), torch.randn(1024, 256)
"""
FITS = (
    MODEL
    + """

@pytest.mark.max_vram("16 MiB")
@pytest.mark.max_saved("8 MiB")
def test_fits(memory_plan):
    plan = memory_plan(*make(), mode="lossless")
    assert plan.mode == "lossless" and plan.planned_peak_bytes > 2**20
"""
)


@pytest.fixture(scope="module", autouse=True)
def everything_imported() -> None:
    """pytester forgets what a session in this process imported, and torch cannot be imported twice."""
    model = torch.nn.Linear(8, 8)
    plan(model, torch.randn(2, 8))
    with interpreted():
        torch.compile(model, backend="ciuic", options={"report": "off"})(torch.randn(2, 8)).sum().backward()


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder for test files, in which the plugin is active and no other configuration."""
    installed = any(e.value == "ciuic_compile.pytest_plugin" for e in metadata.entry_points(group="pytest11"))
    load = "" if installed else "-p ciuic_compile.pytest_plugin"
    pytester.makeini(f"[pytest]\naddopts = -p no:cacheprovider {load} --strict-markers\n")
    return pytester


def test_a_limit_that_holds(session: pytest.Pytester) -> None:
    session.makepyfile(FITS)
    result = session.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*planned GPU memory (ciuic)*", "* MiB of 16.0 MiB, * saved; by Inductor * MiB  *::test_fits"]
    )


def test_a_limit_that_is_exceeded_names_sizes_and_lines(session: pytest.Pytester) -> None:
    session.makepyfile(FITS.replace('"16 MiB"', '"4 MiB"').replace('"8 MiB"', "1024"))
    result = session.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "max_vram: * MiB, * MiB over 4.00 MiB: planned peak * MiB and parameters and inputs * MiB (*",
            "  saved: 2.00 MiB as float32, *",
            "max_saved: * over 1.00 KiB: saved for the backward (graph 0*",
        ]
    )


def test_parameters_and_inputs_count(session: pytest.Pytester) -> None:
    session.makepyfile(
        MODEL
        + """

def test_sum(memory_plan):
    plan = memory_plan(*make())
    assert plan.input_bytes == 4 * (2 * 256 * 512 + 512 + 256 + 1024 * 256)


@pytest.mark.max_vram(4 * (2 * 256 * 512 + 512 + 256 + 1024 * 256))
def test_inputs_alone_fill_it(memory_plan):
    memory_plan(*make())
"""
    )
    session.runpytest_inprocess().assert_outcomes(passed=1, failed=1)


def test_compiled_models_count(session: pytest.Pytester) -> None:
    session.makepyfile(
        MODEL
        + """
from tests.training import interpreted


def step():
    model = torch.compile(nn.Linear(64, 64), backend="ciuic", options={"report": "off"})
    with interpreted():
        model(torch.randn(8, 64)).sum().backward()


@pytest.mark.max_vram("1 KiB")
def test_over():
    step()


@pytest.mark.max_vram("1 GiB")
def test_under():
    step()


@pytest.mark.max_vram("1 GiB")
def test_nothing():
    pass


@pytest.mark.max_vram("1 KiB")
def test_skipped():
    pytest.skip("not here")


def test_free():
    step()
"""
    )
    result = session.runpytest_inprocess()
    result.assert_outcomes(passed=2, failed=2, skipped=1)
    result.stdout.fnmatch_lines(
        ["*max_vram: the test planned nothing*", "*fix: use the fixture memory_plan*"]
    )


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("max_vram()", "*test_a.py:4: test_x: @pytest.mark.max_vram(): one size is needed*"),
        ("max_vram('10 GB', 3)", "*max_vram('10 GB', 3): one size is needed*"),
        ("max_saved(bytes=3)", "*max_saved(bytes=3): one size is needed*"),
        ("max_vram('10 GiBs')", "*unknown unit 'GiBs'; did you mean 'GiB'*"),
        ("max_saved(-1)", "*option 'max_saved': got -1*"),
        ("max_vram(0.5)", "*this is bytes, not torch's fraction*"),
    ],
)
def test_wrong_marks_are_usage_errors(session: pytest.Pytester, mark: str, said: str) -> None:
    session.makepyfile(
        test_a=f"import pytest\n\n\n@pytest.mark.{mark}\ndef test_x():\n    raise SystemError\n"
    )
    result = session.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([said])


def test_an_unknown_device_is_a_usage_error(session: pytest.Pytester) -> None:
    result = session.runpytest_inprocess("--ciuic-device", "h20")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--ciuic-device: *h20*"])


def test_the_device_is_that_of_the_command_line(session: pytest.Pytester) -> None:
    session.makepyfile(
        MODEL
        + """

def test_device(memory_plan):
    assert memory_plan(*make()).profile.name == "h200"
    assert memory_plan(*make(), device="l4").profile.name == "l4"
"""
    )
    session.runpytest_inprocess("--ciuic-device", "h200").assert_outcomes(passed=1)


def test_graph_breaks(session: pytest.Pytester) -> None:
    session.makepyfile(
        MODEL
        + """
from ciuic_compile.errors import TargetError


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(256, 256, device="meta"), nn.Linear(256, 256, device="meta")

    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


def test_broken(memory_plan):
    x = torch.randn(1024, 256, device="meta")
    with pytest.raises(TargetError, match="2 graphs"):
        memory_plan(Broken(), x)
    assert len(memory_plan.graphs(Broken(), x)) == 2
"""
    )
    session.runpytest_inprocess().assert_outcomes(passed=1)


def test_baseline(session: pytest.Pytester) -> None:
    path = session.makepyfile(test_a=FITS)
    file = session.path / "ciuic-tests-baseline.json"
    session.runpytest_inprocess().assert_outcomes(passed=1)
    assert not file.exists()
    result = session.runpytest_inprocess("--ciuic-update-baseline")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["baseline: 1 entry written to ciuic-tests-baseline.json"])
    session.runpytest_inprocess().assert_outcomes(passed=1)

    path.write_text(FITS.replace("hidden=512", "hidden=640"))
    result = session.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["baseline: peak * MiB -> * MiB*", "*test_a.py:*hidden=640*", "*with --ciuic-update-baseline*"]
    )
    before = file.read_text()
    session.makepyfile(test_b=FITS.replace("test_fits", "test_other"))
    session.runpytest_inprocess("--ciuic-update-baseline", "-k", "other").assert_outcomes(
        passed=1, deselected=1
    )
    assert "test_a.py::test_fits" in file.read_text() and "test_b.py::test_other" in file.read_text()
    assert before != file.read_text()
    session.runpytest_inprocess("--ciuic-update-baseline").assert_outcomes(passed=2)
    session.runpytest_inprocess().assert_outcomes(passed=2)


def test_a_broken_baseline_is_a_usage_error_and_stays(session: pytest.Pytester) -> None:
    session.makepyfile(FITS)
    file = session.path / "ciuic-tests-baseline.json"
    file.write_text('{"schema": "ciuic.baseline/9"}')
    result = session.runpytest_inprocess("--ciuic-update-baseline")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*another version*"])
    assert file.read_text() == '{"schema": "ciuic.baseline/9"}'


def test_a_baseline_that_cannot_be_written_fails_the_session(session: pytest.Pytester) -> None:
    session.makepyfile(FITS)
    result = session.runpytest_inprocess("--ciuic-update-baseline", "-o", "ciuic_baseline=missing/b.json")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = [line for line in result.outlines + result.errlines if "cannot be written" in line]
    assert len(told) == 1 and told[0].startswith("ERROR: the baseline is as it was: ")
    result.stdout.no_fnmatch_line("*written to*")


def test_marks_and_the_fixture_that_a_test_asks_for_when_it_runs(session: pytest.Pytester) -> None:
    session.makepyfile(
        MODEL
        + """

@pytest.fixture
def limited(request):
    request.node.add_marker(pytest.mark.max_vram("4 MiB"))


@pytest.fixture
def wrong(request):
    request.node.add_marker(pytest.mark.max_saved("4 MiBs"))


def test_asked_for_late(request):
    assert request.getfixturevalue("memory_plan")(*make()).input_bytes


def test_marked_in_a_fixture(limited, memory_plan):
    memory_plan(*make())


def test_marked_and_asked_for_late(limited, request):
    request.getfixturevalue("memory_plan")(*make())


def test_marked_by_itself(request, memory_plan):
    request.node.add_marker(pytest.mark.max_saved(1024))
    memory_plan(*make())


def test_marked_and_nothing_planned(limited):
    pass


def test_marked_wrongly(wrong, memory_plan):
    memory_plan(*make())
"""
    )
    result = session.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=5)
    told = [line for line in result.outlines if line.startswith(("max_vram:", "max_saved:"))]
    assert [line.split(": ")[0] for line in told] == ["max_vram", "max_vram", "max_saved", "max_vram"]
    assert all("over 4.00 MiB" in line for line in told[:2]) and "over 1.00 KiB" in told[2]
    assert "the test planned nothing" in told[3]
    result.stdout.fnmatch_lines(["*test_marked_wrongly: @pytest.mark.max_saved: *", "*unknown unit 'MiBs'*"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_a_baseline_holds_for_a_fixture_that_is_asked_for_late(session: pytest.Pytester) -> None:
    text = MODEL + "\n\ndef test_late(request):\n    request.getfixturevalue('memory_plan')(*make())\n"
    path = session.makepyfile(test_a=text)
    session.makepyfile(helper="", conftest="import helper\n")
    session.runpytest_inprocess("--ciuic-update-baseline").assert_outcomes(passed=1)
    file = session.path / "ciuic-tests-baseline.json"
    (entry,) = ciuic_compile.gate.baseline.load(file).entries.values()
    assert set(entry.record.files) == {"conftest.py", "helper.py", "test_a.py"}
    path.write_text(text.replace("hidden=512", "hidden=640"))
    result = session.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["baseline: peak * MiB -> * MiB*"])
    file.write_text("{}")
    result = session.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*is no baseline*"])


def test_with_xdist_in_processes_of_their_own(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    session.makepyfile(
        FITS + FITS.replace(MODEL, "").replace("test_fits", "test_too").replace("16 MiB", "1 MiB")
    )
    result = session.runpytest_subprocess("-n", "1", "--ciuic-update-baseline", "-p", "xdist")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["* MiB of 1.00 MiB,*::test_too", "baseline: 1 entry written to ciuic-tests-baseline.json"]
    )


def test_the_plugin_is_declared() -> None:
    tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"ciuic": "ciuic_compile.pytest_plugin"}


def test_the_plugin_is_installed_and_imports_no_torch() -> None:
    if not metadata.entry_points(group="torch_dynamo_backends", name="ciuic"):
        pytest.skip("not installed: without its entry point the backend is registered, which imports torch")
    code = (
        "import sys, ciuic_compile.pytest_plugin; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
