"""The benchmarks measure what they say: known cases exactly, failures reported, nothing left running."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ciuic_compile
from bench import common, h200, measure, plot, saved, step_time, text
from bench.models import MODELS, WithLoss
from tests.training import interpreted

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", MODELS)
def test_models_learn(name: str) -> None:
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[name]("tiny")
    model = WithLoss(built, loss_fn)
    batch = batches(0, CPU)
    assert all(torch.equal(a, b) for a, b in zip(batch, batches(0, CPU), strict=True))
    assert not torch.equal(batch[0], batches(1, CPU)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(*batch)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", MODELS)
def test_lossless_trains_models_as_eager_does(name: str) -> None:
    """In one graph, and with eager's gradients: the passes and the partition, without Inductor's kernels."""
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[name]("tiny")
    model = WithLoss(built, loss_fn)
    batch = batches(0, CPU)
    model(*batch).backward()
    reference = measure.gradients(model)
    model.zero_grad(set_to_none=True)
    options = {"mode": "lossless", "report": "off"}
    with interpreted():
        torch.compile(model, backend="ciuic", fullgraph=True, options=options)(*batch).backward()
    assert measure.gradient_error(reference, measure.gradients(model)).worst < 1e-4


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_saved_counts_one_known_tensor(backend: str) -> None:
    x, w = torch.randn(96, 40), nn.Parameter(torch.randn(40, 24))

    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).square().sum()  # the backward needs x, w and their product

    loss = torch.compile(loss_of, backend=backend)(x, w)
    assert measure.saved(loss, [x, w]) == measure.Saved(96 * 24 * 4, 1)
    assert measure.saved(loss, [w]) == measure.Saved(96 * 24 * 4 + 96 * 40 * 4, 2)


def test_saved_counts_storages_not_views() -> None:
    x, w = torch.randn(8, 16), nn.Parameter(torch.randn(16, 32))
    a, b = (x @ w).chunk(2, 1)
    assert measure.saved((a * b).sum(), [x, w]) == measure.Saved(8 * 32 * 4, 1)


def test_saved_sees_tensors_stashed_on_the_context() -> None:
    class Stash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.new_zeros(3))
            ctx.stash = [x.new_zeros(5), {"deep": (x.new_zeros(7),)}]
            return x.sum()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError

    x = torch.randn(4, requires_grad=True)
    assert measure.saved(Stash.apply(x), [x]) == measure.Saved((3 + 5 + 7) * 4, 3)


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
def test_saved_is_what_the_plan_says(mode: str) -> None:
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS["gpt"]("tiny")
    model = WithLoss(built, loss_fn)
    batch = batches(0, CPU)
    loss = common.compile_as(model, mode)(*batch)
    (plan,) = ciuic_compile.plans()
    assert measure.saved(loss, measure.model_tensors(model, *batch)).nbytes == plan.planned_saved_bytes
    assert plan.baseline_saved_bytes > plan.planned_saved_bytes > 0


def test_cpu_peak_is_the_sum_of_what_lives_at_once() -> None:
    before = torch.empty(1 << 18)
    with measure.peak(CPU) as peak:
        a = torch.empty(1 << 18)
        del a
        b = torch.empty(1 << 17)
        c = torch.empty(1 << 18)
        del c
        d = torch.empty(1 << 16)
    assert peak.nbytes == (b.nbytes + before.nbytes), d.shape


@pytest.mark.gpu
def test_cuda_peak_is_above_the_start() -> None:
    device = torch.device("cuda")
    keep = torch.empty(1 << 20, device=device)
    with measure.peak(device) as peak:
        a = torch.empty(1 << 20, device=device)
        del a
        b = torch.empty(1 << 18, device=device)
    assert peak.nbytes == keep.nbytes
    assert b.nbytes < keep.nbytes


def test_gradient_error() -> None:
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 12.0]), "c": torch.full((2,), 1e-7)}
    got = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.9, 12.0]), "c": torch.full((2,), 1e-3)}
    error = measure.gradient_error(reference, got)
    assert error.whole == pytest.approx(math.hypot(0.5, 0.9) / 13, rel=1e-4)
    assert (error.worst_name, error.tiny) == ("a", ("c",))
    assert error.worst == pytest.approx(0.1)
    assert error.tiny_worst == pytest.approx(math.sqrt(2) * 1e-3 / (13 / math.sqrt(3)), rel=1e-3)
    got["b"][0] = math.nan
    poisoned = measure.gradient_error(reference, got)
    assert poisoned.worst_name == "b"
    assert math.isnan(poisoned.worst) and math.isnan(poisoned.whole)
    with pytest.raises(ValueError, match="'c'"):
        measure.gradient_error(reference, {"a": got["a"], "b": got["b"]})


def test_corpus_is_the_same_every_time_and_held_out_text_is_apart() -> None:
    corpus, again = text.load(1 << 18), text.load(1 << 18)
    inputs, targets = corpus.batch(3, 5, 4, 32, CPU)
    assert torch.equal(inputs, again.batch(3, 5, 4, 32, CPU)[0])
    assert not torch.equal(inputs, corpus.batch(3, 6, 4, 32, CPU)[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    batches = corpus.validation(3, 4, 32, CPU)
    assert [b[0].shape for b in batches] == [(4, 32)] * 3
    training, window = corpus.train.numpy().tobytes(), corpus.held_out[:4096].numpy().tobytes()
    assert window not in training


@pytest.mark.parametrize("pillow", [True, False])
def test_picture_is_a_png_that_shows_both_curves(
    pillow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pillow:
        pytest.importorskip("PIL")
    else:
        monkeypatch.setitem(sys.modules, "PIL", None)
    curve = [(i, 3 / (i + 1)) for i in range(20)]
    path = tmp_path / "a" / "curves.png"
    plot.write_curves(path, "loss", {"one": curve, "same": curve, "other": [(x, y + 1) for x, y in curve]})
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (plot.WIDTH, plot.HEIGHT)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    rows = zlib.decompress(data[start + 4 : start + 4 + length])
    pixels = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(plot.HEIGHT, -1)[:, 1:].reshape(-1, 3)
    for colour in plot.COLOURS[:3]:
        shown = (pixels == torch.tensor(colour, dtype=torch.uint8)).all(1).sum()
        assert shown > 200, f"{colour} is hidden"


def test_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing finite"):
        plot.write_curves(tmp_path / "x.png", "loss", {"one": [(0, math.nan)]})


def test_a_failed_cell_is_reported_and_the_table_still_prints(capsys: pytest.CaptureFixture[str]) -> None:
    spec = {"model": "gpt", "size": "tiny", "device": "cpu", "precision": "fp32", "config": "9", "steps": 1}
    (result,) = common.run_cells("bench.saved", [spec], 120, 1, lambda s: s["config"])
    assert "OptionError" in result["failed"]
    assert saved.rows([result]) == [["gpt fp32", "9", "failed", *["-"] * 6]]
    assert "FAILED" in capsys.readouterr().err
    assert "not done after" in common.run_cell("bench.saved", spec, 0.2)["failed"]


def test_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    common.table("title", ("", "n"), [["long name", "1"], ["x", "1,234"]])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "                 n",
        "  long name      1",
        "  x          1,234",
    ]


@pytest.mark.slow
def test_step_time_cells_measure_and_take_turns() -> None:
    shared = {"shape": {**step_time.SMALL, "layers": 1}, "device": "cpu", "steps": 2}
    result = step_time.cell({"config": "4:1", **shared})
    assert 0 < result["saved"] == result["planned_saved"]
    assert 0 < result["error"]["whole"] < 0.5
    torch._dynamo.reset()
    result = step_time.cell({"config": "turns", "turns": ["eager", "lossless"], **shared})
    assert result["ratio"]["eager"] == 1.0
    assert result["saved"]["eager"] > result["saved"]["lossless"] > 0
    assert {len(t) for t in result["step_ms_all"].values()} == {2}


@pytest.mark.slow
def test_demo_trains_twice_and_compares(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    inductor, ours = result["runs"]
    assert inductor["saved"] >= 3.5 * ours["saved"] > 0
    assert inductor["peak"] > ours["peak"] > 0
    assert inductor["curve"][0] == ours["curve"][0], "not the same start"
    assert inductor["curve"][-1][1] < inductor["curve"][0][1]
    assert abs(result["validation_difference"]) < 0.05
    assert "ciuic plan: graph 0" in done.stderr, "the plan was not printed"
    assert "[##############################] 6/6" in done.stderr
    assert f"{result['validation_difference']:+.4f} nat" in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 1000


def test_an_item_that_runs_over_is_stopped_with_its_children(tmp_path: Path) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    item = h200.Item("slow", ("-c", parent), 3)
    result = h200.run(item, tmp_path, tmp_path, limit=3)
    assert result["exit"] == "stopped after 3 s"
    pid = int(result["said"])
    for _ in range(50):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid)
    assert "===== slow" in (tmp_path / "h200.log").read_text()


def test_closing_line() -> None:
    said = "tests/a.py ..\n===== 3 passed, 1 skipped in 2.1s =====\nmake: done"
    assert h200.closing_line(said) == "3 passed, 1 skipped in 2.1s"
    assert h200.closing_line("") == ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
