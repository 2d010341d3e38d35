"""The numerics rules of docs/numerics.md, each on the smallest model that shows it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ciuic_compile.capture import owner
from ciuic_compile.classify import MIN_BITS, REASONS, is_attention, is_contraction, is_dense, is_reduction
from ciuic_compile.types import TensorClass
from tests.stages import HandMade, Stage, by_name, stage

aten, prims = torch.ops.aten, torch.ops.prims
K = TensorClass
EXACT = {K.INPUT, K.STATISTIC, K.INDEX, K.LOSS, K.SOFTMAX_INPUT}


def kinds(found: Stage, nodes: Iterable[fx.Node]) -> set[TensorClass]:
    """Classes of these nodes; there must be some."""
    nodes = list(nodes)
    assert nodes
    return {found.model.classes.kind(n) for n in nodes}


def never_lossy(found: Stage, nodes: Iterable[fx.Node]) -> None:
    """No node, nor the storage behind it, may have a lossy codec; there must be some nodes."""
    nodes = list(nodes)
    assert nodes
    for node in nodes:
        for each in (node, owner(node)):
            lossy = [c.name for c in found.model.codecs(each) if c.relative_mse > 0]
            assert not lossy, (each, lossy)
            assert found.model.kept_because(each) or found.model.codecs(each), each


def may_be_lossy(found: Stage, node: fx.Node) -> bool:
    """Whether some lossy codec is on offer."""
    return any(c.relative_mse > 0 for c in found.model.codecs(node))


class Attention(nn.Module):
    """Fused attention with separate Q, K, V projections and a projection of its output."""

    def __init__(self, dim: int = 32, heads: int = 2, fused: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.heads, self.fused = heads, fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(torch.tanh(q @ k.transpose(-2, -1)), dim=-1) @ v  # no pattern of Inductor
        return self.o(y.transpose(1, 2).reshape(b, t, d))


@pytest.fixture(scope="module")
def attention() -> Stage:
    """Norm, fused attention and an MLP, in fp32."""
    model = nn.Sequential(nn.LayerNorm(32), Attention(), nn.LayerNorm(32), nn.Linear(32, 32))
    return stage(model, torch.randn(2, 16, 32, requires_grad=True))


def test_logsumexp_of_fused_attention_is_a_statistic(attention: Stage) -> None:
    (call,) = [n for n in attention.captured.savable if is_attention(n)]
    first, *others = sorted(call.users, key=lambda n: n.args[1])
    assert others, "the call has a second output, the logsumexp"
    assert kinds(attention, others) == {K.STATISTIC}
    never_lossy(attention, others)
    assert kinds(attention, [first]) == {K.ATTENTION_OUT}
    assert may_be_lossy(attention, first)


def test_q_and_k_get_eight_bits_and_v_four(attention: Stage) -> None:
    (call,) = [n for n in attention.captured.savable if is_attention(n)]
    q, k, v = (owner(a) for a in call.args[:3])  # type: ignore[arg-type]
    assert len({q, k, v}) == 3 and all(is_contraction(n) for n in (q, k, v))
    assert kinds(attention, [q, k]) == {K.ATTENTION_QK}
    assert kinds(attention, [v]) == {K.ATTENTION_V}
    for node in (q, k):
        assert {c.bits for c in attention.model.codecs(node)} == {8}
        assert attention.model.storage(node).min_bits == MIN_BITS[K.ATTENTION_QK] == 8
    assert {c.bits for c in attention.model.codecs(v)} == {8, 6, 5, 4}
    assert attention.model.storage(v).min_bits == 4


def test_q_and_k_stay_at_eight_bits_through_rotation_and_casts() -> None:
    class Rotated(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, t, d = x.shape
            q, k, v = (p(x).view(b, t, 2, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
            half = torch.cos(torch.arange(t, device=x.device)[:, None] / 7)
            q, k = (torch.cat([z[..., :8] * half, z[..., 8:] * half], -1).bfloat16() for z in (q, k))
            return self.o(
                F.scaled_dot_product_attention(q, k, v.bfloat16()).float().transpose(1, 2).reshape(b, t, d)
            )

    found = stage(Rotated(), torch.randn(2, 16, 32, requires_grad=True))
    (call,) = [n for n in found.captured.savable if is_attention(n)]
    mms = [n for n in found.nodes(aten.mm) if found.captured.order[n] < found.captured.order[call]]
    assert [found.model.classes.kind(n) for n in mms] == [K.ATTENTION_QK, K.ATTENTION_QK, K.ATTENTION_V]
    assert kinds(found, found.nodes(aten.cat)) == {K.ATTENTION_QK}


def test_a_projection_shared_by_q_k_and_v_counts_as_q(attention: Stage) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v)

    found = stage(nn.Sequential(nn.LayerNorm(32), Fused()), torch.randn(2, 16, 32))
    (call,) = [n for n in found.captured.savable if is_attention(n)]
    bases = {owner(a) for a in call.args[:3]}  # type: ignore[arg-type]
    assert by_name(list(bases)) == by_name(found.nodes(aten.addmm))
    assert {c.bits for c in found.model.codecs(*bases)} == {8}


def test_unfused_softmax_inputs_are_never_lossy_but_its_operands_may_be() -> None:
    found = stage(Attention(fused=False), torch.randn(2, 16, 32, requires_grad=True))
    scores, _ = found.nodes(aten.bmm)
    (exp,) = found.nodes(aten.exp)
    assert kinds(found, [scores, *exp.all_input_nodes]) == {K.SOFTMAX_INPUT}
    never_lossy(found, [scores, *exp.all_input_nodes])
    assert found.model.kept_because(scores) == REASONS[K.SOFTMAX_INPUT]
    q, k, _v = found.nodes(aten.mm)[:3]
    assert may_be_lossy(found, q) and may_be_lossy(found, k)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(32), nn.RMSNorm(32), nn.GroupNorm(4, 16), nn.BatchNorm1d(16)],
    ids=lambda m: type(m).__name__,
)
def test_statistics_of_norms_are_never_lossy_but_what_is_normed_may_be(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(32, 32), norm, nn.Linear(32, 32))
    found = stage(model, torch.randn(8, 16, 32))
    reductions = [n for n in found.captured.savable if is_reduction(n)]
    parts = [u for n in reductions for u in n.users if u in set(found.captured.savable)]
    never_lossy(found, reductions)
    rsqrt = found.nodes(aten.rsqrt)
    assert kinds(found, rsqrt) == {K.STATISTIC}, "an elementwise function of a statistic is one"
    never_lossy(found, rsqrt)
    assert parts
    (first, _) = [n for n in found.captured.savable if is_contraction(n)]
    assert may_be_lossy(found, first), "the rule must not keep everything"


def test_running_statistics_are_never_lossy() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32))
    copies = found.captured.graph.find_nodes(op="call_function", target=aten.copy_.default)
    assert len(copies) == 3, "mean, variance and the count of batches are written back"
    assert {n.args[0] for n in copies} == found.captured.mutated
    updated = [n.all_input_nodes[1] for n in copies]
    assert kinds(found, updated) == {K.STATISTIC, K.INDEX}
    never_lossy(found, [*copies, *updated])


def test_logits_into_the_loss_are_exact_and_say_why() -> None:
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 48)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(F.gelu(self.body(x))).float(), y)

    found = stage(LM().bfloat16(), torch.randn(64, 32).bfloat16(), torch.randint(48, (64,)))
    body, head = found.nodes(aten.addmm)
    assert may_be_lossy(found, body)
    cast = [u for u in head.users if u.target is prims.convert_element_type.default]
    assert kinds(found, [head, *cast]) == {K.LOSS}
    never_lossy(found, [head, *cast, *found.nodes(aten.exp), *found.nodes(aten.log), *found.nodes(aten.sub)])
    assert found.model.kept_because(head) == REASONS[K.LOSS]
    saved = found.model.storages_of(found.selection.saved)
    assert all(
        found.model.kept_because(n) for n in saved if found.captured.order[n] >= found.captured.order[head]
    )


def test_indices_and_seeds_are_exact() -> None:
    def function(x: Tensor, w: Tensor, i: Tensor) -> Tensor:
        z = x @ w
        values, where = z.topk(4)
        return (z.gather(1, where) * values + (i + where)).tanh() @ w[:4]

    found = stage(function, torch.randn(32, 32), torch.randn(32, 32, requires_grad=True), torch.arange(4))
    whole = [
        n
        for n in found.captured.savable
        if isinstance(n.meta["val"], Tensor) and not n.meta["val"].is_floating_point()
    ]
    kind = {found.model.classes.kind(n) for n in whole if owner(n).op != "placeholder"}
    assert kind == {K.INDEX}
    never_lossy(found, whole)


def test_masks_are_packed_to_bits_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32))
    (mask,) = [n for n in found.captured.savable if n.meta["val"].dtype == torch.bool]
    assert found.model.classes.kind(mask) is K.INDEX
    assert [c.name for c in found.model.codecs(mask)] == ["bitmask"]
    assert found.model.kept_because(mask) is None


def test_bitmask_is_the_only_codec_of_lossless_mode() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32), mode="lossless")
    offered = {c.name for n in found.captured.savable for c in found.model.codecs(n)}
    assert offered == {"bitmask"}
    (first, _) = found.nodes(aten.addmm)
    assert found.model.kept_because(first) is not None


def test_parameters_their_casts_and_inputs_are_exact() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)  # type: ignore[no-any-return]

    found = stage(function, torch.randn(64, 32))
    parameters = found.captured.parameters
    assert len(parameters) == 4
    never_lossy(found, found.captured.graph.find_nodes(op="placeholder")[:5])
    casts = [n for n in found.nodes(prims.convert_element_type) if n.all_input_nodes[0] in parameters]
    assert len(casts) >= 3
    never_lossy(found, casts)
    assert "parameters" in (found.model.kept_because(casts[0]) or "")
    (x,) = set(found.captured.graph.find_nodes(op="placeholder")) - parameters - {found.node("tangents_1")}
    (cast_x,) = [n for n in found.nodes(prims.convert_element_type) if n.all_input_nodes[0] is x]
    never_lossy(found, [cast_x])
    assert "inputs" in (found.model.kept_because(cast_x) or "")


def test_user_outputs_are_exact_also_through_views() -> None:
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = first(x)
        return second(hidden.tanh()), hidden.view(16, 4, 32)[1:]

    found = stage(function, torch.randn(64, 32))
    hidden, _ = found.nodes(aten.addmm)
    assert hidden not in found.captured.fwd_outputs and hidden in found.model.classes.pinned
    assert found.model.classes.kind(hidden) is K.INPUT
    never_lossy(found, [hidden, *found.captured.fwd_outputs])


def test_values_rebuilt_from_inputs_and_seeds_are_exact() -> None:
    linear = nn.Linear(32, 32)

    def function(x: Tensor) -> Tensor:
        hidden = F.dropout(x * 2, 0.5)
        return F.dropout(linear(hidden), 0.5).tanh() @ linear.weight

    found = stage(function, torch.randn(64, 32))
    (addmm,) = found.nodes(aten.addmm)
    exact = found.model.classes.exact
    hidden = addmm.args[1]
    random = found.nodes(prims.inductor_random)
    assert len(random) == 2 and {*random, hidden} <= exact
    never_lossy(found, [*random, hidden])  # type: ignore[list-item]
    assert found.model.kept_because(hidden) == "rebuilt exactly from the inputs where it is needed"  # type: ignore[arg-type]
    masked = [n for n in addmm.users if n in found.captured.savable]
    assert masked and not {addmm, *masked} & exact
    assert may_be_lossy(found, addmm)


def test_values_of_an_overwritten_input_are_not_rebuilt_from_it() -> None:
    def function(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        scale = table * 2
        table.add_(1)
        return (x @ w).sin() * scale

    found = stage(function, torch.randn(64, 32), torch.randn(32, 32, requires_grad=True), torch.randn(64, 32))
    (scale, _) = found.nodes(aten.mul)
    assert {scale.all_input_nodes[0]} == found.captured.mutated
    assert scale not in found.model.classes.exact
    assert found.captured.mutated.isdisjoint(found.model.classes.exact)


def test_linear_inputs_are_told_from_activations() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32))
    first, second = found.nodes(aten.addmm)
    assert found.model.classes.kind(second.args[1]) is K.LINEAR_INPUT  # type: ignore[arg-type]
    assert found.model.classes.kind(first) is K.ACTIVATION


@pytest.mark.parametrize(
    ("options", "lossy"),
    [
        ({}, [True, True]),
        ({"deny": "0"}, [False, True]),
        ({"deny": "aten.addmm"}, [False, False]),
        ({"allow": "0"}, [True, False]),
        ({"allow": ["0", "[12]"], "deny": "2"}, [True, False]),
        ({"allow": "nothing"}, [False, False]),
    ],
)
def test_allow_and_deny(options: dict[str, object], lossy: list[bool]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32), **options)
    linears = found.nodes(aten.addmm)[:2]
    assert [may_be_lossy(found, n) for n in linears] == lossy
    for node, allowed in zip(linears, lossy, strict=True):
        reason = found.model.kept_because(node)
        assert (reason is None) == allowed
        assert allowed or "deny" in str(reason) or "allow" in str(reason)


def test_too_small_says_so() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32), min_bytes=64 * 32 * 4 + 1)
    assert found.model.kept_because(found.nodes(aten.addmm)[0]) == "smaller than min_bytes (8193 B)"
    found = stage(model, torch.randn(64, 32), min_bytes=64 * 32 * 4)
    assert found.model.kept_because(found.nodes(aten.addmm)[0]) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8, dtype=dtype) for n in ("primals_1", "primals_2", "tangents_1"))
    y = made.call(aten.mm.default, x, w)
    z = made.call(aten.mm.default, made.call(aten.tanh.default, y), w)
    g = made.call(aten.mul.Tensor, t, y)
    model = made.model(made.captured([z], [g, None]))
    assert model.codecs(y) == []
    assert model.kept_because(y)


def test_a_value_with_gaps_in_its_storage_is_kept() -> None:
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8) for n in ("primals_1", "primals_2", "tangents_1"))
    y = made.call(aten.mm.default, x, w)
    z = made.call(aten.mm.default, made.call(aten.tanh.default, y), w)
    g = made.call(aten.mul.Tensor, t, y)
    model = made.model(made.captured([z], [g, None]))
    assert model.kept_because(y) is None
    with made.mode:
        y.meta["val"] = torch.empty_strided((8, 8), (16, 1))
    gaps = made.model(model.captured)
    assert gaps.kept_because(y) == "its elements do not fill their storage"


@pytest.mark.parametrize(
    ("value", "dense"),
    [
        (torch.empty(2, 3, 4), True),
        (torch.empty(2, 3, 4).permute(2, 0, 1), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(2, 1, 4).expand(2, 3, 4), False),
        (torch.empty(4, 8)[:, ::2], False),
        (torch.empty(4, 8)[:, :4], False),
        (torch.empty_strided((4, 1, 8), (8, 999, 1)), True),
        (torch.empty(()), True),
        (torch.empty(0, 4), True),
    ],
)
def test_dense(value: Tensor, dense: bool) -> None:
    assert is_dense(value) is dense


def test_elementwise_max_is_no_reduction() -> None:
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8) for n in ("primals_1", "primals_2", "tangents_1"))
    a = made.call(aten.maximum.default, x, w)
    b = made.call(aten.max.other, x, w)
    c = made.call(aten.max.dim, x, 1)
    made.captured([a], [t, None])
    assert [is_reduction(n) for n in (a, b, c)] == [False, False, True]


def conditioned(*ops: object) -> dict[str, TensorClass]:
    """Classes of ``y = x @ w`` and ``z = op(y) @ w``, several ops one after the other."""
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8) for n in ("primals_1", "primals_2", "tangents_1"))
    y = value = made.call(aten.mm.default, x, w, name="y")
    for op in ops:
        call, *rest = op if isinstance(op, tuple) else (op,)
        value = made.call(call, value, *rest)
    z = made.call(aten.mm.default, value, w, name="z")
    out = made.call(aten.mm.default, made.call(aten.tanh.default, z), w)
    gradient = made.call(aten.mul.Tensor, t, made.call(aten.mul.Tensor, y, z))
    model = made.model(made.captured([out], [gradient, None]))
    return {n.name: model.classes.kind(n) for n in (y, z)}


@pytest.mark.parametrize(
    "ops",
    [
        [aten.log.default],
        [aten.abs.default, aten.view.default, aten.log.default],
        [(aten.pow.Tensor_Scalar, -1)],
        [(aten.pow.Tensor_Scalar, 0.5)],
        [(prims.convert_element_type.default, torch.bfloat16), aten.rsqrt.default],
        [aten.sign.default],
        [(aten.mul.Tensor, 30.0), aten.sin.default],
        [aten.sinh.default],
    ],
)
def test_what_reaches_a_singular_op_is_exact_up_to_the_last_matmul(ops: list[object]) -> None:
    ops = [(op, [8, 8]) if op is aten.view.default else op for op in ops]
    back = [(prims.convert_element_type.default, torch.float32)]
    assert conditioned(*ops, *back) == {"y": K.SINGULAR, "z": K.ACTIVATION}


@pytest.mark.parametrize(
    "ops",
    [
        [(aten.pow.Tensor_Scalar, 3)],
        [(aten.div.Tensor, 2.0)],
        [aten.exp.default, (aten.add.Tensor, 1), aten.log.default],
        [aten.exp.default, aten.log1p.default],
        [aten.neg.default, aten.exp.default, (aten.add.Tensor, 1), aten.reciprocal.default],
        [aten.sigmoid.default],
    ],
)
def test_what_reaches_a_tame_op_may_be_lossy(ops: list[object]) -> None:
    assert conditioned(*ops) == {"y": K.ACTIVATION, "z": K.ACTIVATION}


def test_what_is_multiplied_with_a_pole_is_exact_and_what_is_divided_by_a_statistic_is_not() -> None:
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8) for n in ("primals_1", "primals_2", "tangents_1"))
    a, b, c = (made.call(aten.mm.default, x, w) for _ in range(3))
    huge = made.call(aten.mul.Tensor, made.call(aten.neg.default, made.call(aten.reciprocal.default, b)), a)
    scale = made.call(aten.rsqrt.default, made.call(aten.mean.dim, c, [1], True))
    normed = made.call(aten.mul.Tensor, c, scale)
    z = made.call(aten.mm.default, made.call(aten.add.Tensor, huge, normed), w)
    gradient = made.call(aten.mul.Tensor, t, made.call(aten.mul.Tensor, a, made.call(aten.mul.Tensor, b, c)))
    model = made.model(made.captured([z], [gradient, None]))
    assert [model.classes.kind(n) for n in (a, b, c)] == [K.SINGULAR, K.SINGULAR, K.ACTIVATION]
    assert model.kept_because(a) == REASONS[K.SINGULAR]


def test_log_probabilities_are_softmax_inputs() -> None:
    """The backward of log-softmax exponentiates its output."""
    model = nn.Sequential(nn.Linear(32, 32), nn.LogSoftmax(-1), nn.Linear(32, 32))
    found = stage(model, torch.randn(64, 32))
    assert kinds(found, found.nodes(aten.sub)) == {K.SOFTMAX_INPUT}
    never_lossy(found, found.nodes(aten.sub))


@pytest.mark.parametrize(
    ("norm", "shape", "bits"),
    [
        (nn.BatchNorm2d(16), (4, 16, 8, 8), 4),  # 64 elements of one channel side by side: one group
        (nn.BatchNorm2d(16), (4, 16, 4, 4), 8),  # four channels a group
        (nn.LayerNorm(128), (4, 16, 128), 4),
        (nn.LayerNorm(16), (4, 128, 16), 8),  # four rows a group
        (nn.GroupNorm(2, 16), (4, 16, 8, 8), 4),
        (nn.RMSNorm(64), (4, 16, 64), 4),
    ],
)
def test_a_group_over_several_normalized_rows_gets_eight_bits(
    norm: nn.Module, shape: tuple[int, ...], bits: int
) -> None:
    linear, out = nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], 8)
    found = stage(nn.Sequential(linear, norm, out), torch.randn(shape), mode="6:1")
    normed = found.nodes(aten.addmm)[0]
    assert min(c.bits for c in found.model.codecs(normed)) == bits
    assert found.model.storage(normed).min_bits == bits


def test_channels_last_batch_norm_mixes_channels_in_a_group() -> None:
    layers = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
    for memory, bits in ((torch.contiguous_format, 4), (torch.channels_last, 8)):
        x = torch.randn(2, 16, 16, 16).to(memory_format=memory)
        found = stage(layers.to(memory_format=memory), x, mode="6:1")
        first, _ = found.nodes(aten.convolution)
        assert min(c.bits for c in found.model.codecs(first)) == bits
