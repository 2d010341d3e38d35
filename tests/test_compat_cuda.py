"""CPU tensors traced as CUDA's: which attention, which dtypes under autocast."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch._decomp.decompositions as decompositions
import torch._refs
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import decomposition
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bench.models import MODELS, WithLoss
from ciuic_compile.compat_cuda import as_cuda, autocast_ops
from ciuic_compile.devices import named
from ciuic_compile.planning import plan

aten = torch.ops.aten


def attention_of(
    dtype: torch.dtype = torch.bfloat16, size: int = 64, kv_heads: int = 4, **kwargs: Any
) -> str:
    """The autograd node of an attention over 4 heads and 128 tokens."""
    with FakeTensorMode():
        query, key, value = (
            torch.empty(2, heads, 128, size, dtype=dtype, requires_grad=True)
            for heads in (4, kv_heads, kv_heads)
        )
        kwargs = {k: v() if callable(v) else v for k, v in kwargs.items()}
        out = F.scaled_dot_product_attention(query, key, value, **kwargs)
        assert out.shape == (2, 4, 128, size) and out.dtype == dtype
        torch.autograd.grad(out.sum(), (query, key, value))
        return type(out.grad_fn).__name__


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ({"is_causal": True}, "Flash"),
        ({"dropout_p": 0.1}, "Flash"),
        ({"kv_heads": 2, "enable_gqa": True}, "Flash"),
        ({"size": 36}, "Slice"),  # of a padded one
        ({"dtype": torch.float32}, "Efficient"),
        ({"attn_mask": lambda: torch.ones(128, 128, dtype=torch.bool)}, "Efficient"),
        ({"attn_mask": lambda: torch.empty(2, 1, 128, 128, dtype=torch.bfloat16)}, "Efficient"),
        ({"size": 288}, "Efficient"),
    ],
)
def test_attention_is_cudas(given: dict[str, Any], kernel: str) -> None:
    before = attention_of(**given)
    with as_cuda():
        assert kernel in attention_of(**given)
    assert attention_of(**given) == before, "it is over after the block"


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ({"is_causal": True}, "Cudnn"),
        ({"kv_heads": 2, "enable_gqa": True}, "Cudnn"),
        ({"attn_mask": lambda: torch.ones(128, 128, dtype=torch.bool)}, "Cudnn"),
        ({"attn_mask": lambda: torch.empty(2, 1, 128, 128, dtype=torch.bfloat16)}, "Cudnn"),
        ({"dropout_p": 0.1}, "Flash"),
        ({"size": 36}, "Slice"),
        ({"size": 136}, "Flash"),
        ({"dtype": torch.float32}, "Efficient"),
    ],
)
def test_attention_is_cudnns_where_that_is_preferred(given: dict[str, Any], kernel: str) -> None:
    assert named("h100").prefers_cudnn and not named("a100").prefers_cudnn
    with as_cuda(prefers_cudnn=True):
        assert kernel in attention_of(**given)


def test_autocast_leaves_alone_what_cudas_does() -> None:
    """Concatenation casts all to the widest on a CPU; CUDA's leaves that to the operator."""

    def targets() -> set[Any]:
        with torch.autocast("cpu", torch.bfloat16):
            graph = make_fx(lambda a, b: torch.cat((a, b)))(torch.ones(2), torch.ones(2).bfloat16()).graph
        return {n.target for n in graph.nodes if n.op == "call_function"}

    before = targets()
    with as_cuda():
        assert targets() == {aten.cat.default} != before
    assert targets() == before, "it is over after the block"


def test_a_transposed_last_dimension_is_for_no_fused_kernel() -> None:
    """As a UNet's attention over pixels has it: on an H100 its probabilities are saved."""
    with FakeTensorMode(), as_cuda():
        query, key, value = (
            torch.empty(2, 4, 64, 128, dtype=torch.bfloat16, requires_grad=True).mT for _ in range(3)
        )
        assert "Scaled" not in type(F.scaled_dot_product_attention(query, key, value).grad_fn).__name__
        query, key, value = (t.contiguous() for t in (query, key, value))
        assert "Flash" in type(F.scaled_dot_product_attention(query, key, value).grad_fn).__name__


