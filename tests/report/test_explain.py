"""``explain`` says the same of a step as the HTML page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from ciuic_compile.report import html
from ciuic_compile.report._format import step_name
from ciuic_compile.report.explain import explain_peak
from ciuic_compile.types import Block, Line, Plan, Role, Timeline, Track

STEPS = ("a", "b", "c", "", "d", "e")  # three kernels of the forward; two of the backward after its start


def track(peak: int) -> Track:
    """A track with the most alive at a step."""
    every = Block("a#0", Role.SAVED, None, "", 0, "float32", (2,), None, 8, 0, len(STEPS) - 1)
    return Track(STEPS, 3, (every, replace(every, id="b#0", first=peak, last=peak)))


NAMES = (
    "forward 1 of 3", "forward 2 of 3", "forward 3 of 3", "between forward and backward", "backward 1 of 2",
    "backward 2 of 2",
)  # fmt: skip


@pytest.mark.parametrize(("step", "name"), list(enumerate(NAMES)))
def test_the_peak_is_at_a_step_counted_as_on_the_page(step: int, name: str, plan: Plan) -> None:
    timeline = Timeline((Line("train.py", 3, "h = f(x)"),), track(0), track(step))
    assert f"alive at the simulated peak, {name}:" in explain_peak(replace(plan, timeline=timeline))


def test_the_page_counts_so() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js, to run the page's function")
    function = re.search(r"^function stepName\(.*?^}$", html._read("plan.js"), re.MULTILINE | re.DOTALL)
    assert function is not None
    told = f"{{steps: {json.dumps(STEPS)}, forward: 3}}"
    code = f"{function[0]}\nconsole.log(JSON.stringify([0, 1, 2, 3, 4, 5].map(s => stepName({told}, s))))"
    ran = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [step_name(track(0), step) for step in range(6)] == list(NAMES)
