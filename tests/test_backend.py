"""What users of ``torch.compile(model, backend="ciuic")`` see; with generated code where it counts."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.virtualized import V
from torch.utils.checkpoint import checkpoint

import ciuic_compile
from bench.measure import model_tensors, peak, saved
from ciuic_compile import backend
from ciuic_compile.report import from_json
from tests.training import (
    SMALL,
    Lambda,
    compiled,
    errors,
    interpreted,
    kernel_cache,
    mlp,
    only_kernels_cached,
    rows,
    step,
    weighted_sum,
)

__all__ = ["kernel_cache"]
ROUNDING = 5e-6


@pytest.fixture(autouse=True)
def inductor_cache(kernel_cache: Path) -> Iterator[Path]:
    torch.manual_seed(0)
    with only_kernels_cached(kernel_cache) as folder:
        yield folder


@pytest.fixture
def fast() -> Iterator[None]:
    """For what code generation has no part in."""
    with interpreted():
        yield


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the logger ``ciuic_compile`` says."""
    monkeypatch.setenv("COLUMNS", "120")
    logger, text = logging.getLogger("ciuic_compile"), io.StringIO()
    handler, level = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield text
    logger.removeHandler(handler)
    logger.setLevel(level)


def gradients(model: nn.Module, times: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    """Accumulated over ``times`` batches."""
    run = compiled(model, **kwargs)
    for i in range(times):
        weighted_sum([run(rows(33 + i))])[0].backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def worst(reference: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The largest relative error of one parameter."""
    assert set(reference) == set(got)
    return max(((got[n] - g).norm() / g.norm()).item() for n, g in reference.items())


# ---------------------------------------------------------------- real lowering


def test_checkpoint_with_dropout() -> None:
    """The recomputed masks are the forward's: gradients are Inductor's, in and out of the region."""

    def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
        def block(y: Tensor) -> Tensor:
            return F.dropout(layers[1](F.dropout(F.gelu(layers[0](y)), 0.3)), 0.2)

        return layers[2](F.dropout(checkpoint(block, x, use_reentrant=False), 0.1))

    model = Lambda(forward)
    theirs = step(model, [rows()], "inductor", seed=3)
    for mode in ("lossless", "4:1"):
        ours = step(model, [rows()], mode, seed=3)
        assert torch.equal(ours.outputs[0], theirs.outputs[0])
        assert max(errors(theirs, ours).values()) <= max(ours.bound, ROUNDING)
        assert ours.saved.nbytes == ours.planned_saved_bytes < theirs.saved.nbytes
    other = step(model, [rows()], "4:1", seed=4)
    assert not torch.equal(other.outputs[0], theirs.outputs[0])


def test_dynamic_batch_sizes_and_odd_tails() -> None:
    """One graph for all sizes; each size's gradients against eager's."""
    model = mlp()
    run = compiled(model, "4:1", dynamic=True)
    for size in (33, 7, 64, 129):
        found = []
        for function in (model, run):
            model.zero_grad()
            output = function(rows(size))
            loss, weights = weighted_sum([output])
            if function is run:
                held = saved(loss, [*model_tensors(model), *weights])
            loss.backward()
            found.append(
                {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        (plan,) = ciuic_compile.plans()
        assert worst(*found) <= plan.gradient_error_bound
        assert plan.dynamic
        if size == 33:
            assert held.nbytes == plan.planned_saved_bytes + rows().nbytes  # the input is held too
    assert plan.symbolic is not None
    (symbol,) = plan.symbolic.symbols
    for size in (7, 129):  # what Inductor's code takes at sizes that it was not made at
        x = rows(size)
        model.zero_grad()
        del output  # of the size before: freed inside, it would be taken off
        with peak(x.device) as measured:
            output = run(x)
            output.square().sum().backward()  # the plan's output is held, its gradient is torch's own
        at = plan.at(**{symbol.name: size})
        assert measured.nbytes == pytest.approx(at.planned_peak_bytes, rel=1e-3)


def test_a_size_at_which_the_budget_breaks_is_told_once(printed: io.StringIO) -> None:
    model = mlp()
    with interpreted():
        run = compiled(model, "lossless", dynamic=True, options={"budget": "1MiB", "report": "short"})
        said = []
        for size in (33, 70, 7000, 7000, 64):
            run(rows(size)).sum().backward()
            said.append(printed.getvalue())
    (plan,) = ciuic_compile.plans()
    assert plan.symbolic is not None
    (symbol,) = plan.symbolic.symbols
    over = plan.at(**{symbol.name: 7000}).planned_peak_bytes / 2**20
    words = f"peak {over:,.1f} MiB is over the budget 1.0 MiB at {symbol.name}=7000"
    note = f"ciuic: {plan.name}: decisions no longer hold: {words}"
    assert "ciuic plan" in said[0] == said[1] and "no longer" not in said[0]
    assert said[2].removeprefix(said[1]).strip() == note
    assert said[3] == said[4] == said[2]


@pytest.mark.parametrize(
    ("inductor_mode", "option"),
    [("reduce-overhead", "triton.cudagraphs"), ("max-autotune-no-cudagraphs", "max_autotune")],
)
def test_inductors_modes_reach_inductor(
    inductor_mode: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches: list[dict[str, Any]] = []
    lower = backend.compile_fx

    def spy(*args: Any, config_patches: dict[str, Any]) -> Any:
        patches.append(config_patches)
        return lower(*args, config_patches=config_patches)

    monkeypatch.setattr(backend, "compile_fx", spy)
    model = mlp()
    reference = gradients(copy.deepcopy(model), mode="eager")
    weighted_sum([torch.compile(model, backend="ciuic", mode=inductor_mode)(rows())])[0].backward()
    got = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    (plan,) = ciuic_compile.plans()
    assert plan.mode == "4:1" and ROUNDING < worst(reference, got) <= plan.gradient_error_bound
    assert patches[0][option] is True


@pytest.mark.parametrize("donated", [False, True])
def test_two_backwards_through_one_graph(donated: bool) -> None:
    """``retain_graph``: the second backward reads what the first left, or is refused as Inductor's is."""
    outcomes = {}
    for mode in ("inductor", "4:1"):
        torch._dynamo.reset()
        model = mlp()
        with torch._functorch.config.patch(donated_buffer=donated):
            loss, _ = weighted_sum([compiled(model, mode)(rows())])
            try:
                loss.backward(retain_graph=True)
                once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                loss.backward()
            except RuntimeError as error:
                assert donated and "donated" in str(error)
                outcomes[mode] = "refused"
                continue
        assert all(
            torch.equal(p.grad, 2 * once[n]) for n, p in model.named_parameters() if p.grad is not None
        )
        outcomes[mode] = "twice the gradient"
    assert outcomes["inductor"] == outcomes["4:1"]


@pytest.mark.usefixtures("fast")
def test_gradient_accumulation() -> None:
    model = mlp()
    reference = gradients(copy.deepcopy(model), times=3, mode="eager")
    got = gradients(model, times=3, mode="4:1")
    assert worst(reference, got) <= max(p.gradient_error_bound for p in ciuic_compile.plans())


@pytest.mark.usefixtures("fast")
def test_graph_breaks_give_several_plans() -> None:
    def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
        h = layers[1](F.gelu(layers[0](x)))
        torch._dynamo.graph_break()
        return layers[2](F.gelu(layers[2](h)))

    model = Lambda(forward)
    eager, ours = step(model, [rows()], "eager"), step(model, [rows()], "4:1")
    assert [p.name for p in ours.plans] == sorted({p.name for p in ours.plans}) and len(ours.plans) == 2
    assert max(errors(eager, ours).values()) <= ours.bound
    assert any(d.codec for p in ours.plans for d in p.decisions)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(model, [rows()], "4:1", fullgraph=True)


@pytest.mark.usefixtures("fast")
def test_fullgraph_gives_one_plan() -> None:
    assert len(step(mlp(), [rows()], "4:1", fullgraph=True).plans) == 1


def _evaluate(model: nn.Module, kind: str) -> tuple[nn.Module, Any]:
    if kind == "frozen":
        return model.requires_grad_(False), torch.enable_grad()
    return model.eval(), torch.inference_mode() if kind == "inference_mode" else torch.no_grad()


@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "frozen"])
def test_inference_is_inductors_with_a_one_line_note(kind: str, printed: io.StringIO) -> None:
    model, context = _evaluate(mlp(0.5), kind)
    with context:
        torch.manual_seed(5)
        there = torch.compile(copy.deepcopy(model), backend="inductor")(rows())
        torch.manual_seed(5)
        run = compiled(model, "4:1", options={"report": "short"})
        assert torch.equal(run(rows()), there)
        run(rows())
    assert ciuic_compile.plans() == ()
    (line,) = printed.getvalue().splitlines()
    assert "inference" in line and "nothing is compressed" in line