def test_attention_of_several_backends_follows_the_users_choice() -> None:
    with as_cuda(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        assert "Efficient" in attention_of()
    with as_cuda(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "Scaled" not in attention_of()


def test_the_lists_of_autocast_are_found() -> None:
    ops = autocast_ops()
    assert {"linear", "scaled_dot_product_attention"} <= set(ops["LOWER_PRECISION_FP"])
    assert {"layer_norm", "mse_loss", "pow.Tensor_Scalar", "rsqrt"} <= set(ops["FP32"])
    assert {"sum", "softmax.int", "sum.dim_IntList"} <= set(ops["FP32_SET_OPT_DTYPE"])
    assert "index_put" in ops["PROMOTE"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_is_cudas(device: str) -> None:
    """Compare with "CUDA Ops that can autocast" of torch's documentation."""
    half, single, double = (torch.ones(4, 4, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(half, (4,)).dtype == torch.bfloat16, "as on a CPU"
    with as_cuda(), torch.autocast(device, torch.bfloat16):
        assert (single @ single).dtype == F.linear(single, single).dtype == torch.bfloat16
        assert F.layer_norm(half, (4,)).dtype == half.softmax(-1).dtype == torch.float32
        assert half.sum().dtype == half.sum(0).dtype == half.rsqrt().dtype == (half**2).dtype == torch.float32
        assert half.softmax(-1, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert double.sum().dtype == double.rsqrt().dtype == torch.float64
        assert F.gelu(half).dtype == (half + half).dtype == torch.bfloat16
        assert torch.addcmul(single, half, half).dtype == torch.float32
        assert torch.addcmul(half, half, half).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(half, (4,)).dtype == torch.bfloat16, "it is over after the block"


def test_a_plan_for_a_gpu_has_the_gpus_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.norm = nn.Linear(64, 192), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                q, k, v = self.qkv(x).view(4, 128, 3, 2, 32).permute(2, 0, 3, 1, 4)
                out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
                return self.norm(out.transpose(1, 2).reshape(4, 128, 64))

    x = torch.empty(4, 128, 64)
    (cpu,) = plan(Attention(), x, torch.sum, options={"min_bytes": 0}, device="cpu")
    (gpu,) = plan(Attention(), x, torch.sum, options={"min_bytes": 0}, device="h200")
    (again,) = plan(Attention(), x, torch.sum, options={"min_bytes": 0}, device="cpu")
    assert again.decisions == cpu.decisions != gpu.decisions
    kinds = {(d.storage.shape, d.storage.dtype, d.storage.kind.value) for d in gpu.decisions}
    assert ((4, 2, 128), "float32", "statistic") in kinds, "log of the softmax's sums"
    assert ((2,), "uint64", "index") in kinds, "state of the random numbers"
    assert ((4, 2, 128, 128), "float32", "activation") not in kinds
    assert max(d.storage.nbytes for d in gpu.decisions) <= 4 * 128 * 192 * 4


def of_a_gpu(function: Any) -> Any:
    """A function of torch that believes in a GPU: its source, with another answer to its only question."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]
    changed = source.replace(".device.type", ".device.type.replace('cpu', 'cuda')")
    assert changed != source
    scope = dict(vars(sys.modules[function.__module__]))
    exec(changed, scope)
    return scope[function.__name__]


def nodes(function: Any, *args: Any) -> list[str]:
    graph = make_fx(function)(*args).graph
    return [f"{n.name} {n.target} {n.args} {n.kwargs} {n.meta.get('val')}" for n in graph.nodes]


def group_norm(op: Any) -> Any:
    return lambda x, weight, bias: op(x, weight, bias, 3, 6, 20, 2, 1e-5)


def layer_norm(op: Any) -> Any:
    return lambda x, weight, bias: op(x, [4, 5], weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("call", [group_norm, layer_norm])
def test_norms_are_decomposed_as_on_cuda(call: Any, turned: bool, affine: bool, dtype: torch.dtype) -> None:
    name, shape = f"native_{call.__name__}", (6,) if call is group_norm else (4, 5)
    op = getattr(aten, name).default
    x, weight, bias = (torch.randn(of, dtype=dtype) for of in ((3, 6, 4, 5), shape, shape))
    if turned:
        x = torch.randn(3, 6, 5, 4, dtype=dtype).mT
    arguments = (x, weight, bias) if affine else (x, None, None)
    before = decomposition.select_decomp_table()[op]
    with as_cuda():
        ours = call(decomposition.select_decomp_table()[op])
        found = nodes(ours, *arguments)
    assert found == nodes(call(of_a_gpu(getattr(torch._refs, name))), *arguments)
    assert decomposition.select_decomp_table()[op] is before, "it is over after the block"
    for got, want in zip(ours(*arguments), call(op)(x.contiguous(), *arguments[1:]), strict=True):
        torch.testing.assert_close(got.to(want.dtype), want)  # a CPU's statistics have the input's dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (3, 6)])
@pytest.mark.parametrize("kept", [True, False])
def test_batch_norm_is_decomposed_as_on_cuda(
    kept: bool, shape: tuple[int, ...], functional: bool, training: bool, dtype: torch.dtype
) -> None:
    theirs = decompositions.native_batch_norm_helper
    flags = (training, 0.1, 1e-5, functional)
    weight, bias, mean, var = (torch.rand(6) + 0.5 for _ in range(4))
    if not (kept or training):
        pytest.skip("evaluation needs running statistics")
    statistics = (mean, var) if kept else (None, None)
    arguments = (torch.randn(shape, dtype=dtype), weight, bias, *statistics)
    with as_cuda():
        ours = decompositions.native_batch_norm_helper
        found = nodes(lambda *a: ours(*a, *flags), *arguments)
    assert ours is not theirs is decompositions.native_batch_norm_helper
    assert found == nodes(lambda *a: of_a_gpu(theirs)(*a, *flags), *arguments)
    torch.testing.assert_close(ours(*arguments, *flags)[0], theirs(*arguments, *flags)[0])


@pytest.mark.parametrize("biased", [True, False])
def test_a_convolutions_bias_has_a_sum_as_on_cuda(biased: bool) -> None:
    op = aten.convolution_backward.default
    sizes = ([6], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, biased])
    arguments = (torch.randn(2, 6, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(6, 3, 3, 3))
    theirs = decomposition.select_decomp_table()[op]
    with as_cuda():
        ours = decomposition.select_decomp_table()[op]
    if not biased:
        assert ours(*arguments, *sizes) is NotImplemented
        return
    found = nodes(lambda *a: ours(*a, *sizes), *arguments)
    assert found == nodes(lambda *a: of_a_gpu(theirs)(*a, *sizes), *arguments)
    for got, want in zip(ours(*arguments, *sizes), op(*arguments, *sizes), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_joint_graph_is_that_of_a_gpu(name: str) -> None:
    def joint(device: str) -> list[str]:
        found: list[str] = []

        def partition(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            for node in gm.graph.nodes:
                value = node.meta.get("val")
                tensor = [value.shape, value.dtype, value.stride()] if isinstance(value, Tensor) else []
                found.append(f"{node.name} {node.target} {node.args} {tensor}".replace("cuda:0", "cpu"))
            raise Found

        backend = aot_autograd(fw_compiler=lambda gm, _: gm, partition_fn=partition, decompositions=table)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, batches, loss_fn = MODELS[name]("tiny")
        step = WithLoss(model, loss_fn).to(device)
        with (
            torch.autocast("cuda", torch.bfloat16),
            pytest.raises(Exception, match="Found"),
        ):
            torch.compile(step, backend=backend)(*batches(0, torch.device(device)))
        return found

    class Found(Exception):
        pass

    table = decomposition.select_decomp_table()
    with as_cuda(torch.cuda.get_device_capability() in ((9, 0), (10, 0))):
        expected = joint("cpu")
    assert joint("cuda") == expected and len(expected) > 50
