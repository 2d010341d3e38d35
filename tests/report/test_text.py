"""The text of a plan: what it says, and that it always fits."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_compile.report import render_html, render_note, render_text
from ciuic_compile.report._format import (
    codec_label,
    crop,
    crop_left,
    duration,
    factor,
    op_label,
    percent,
    short_file,
    size,
    star,
)
from ciuic_compile.report.summary import alive_at_peak
from ciuic_compile.report.text import styled
from ciuic_compile.types import Action, Decision, Plan, Price, Source, Storage, TensorClass

EMPTY = Plan("", "off", (), 0, 0, 0, 0, 0.0, 0.0, 0.0)


def fits(text: str, lines: int = 25, columns: int = 120) -> None:
    assert text.endswith("\n")
    assert text.isascii()
    assert all(c == "\n" or c.isprintable() for c in text)
    rows = text.splitlines()
    assert len(rows) <= lines
    assert max(map(len, rows)) <= columns


def test_short_says_what_a_reader_asks(plan: Plan) -> None:
    text = render_text(plan)
    fits(text)
    for words in (
        "graph 0 (Model.forward) | mode 4:1 | cuda: NVIDIA H200",
        "planned = estimated before the first run",
        "peak   Inductor 900 MiB, planned 640 MiB: 1.41x less; within 700 MiB budget",
        "saved  Inductor 692 MiB in 7 tensors, planned 550 MiB: 1.26x less",
        "planned +30 us a step; gradient error 1.3%, any parameter's <= 5%",
        "128 MiB -> 34.0 MiB  INT4        2x  blocks.*.mlp (aten.mm)",
        "llama/model.py:57  gate = self.gate(x)",
        "only the loss is computed from it",
        "4:1 was asked for",
    ):
        assert words in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("    ")}
    assert rows["kept"][1] == "1"
    assert rows["recomputed"][1] == "2"
    assert rows["INT8"][1:4] == ["2", "32.0", "MiB"]
    assert rows["INT4"][-2:] == ["34.0", "MiB"]
    assert rows["not"][2] == "1"  # the parameter


def test_a_usual_terminal_loses_nothing_important(plan: Plan) -> None:
    text = render_text(plan, width=80)
    fits(text, columns=80)
    assert "within 700 MiB budget" in text
    assert "<= 5%" in text
    assert "model.py:57" in text
    assert "..." not in text.split("largest")[0]


@pytest.mark.parametrize("width", [80, 120])
def test_alive_at_the_peak_names_the_users_lines(small: Plan, width: int) -> None:
    text = render_text(small, width=width)
    fits(text, columns=width)
    assert small.timeline is not None
    track = small.timeline.planned
    (title,) = [line for line in text.splitlines() if "alive at the planned peak" in line]
    assert size(track.peak_bytes) in title
    rows = text.splitlines()[text.splitlines().index(title) + 1 :][:4]
    assert all("part" in row and ".py:" in row for row in rows)
    groups = alive_at_peak(small.timeline)
    assert sum(g.nbytes for g in groups) == track.peak_bytes
    assert [row.split("  ")[2].strip() for row in rows] == [size(g.nbytes) for g in groups[:4]]
    every = [line for line in render_text(small, "full").splitlines() if "net/part" in line]
    assert len(every) >= len(groups)


def test_colour_is_for_terminals_and_changes_no_letter(plan: Plan) -> None:
    text = render_text(plan)
    coloured = styled(text)
    assert coloured.plain == text.rstrip("\n")
    styles = {coloured.plain[s.start : s.end]: str(s.style) for s in coloured.spans}
    assert "green" in styles["1.41x less"]
    assert "red" in {str(s.style) for s in styled(render_text(replace(plan, budget_bytes=1))).spans}


def test_over_budget_and_worse_than_inductor_is_said(plan: Plan) -> None:
    text = render_text(replace(plan, budget_bytes=1024, planned_peak_bytes=1800 * 2**20))
    assert "2x MORE; OVER 1.00 KiB budget" in text


def test_full_lists_everything(plan: Plan) -> None:
    notes = tuple(f"note number {i} " + "and more words " * 30 for i in range(9))
    text = render_text(replace(plan, notes=notes, dynamic=True, symbolic_saved_bytes="4096*s77"), "full")
    assert text.isascii()
    for words in (
        "logits",
        "mlp_1",
        "int4_group64",
        "blocks.1.attn",
        "4096*s77",
        "all 8 storages",
        "note number 8",
    ):
        assert words in text


def test_empty_plan() -> None:
    text = render_text(EMPTY)
    fits(text)
    assert "the same" in text
    assert "largest" not in text
    fits(render_text(EMPTY, "full"))


def test_many_layers_collapse_and_stay_fast(plan: Plan) -> None:
    decisions: list[Decision] = []
    for i in range(5000):
        source = Source(
            "/very/long" * 40 + "/model.py", i % 7, "x = " + "y + " * 400, f"layers.{i}.{'deep.' * 60}mlp"
        )
        storage = Storage(
            f"n{i}", (1,) * 60, "bfloat16", 2**20, "s0", TensorClass.ACTIVATION, "aten.mm.default", source
        )
        decisions.append(Decision(storage, Action.COMPRESS, "int8_group64", 2**19, 2**20))
    big = replace(plan, decisions=tuple(decisions), notes=("w" * 10_000,) * 50)
    start = time.perf_counter()
    text = render_text(big)
    assert time.perf_counter() - start < 5
    fits(text)
    assert "715x" in text
    assert "first 6 of 7" in text
    assert "report='full' shows all" in text
    assert len(render_text(big, "full").splitlines()) > 5000


def test_many_codecs_are_summed(plan: Plan) -> None:
    base = plan.decisions[0]
    decisions = tuple(replace(base, codec=f"int{bits}_group64") for bits in (8, 6, 5, 4, 3, 2))
    text = render_text(replace(plan, decisions=decisions))
    fits(text)
    rows = [line.split() for line in text.splitlines()]
    assert [r[0] for r in rows if r[:1] and r[0] in ("INT8", "INT6", "INT5", "others")] == [
        "INT8",
        "INT6",
        "others",
    ]
    assert next(r for r in rows if r and r[0] == "others")[1] == "4"


@settings(max_examples=100, deadline=None)
@given(data=st.data(), width=st.integers(-5, 500))
def test_every_plan_fits(plans: st.SearchStrategy[Plan], data: st.DataObject, width: int) -> None:
    plan = data.draw(plans)
    fits(render_text(plan, width=width), columns=min(max(width, 80), 120))
    assert render_text(plan) == render_text(plan)
    assert render_text(plan, "full", width).isascii()


@given(st.text())
def test_every_note_is_one_line(text: str) -> None:
    fits(render_note(text), lines=1)
    assert render_note("inference graph: compiled as Inductor would") == (
        "ciuic: inference graph: compiled as Inductor would\n"
    )


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (2**20 - 1, "1.00 MiB"),
     (10 * 2**30, "10.0 GiB"), (-2048, "-2.00 KiB"), (2**80, "1048576 EiB")],
)  # fmt: skip
def test_size(nbytes: int, words: str) -> None:
    assert size(nbytes) == words


def test_small_formats() -> None:
    assert [duration(t) for t in (0.0, 12.0, -4100.0, 2.5e6)] == ["0 us", "+12 us", "-4.1 ms", "+2.5 s"]
    assert duration(math.inf) == "an unknown time"
    assert percent(math.nan) == "unknown"
    assert [percent(x) for x in (0.0, 0.0131, 0.5, 1.5)] == ["0%", "1.3%", "50%", "150%"]
    assert [factor(4, 1), factor(1, 4), factor(4, 0), factor(0, 4)] == [
        "4x less",
        "4x MORE",
        "nothing left",
        "MORE",
    ]
    assert (crop("abcdef", 5), crop_left("abcdef", 5), crop("abc", 2)) == ("ab...", "...ef", "ab")
    assert star("blocks.3.mlp2.0") == "blocks.*.mlp2.*"
    assert star("L['self'].h[11].x") == "L['self'].h[*].x"
    labels = ["int8_group64", "int4_group64_affine", "fp8_e5m2", None, "bitpack"]
    assert [codec_label(c) for c in labels] == ["INT8", "INT4", "FP8", "CODEC?", "BITPACK"]
    assert [op_label(o) for o in ("aten.mm.default", "<built-in function getitem>", "")] == [
        "aten.mm",
        "getitem",
        "",
    ]
    assert short_file("/venv/lib/python3.11/site-packages/timm/vit.py") == "timm/vit.py"


def test_what_another_budget_would_change(plan: Plan) -> None:
    price = Price(2**30, 3100.0, 12000.0)
    shown = render_text(replace(plan, price=price))
    assert (
        "price  1.00 GiB more saves 3.1 ms a step, 1.00 GiB less costs 12 ms, gradient error weighed in"
        in shown
    )
    exact = render_text(replace(plan, price=replace(price, less_costs_us=None), gradient_error=0.0))
    assert "1.00 GiB less is more than any plan found can do\n" in exact
    assert "price" not in render_text(plan)
    assert "1.00 GiB more saves 3.1 ms" in render_html(replace(plan, price=price))