@pytest.mark.usefixtures("fast")
def test_training_and_evaluating_one_compiled_model(printed: io.StringIO) -> None:
    model = mlp()
    run = compiled(model, "4:1", options={"report": "short"})
    for _ in range(2):
        weighted_sum([run(rows())])[0].backward()
        with torch.no_grad():
            run(rows())
    assert len(ciuic_compile.plans()) == 1
    assert printed.getvalue().count("ciuic plan:") == 1 and printed.getvalue().count("inference") == 1


@pytest.mark.usefixtures("fast")
def test_several_models_and_modes_in_one_process() -> None:
    """Interleaved, each keeps its own plan."""
    first = Lambda(lambda m, x: m[2](F.gelu(m[1](F.gelu(m[0](x))))))
    models = {mode: copy.deepcopy(first) for mode in ("eager", "lossless", "4:1", "off")}
    runs = {mode: compiled(model, mode) for mode, model in models.items()}
    for _ in range(2):
        for run in runs.values():
            weighted_sum([run(rows())])[0].backward()
    assert [p.mode for p in ciuic_compile.plans()] == ["lossless", "4:1"]
    exact, *found = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models.values()
    )
    lossless, lossy, off = (worst(exact, g) for g in found)
    assert max(lossless, off) < ROUNDING < lossy <= ciuic_compile.plans()[1].gradient_error_bound


