"""The cut that chooses what lives from forward to backward: optimal on small graphs, and its rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ciuic_compile import compat
from ciuic_compile.analyze import MemoryModel
from ciuic_compile.capture import owner
from ciuic_compile.partitioner import plan_and_rewrite
from ciuic_compile.planner import select
from ciuic_compile.planner.select import NoCut, _skip_sources, may_rebuild, select_saved
from tests.stages import HandMade, Stage, by_name, differ, run_pair, stage

aten, prims = torch.ops.aten, torch.ops.prims
MODULE = "ciuic_compile.planner.select"

# one forward op a step: which op, and which earlier values it reads
steps = st.lists(
    st.tuples(
        st.sampled_from(["sin", "mul", "add", "mm", "view", "sum"]), st.integers(0, 99), st.integers(0, 99)
    ),
    min_size=1,
    max_size=9,
)


def random_model(ops: Sequence[tuple[str, int, int]], reads: Sequence[int]) -> MemoryModel:
    """A joint graph whose backward multiplies the tangent by the forward values that ``reads`` picks."""
    made = HandMade()
    values = [made.placeholder("primals_1", 4, 4), made.placeholder("primals_2", 4, 4)]
    tangent = made.placeholder("tangents_1", 4, 4)
    for op, a, b in ops:
        x, y = values[a % len(values)], values[b % len(values)]
        values.append(
            {
                "sin": lambda x=x: made.call(aten.sin.default, x),
                "mul": lambda x=x, y=y: made.call(aten.mul.Tensor, x, y),
                "add": lambda x=x, y=y: made.call(aten.add.Tensor, x, y),
                "mm": lambda x=x, y=y: made.call(aten.mm.default, x, y),
                "view": lambda x=x: made.call(aten.permute.default, x, [1, 0]),
                "sum": lambda x=x: made.call(
                    aten.expand.default, made.call(aten.sum.dim_IntList, x, [1], True), [4, 4]
                ),
            }[op]()
        )
    last = made.call(aten.mm.default, values[-1], values[1])
    gradient = tangent
    for read in reads:
        gradient = made.call(aten.mul.Tensor, gradient, values[read % len(values)])
    return made.model(made.captured([last], [gradient, None]))


def rebuilt_from(model: MemoryModel, saved: set[fx.Node], rebuildable: Callable[[fx.Node], bool]) -> bool:
    """Whether the backward gets all it reads from ``saved`` and the inputs by rebuildable ops alone."""
    captured = model.captured
    stack = list(captured.bwd_outputs)
    while stack:
        node = stack.pop()
        if node in saved or node.op == "placeholder":
            continue
        if not captured.is_backward(node) and not rebuildable(node):
            return False
        stack.extend(node.all_input_nodes)
    return True


@settings(max_examples=60, deadline=None)
@given(steps, st.lists(st.integers(0, 99), min_size=1, max_size=3), st.data(), st.booleans())
def test_least_bytes_of_all_sets(
    ops: list[tuple[str, int, int]], reads: list[int], data: st.DataObject, lossy: bool
) -> None:
    model = random_model(ops, reads)
    captured = model.captured
    own = [n for n in captured.savable if n.op != "placeholder" and owner(n) is n]
    size = {n: float(data.draw(st.integers(1, 1000), label=n.name)) for n in own}
    skips = _skip_sources(captured)

    def rebuildable(node: fx.Node) -> bool:
        return may_rebuild(node, model.classes, skips, lossy)

    with (  # the tie-breakers, which shift near ties on purpose
        mock.patch(f"{MODULE}._distance_to_backward", return_value=defaultdict(int)),
        mock.patch(f"{MODULE}._itemsize", return_value=0),
    ):
        saved = select_saved(captured, model.classes, size.__getitem__, lossy)
    chosen = {n for n in saved if n.op != "placeholder"}
    assert chosen <= set(own), "no view is saved"
    assert rebuilt_from(model, chosen, rebuildable)
    best = min(
        sum(size[n] for n in subset)
        for count in range(len(own) + 1)
        for subset in combinations(own, count)
        if rebuilt_from(model, set(subset), rebuildable)
    )
    assert sum(size[n] for n in chosen) == best


def test_near_ties_go_to_the_narrower_value_nearer_its_use() -> None:
    made = HandMade()
    x, t = made.placeholder("primals_1", 8, 8), made.placeholder("tangents_1", 8, 8)
    y = made.call(aten.mm.default, x, x)
    a = made.call(aten.sin.default, y)
    b = made.call(aten.cos.default, a)
    captured = made.captured([made.call(aten.mm.default, b, x)], [made.call(aten.mul.Tensor, t, b)])
    model = made.model(captured)
    saved = select_saved(captured, model.classes, lambda node: 256.0, True)
    assert by_name(saved) & {y.name, a.name, b.name} == {b.name}
    saved = select_saved(captured, model.classes, lambda node: 256.0 if node is not y else 128.0, True)
    assert by_name(saved) & {y.name, a.name, b.name} == {y.name}


class Block(nn.Module):
    """A pre-norm MLP with a skip connection."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Waves(nn.Module):
    """A skip connection in fp32 around a bf16 matmul: its sum is cheaper to rebuild than to save."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.sin().bfloat16()).float()


def rebuilt_sums(found: Stage) -> list[str]:
    """Residual sums that the backward computes again."""
    again = {n.name for n in found.untouched.backward.graph.nodes if n.op == "call_function"}
    return sorted(again & by_name(found.nodes(aten.add)))


def test_residual_stream_is_not_rebuilt_as_a_chain() -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(Waves() for _ in range(4)), nn.Linear(16, 16))
    x = torch.randn(32, 16)
    # the last sum starts no later layer: nothing is rebuilt from it
    assert len(rebuilt_sums(stage(model, x, mode="lossless"))) <= 1
    with mock.patch(f"{MODULE}._skip_sources", return_value=set()):
        chain = rebuilt_sums(stage(model, x, mode="lossless"))
    assert len(chain) >= 3, "without the rule there is a chain, so this test can fail"


def test_norm_outputs_and_activations_are_rebuilt() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Block(), Block(), nn.Linear(16, 16))
    found = stage(model, torch.randn(4, 8, 16))
    saved = found.model.storages_of(found.selection.saved)
    assert sum(saved.values()) < 0.8 * sum(found.model.baseline.values())
    again = {n.target for n in found.untouched.backward.graph.nodes}
    assert aten.erf.default in again
    assert not {n.target for n in saved} & {aten.erf.default, aten.exp.default}


class FusedProjection(nn.Module):
    """Attention whose Q, K and V are views of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(2, 16, 32))


