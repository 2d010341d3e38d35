"""Plans without weights, GPU or code: they are those of a compile, and leave the model as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo import pgo
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, FloorToInt, RoundToInt, ToFloat, TruncToInt

import ciuic_compile
from bench.models import MODELS
from ciuic_compile import InfeasibleBudgetError, OptionError, Plan, compat
from ciuic_compile.errors import TargetError
from ciuic_compile.planning import SIMULATED, call, plan
from tests.training import interpreted

SMALL = {"min_bytes": 0}


class Mlp(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.scale = torch.ones(64)  # no buffer
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.up(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.down(wide) * self.scale


def compiled_plan(model: nn.Module, batch: Any, loss_fn: Any, **options: Any) -> Plan:
    """The plan of the same step, really compiled, but for code generation."""
    torch._dynamo.reset()
    with interpreted():
        run = torch.compile(
            lambda b: call(model, b, loss_fn), backend="ciuic", options={"report": "off", **SMALL, **options}
        )
        run(batch)
    return ciuic_compile.plans()[-1]


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_it_is_the_plan_of_a_compile(name: str) -> None:
    torch.manual_seed(0)
    model, batches, loss_fn = MODELS[name]("tiny")
    batch = batches(0, torch.device("cpu"))
    (made,) = plan(model, batch, loss_fn, options=SMALL)
    expected = compiled_plan(model, batch, loss_fn)
    assert made.decisions == expected.decisions and len(made.decisions) > 10
    same = ("baseline_saved_bytes", "planned_saved_bytes", "baseline_peak_bytes", "input_bytes", "time_us")
    assert [getattr(made, f) for f in same] == [getattr(expected, f) for f in same]
    assert made.planned_peak_bytes == made.simulated_peak_bytes == expected.simulated_peak_bytes
    assert SIMULATED in made.notes and not made.replayed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt", "vit", "llama", "unet"])
def test_it_is_the_plan_of_a_compile_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    model, batches, loss_fn = MODELS[name]("tiny")
    options = {**SMALL, "device": "h200"}
    cuda = torch.device("cuda")
    with torch._inductor.config.patch(shape_padding=False):  # by a measurement, another one under load
        (made,) = plan(model, batches(0, torch.device("cpu")), loss_fn, options=options)
        expected = compiled_plan(model.to(cuda), batches(0, cuda), loss_fn, **options)
    assert made.decisions == expected.decisions and len(made.decisions) > 10


@pytest.mark.gpu
def test_a_gpu_changes_no_byte_of_a_plan(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    texts = []
    for visible in (os.environ.get("CUDA_VISIBLE_DEVICES", "0"), ""):
        file = tmp_path / f"plan{len(texts)}.json"
        command = [sys.executable, "-m", "ciuic_compile", "plan", "bench/targets.py:gpt2_medium"]
        command += ["--device", "h200", "--autocast", "bfloat16", "--json", str(file)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": str(root)}
        subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
        texts.append(file.read_bytes())
    assert texts[0] == texts[1]


def test_a_plan_does_not_depend_on_those_before_it_in_the_process() -> None:
    """Dynamo makes sizes symbolic that it has seen change: a second model of another batch was planned so."""
    last = [plan(Mlp(), torch.zeros(rows, 64), lambda y: y.sum(), options=SMALL)[0] for rows in (32, 48, 96)][
        -1
    ]
    torch._dynamo.reset()
    (alone,) = plan(Mlp(), torch.zeros(96, 64), lambda y: y.sum(), options=SMALL)
    assert not last.dynamic
    assert last.decisions == alone.decisions and last.planned_peak_bytes == alone.planned_peak_bytes


def test_weights_may_be_anywhere_and_stay_as_they_are() -> None:
    real = Mlp()
    with torch.device("meta"):
        meta = Mlp()
    x = torch.randn(128, 64)
    before = {k: v.clone() for k, v in real.state_dict().items()}
    held = [*real.parameters(), real.scale]
    (a,) = plan(real, (x, x), F.mse_loss, options=SMALL)
    y = x.to("meta")
    (b,) = plan(meta, (y, y), F.mse_loss, options=SMALL)
    assert a == replace(b, profile=a.profile)
    assert all(now is then for now, then in zip([*real.parameters(), real.scale], held, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in real.state_dict().items())
    assert all(p.grad is None for p in real.parameters())
    assert meta.up.weight.is_meta


def test_tied_weights_and_views_of_one_storage_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False)
            self.b = nn.Linear(64, 64, bias=False)
            if tie:
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.b(torch.sin(self.a(x))))

    x = torch.empty(8, 64, device="meta")
    with torch.device("meta"):
        tied, untied = Tied(True), Tied(False)
    sizes = [plan(m, x, torch.sum, options=SMALL)[0].input_bytes for m in (tied, untied)]
    assert sizes[1] - sizes[0] == 64 * 64 * 4


def test_a_graph_break_gives_several_plans_every_time() -> None:
    model = Mlp(breaks=True)
    for _ in range(10):  # Dynamo's own limit for one function is 8
        assert len(plan(model, torch.randn(32, 64), torch.sum, options=SMALL)) == 3


def test_batches_are_unpacked_as_calibrate_does() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x if y is None else x + y

    model, one, two = Model(), torch.tensor(1.0), torch.tensor(2.0)
    assert call(model, one, None) == 1
    assert call(model, (one, two), None) == 3
    assert call(model, {"x": one, "y": two}, None) == 3
    assert call(model, (one, two), lambda out, y: out * 10 + y) == 12
    assert call(model, [one, two], lambda out, y: out * 10 + y) == 12


def test_a_budget_that_nothing_fits_names_the_smallest() -> None:
    with pytest.raises(InfeasibleBudgetError, match="raise the budget") as failed:
        plan(Mlp(), torch.randn(128, 64), torch.sum, options={**SMALL, "budget": 1000})
    assert type(failed.value) is InfeasibleBudgetError, "as raised, without Dynamo's advice"
    assert failed.value.smallest_bytes > 1000
    (made,) = plan(
        Mlp(), torch.randn(128, 64), torch.sum, options={**SMALL, "budget": failed.value.smallest_bytes}
    )
    assert made.planned_peak_bytes <= failed.value.smallest_bytes


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((), "missing"),
        (torch.randn(4, 63), "Mlp|63|shape"),
    ],
)
def test_a_step_that_does_not_run_is_the_users(batch: Any, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        plan(Mlp(), batch, None, options=SMALL)


def test_values_are_not_there_between_graphs() -> None:
    class Reads(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if y.sum().item() > 0 else y

    with pytest.raises(TargetError, match=r"values.*has none here") as failed:
        plan(Reads(), torch.randn(4, 64), torch.sum, options=SMALL)
    assert "test_planning.py" in str(failed.value)


def test_nothing_that_needs_gradients() -> None:
    with pytest.raises(TargetError, match="nothing to plan"):
        plan(Mlp().requires_grad_(False), torch.randn(4, 64), torch.sum)


@pytest.mark.parametrize("given", [{"options": {"mode": "off"}}, {"autocast": "int8"}, {"device": "h2000"}])
def test_wrong_options(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="fix:"):
        plan(Mlp(), torch.randn(4, 64), torch.sum, **given)


def test_dynamic_sizes_and_autocast() -> None:
    (made,) = plan(Mlp(), torch.randn(128, 64), torch.sum, options=SMALL, dynamic=True)
    assert made.dynamic and "s" in made.symbolic_saved_bytes
    torch._dynamo.reset()
    with interpreted():
        ours = {"report": "off", **SMALL}
        model = Mlp()
        torch.compile(lambda batch: model(batch).sum(), backend="ciuic", options=ours, dynamic=True)(
            torch.randn(128, 64)
        )
    assert made.symbolic_saved_bytes == ciuic_compile.plans()[-1].symbolic_saved_bytes
    (half,) = plan(Mlp(), torch.randn(128, 64), torch.sum, options=SMALL, autocast="bfloat16")
    assert "bfloat16" in {d.storage.dtype for d in half.decisions}


def test_layers_that_share_one_graph_count_each() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Mlp() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                print(end="")  # Dynamo leaves the loop to Python
            return x

    plans = plan(Layers(), torch.randn(128, 64))
    assert len(plans) == 3 and len({p.planned_saved_bytes for p in plans}) == 1


def test_sizes_that_are_rounded() -> None:
    """A share of the rows, in whole ones, as many as an expert of a Mixture of Experts takes."""

    class Share(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            some = self.up(x)[: int(x.shape[0] * 1.25 / 4)]
            return self.up(F.gelu(self.up(some.tanh())))

    (made,) = plan(Share(), torch.randn(128, 64), options={**SMALL, "mode": "4:1"}, dynamic=True)
    sizes = [d.storage.symbolic_bytes for d in made.decisions if d.codec]
    assert any("Trunc" in size for size in sizes), sizes


@pytest.mark.parametrize(
    ("rounded", "expected"), [(TruncToInt, 12), (FloorToInt, 12), (CeilToInt, 13), (RoundToInt, 12)]
)
def test_a_rounded_size_is_computed_by_nodes(rounded: Any, expected: int) -> None:
    env = ShapeEnv()
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    tokens = env.create_symintnode(symbol, hint=39)
    graph = fx.Graph()
    graph.placeholder("tokens").meta["val"] = tokens
    expression = rounded(FloatTrueDiv(1.25 * ToFloat(symbol), sympy.Float(4.0)))  # 12.19
    node = compat.size_node(graph, env.create_symintnode(expression, hint=expected))
    graph.output(node)
    assert fx.GraphModule({}, graph)(39) == expected
    assert isinstance(node, fx.Node) and compat.hint(node.meta["val"]) == expected


def test_plans_may_be_made_by_several_threads() -> None:
    """Each is the one made alone, other threads' graph modules have code meanwhile, nothing stays changed."""

    def state() -> list[object]:
        return [fx.GraphModule.recompile, fx.Graph.node_copy, pgo._CODE_STATE, gc.isenabled()]

    (alone,) = plan(Mlp(), torch.randn(32, 64), options=SMALL)
    before, made = state(), list[bool]()

    def plans() -> None:
        for _ in range(2):
            (another,) = plan(Mlp(), torch.randn(32, 64), options=SMALL)
            made.append(another.decisions == alone.decisions)

    threads = [threading.Thread(target=plans) for _ in range(2)]
    for thread in threads:
        thread.start()
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    while any(thread.is_alive() for thread in threads):
        assert fx.GraphModule({}, graph)(3) == 3
    assert made == [True] * 4
    assert all(a is b for a, b in zip(before, state(), strict=True))


def test_a_planned_model_can_go() -> None:
    """Dynamo held the backend of each plan, and that the weights: 136 MiB for each plan of a small GPT."""
    model = Mlp()
    weight = weakref.ref(next(model.parameters()))
    plan(model, torch.zeros(32, 64), lambda y: y.sum(), options=SMALL)
    del model
    gc.collect()
    assert weight() is None