def test_reset_forgets_the_plans(fast: None) -> None:
    step(mlp(), [rows()], "4:1")
    assert ciuic_compile.plans()
    torch._dynamo.reset()
    assert ciuic_compile.plans() == ()


# ---------------------------------------------------------------- the report


def test_the_plan_is_printed_once_before_anything_runs(printed: io.StringIO) -> None:
    model = Lambda(lambda m, x: m[1](F.gelu(m[0](x))))
    run = compiled(model, "4:1", options={"report": "short"})
    plans_before_each_run: list[int] = []
    with interpreted(lambda: plans_before_each_run.append(printed.getvalue().count("ciuic plan:"))):
        for _ in range(3):
            weighted_sum([run(rows())])[0].backward()
    text = printed.getvalue()
    assert plans_before_each_run == [1] * 6  # three forwards, three backwards
    assert 5 <= len(text.splitlines()) <= 25
    (plan,) = ciuic_compile.plans()
    assert plan.name in text and "4:1" in text and "test_backend.py:" in text and "layers.0" in text


@pytest.mark.usefixtures("fast")
def test_the_plan_can_be_silenced_through_logging(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ciuic_compile")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        step(mlp(), [rows()], "4:1", options={"report": "short"})
    finally:
        logger.setLevel(level)
    assert "ciuic" not in "".join(capfd.readouterr()) and len(ciuic_compile.plans()) == 1


@pytest.mark.usefixtures("fast")
def test_the_report_as_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ours = step(mlp(), [rows()], "4:1", options={"report": str(path)})
    assert from_json(path.read_text()) == ours.plans[0]


# ---------------------------------------------------------------- options, budget, the two-line form


@pytest.mark.parametrize(
    "kwargs",
    [
        {"options": {"mod": "4:1"}},
        {"options": {"mode": "4"}},
        {"options": {"budget": "12 gigs"}},
        {"options": {"budget": 0}},
        {"options": {"report": "loud"}},
        {"options": {"mode": "off", "budget": "1GiB"}},
        {"mode": "four"},
    ],
)
def test_wrong_options_fail_in_torch_compile_itself(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ciuic_compile.OptionError, match="valid:"):
        torch.compile(mlp(), backend="ciuic", **kwargs)


def test_an_infeasible_budget_says_the_smallest(fast: None) -> None:
    with pytest.raises(ciuic_compile.InfeasibleBudgetError) as caught:
        step(mlp(), [rows()], "4:1", options={"budget": 1000})
    assert not isinstance(caught.value, torch._dynamo.exc.BackendCompilerFailed)
    smallest = caught.value.smallest_bytes
    assert str(smallest) in str(caught.value) and caught.value.budget_bytes == 1000
    assert step(mlp(), [rows()], "4:1", options={"budget": smallest}).plans[0].planned_peak_bytes <= smallest


def test_a_feasible_budget_lowers_the_planned_peak(fast: None) -> None:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + m[1](F.gelu(m[0](x)))
        return x

    model = Lambda(forward)
    free = step(model, [rows(128)], "1:1").plans[0]
    budget = int(free.planned_peak_bytes * 0.95)
    held = step(model, [rows(128)], "1:1", options={"budget": budget}).plans[0]
    assert held.planned_peak_bytes <= budget < free.planned_peak_bytes
    assert held.budget_bytes == budget and held.planned_saved_bytes < free.planned_saved_bytes


def test_enable_and_disable_compression(fast: None) -> None:
    untouched = torch.compile
    with pytest.raises(ciuic_compile.OptionError):
        ciuic_compile.enable_compression(mode="nonsense")
    assert torch.compile is untouched
    try:
        ciuic_compile.enable_compression(mode="6:1", min_bytes=SMALL, report="off")
        weighted_sum([torch.compile(mlp())(rows())])[0].backward()
        weighted_sum([torch.compile(mlp(), options={"mode": "2:1"})(rows())])[0].backward()
        weighted_sum([torch.compile(mlp(), backend="aot_eager")(rows())])[0].backward()
    finally:
        ciuic_compile.disable_compression()
    assert torch.compile is untouched
    assert [p.mode for p in ciuic_compile.plans()] == ["6:1", "2:1"]
    weighted_sum([torch.compile(mlp(), backend="ciuic", options={"report": "off"})(rows())])[0].backward()
    assert ciuic_compile.plans()[-1].mode == "4:1"


@pytest.mark.usefixtures("fast")
def test_a_pattern_that_matches_nothing_is_named() -> None:
    model = mlp()
    run = compiled(model, "4:1", options={"deny": ["0", "haed", "aten.*"]})
    run(rows()).sum().backward()
    (plan,) = ciuic_compile.plans()
    assert [n for n in plan.notes if "deny" in n] == [
        "allow/deny: 'haed' matches no module and no op of this graph"
    ]


@pytest.mark.parametrize("globally", [True, False])
def test_the_users_own_pass_on_inductors_kernels_still_runs(globally: bool) -> None:
    """Ours takes that place, to order the backward's kernels."""
    seen = []

    def noted(nodes: list[Any]) -> list[Any]:
        seen.append(V.graph.is_backward)
        return nodes

    own = {"_post_fusion_custom_pass": noted}
    with torch._inductor.config.patch({**(own if globally else {}), "fx_graph_cache": False}):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        options = {"report": "off", **({} if globally else own)}
        torch.compile(model, backend="ciuic", options=options)(torch.randn(8, 64)).sum().backward()
    assert set(seen) == {False, True}