def test_three_views_of_one_projection_are_saved_once() -> None:
    found = stage(FusedProjection(), torch.randn(2, 16, 32))
    (qkv, _) = found.nodes(aten.addmm)
    assert [n for n in found.selection.saved if owner(n) is qkv] == [qkv]
    assert len([n for n in found.captured.baseline_saved if owner(n) is qkv]) > 1, "Inductor saves its views"


def test_a_mask_is_saved_when_its_source_is_lossy_and_rebuilt_when_exact() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(64, 32)
    found = stage(model, x)
    (mask,) = found.nodes(aten.le)
    assert mask in found.selection.saved
    # the mask costs its bits beside ReLU's output; exact, it is rebuilt from that output for nothing
    found = stage(model, x, mode="lossless")
    (mask,) = found.nodes(aten.le)
    assert mask not in found.selection.saved


def test_dropout_masks_are_rebuilt_from_the_saved_seed() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32))
    saved = {
        getattr(n.target, "overloadpacket", n.target) for n in found.selection.saved if n.op != "placeholder"
    }
    assert prims.inductor_seeds in saved or prims.inductor_lookup_seed in saved
    assert not {aten.gt, prims.inductor_random} & saved
    backward = {n.target for n in found.untouched.backward.graph.nodes}
    assert prims.inductor_random.default in backward
    assert prims.inductor_seeds.default not in backward


def test_nothing_inside_a_checkpoint_is_saved() -> None:
    outer, inner, last = (nn.Linear(32, 32) for _ in range(3))

    def function(x: Tensor) -> Tensor:
        y = outer(x)
        y = checkpoint(lambda y: inner(y.sin()).cos(), y, use_reentrant=False)
        return last(y.sigmoid())

    found = stage(function, torch.randn(64, 32))
    tagged = [n for n in found.captured.savable if compat.must_recompute(n)]
    assert aten.addmm.default in {n.target for n in tagged}, "the whole region is tagged"
    assert not set(tagged) & set(found.selection.saved)
    again = [n for n in found.untouched.backward.graph.nodes if n.target is aten.addmm.default]
    assert len(again) == 1, "the region's matmul runs again; the others do not"


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpoint_policy(saved: bool) -> None:
    inner, last = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        keep = saved and op == aten.mm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def function(x: Tensor) -> Tensor:
        region = checkpoint(lambda x: inner(x.sin()).cos().sin(), x, use_reentrant=False, context_fn=contexts)
        return last(region)  # type: ignore[no-any-return]

    found = stage(function, torch.randn(64, 32, requires_grad=True))
    (mm,) = found.nodes(aten.mm)
    assert compat.must_save(mm) is saved
    assert (mm in found.selection.saved) is saved
    again = [n for n in found.untouched.backward.graph.nodes if n.name == mm.name and n.op == "call_function"]
    assert len(again) == (0 if saved else 1)


def test_values_of_an_overwritten_input_are_saved() -> None:
    """Inductor's own min-cut rebuilds them from the overwritten input, so that its gradients are wrong."""

    def function(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        scale = table * 2
        table.add_(1)
        return (x @ w) * scale

    x, w, table = torch.randn(64, 32), torch.randn(32, 32, requires_grad=True), torch.randn(64, 32)
    found = stage(function, x, w, table.clone())
    overwritten = {n.name for n in found.captured.mutated}
    assert overwritten
    assert not overwritten & {n.name for n in found.untouched.backward.graph.find_nodes(op="placeholder")}
    through_stage = w.grad
    w.grad = None
    function(x, w, table.clone()).sum().backward()
    torch.testing.assert_close(through_stage, w.grad)


def no_cut(*args: object) -> list[fx.Node]:
    raise NoCut


def test_without_a_cut_it_is_inductors_choice_with_a_note() -> None:
    found = stage(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)), torch.randn(64, 32))
    with mock.patch("ciuic_compile.planner.select_saved", no_cut):
        selection = select(found.model)
    assert set(found.model.storages_of(selection.saved)) == set(found.model.baseline)
    assert selection.notes == ("kept Inductor's own choice of saved tensors: no other cut exists",)


def test_inductors_choice_is_planned_by_storage_where_it_saves_views() -> None:
    """The fallback, on a graph where Inductor saves three views of one projection."""
    with mock.patch("ciuic_compile.planner.select_saved", no_cut):
        found = stage(FusedProjection(), torch.randn(2, 16, 32))
        (qkv, _) = found.nodes(aten.addmm)
        graphs = found.graphs()
        plan = plan_and_rewrite("graph", found.model, found.selection, found.baseline, graphs)
    assert plan.planned_saved_bytes < plan.baseline_saved_bytes
    (decision,) = [d for d in plan.decisions if d.storage.name == qkv.name]
    assert decision.codec is not None
    before = run_pair(found.graphs(), found.inputs[0])
    after = run_pair(graphs, found.inputs[0])
    assert max(differ(before[0][:1], after[0][:1])) == 0
    assert 0 < max(differ(before[1], after[1])) < 0.3


def test_a_contraction_that_must_be_rebuilt_and_is_needed_leaves_no_cut() -> None:
    made = HandMade()
    x, t = made.placeholder("primals_1", 8, 8), made.placeholder("tangents_1", 8, 8)
    y = made.call(aten.mm.default, x, x)
    captured = made.captured([y], [made.call(aten.mul.Tensor, t, y.args[0])])
    model = made.model(captured)
    assert by_name(select_saved(captured, model.classes, lambda n: 1.0, True)) == {"primals_1"}
    y.args = (x, x)
    captured.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[0].args = (t, y)
    model = made.model(captured)
    assert y in select_saved(captured, model.classes, lambda n: 1.0, True)
    x.meta["val"] = None  # neither savable ...
    y.meta["val"] = None  # ... nor, being a matmul, rebuildable
    with pytest.raises(NoCut):
        select_saved(captured, model.classes, lambda n: 1.0, True)
