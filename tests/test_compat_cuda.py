"""CPU tensors traced as CUDA's: which attention, which dtypes under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import decomposition
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ciuic_compile.compat_cuda import as_cuda, autocast_ops
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_decomposed_as_on_cuda(dtype: torch.dtype, affine: bool) -> None:
    """On a CPU weights and statistics are folded, by ``as_strided``; the values are the same."""

    def traced() -> tuple[set[Any], Any]:
        table = decomposition.select_decomp_table()
        graph = make_fx(norm, decomposition_table={op: table[op] for op in [aten.native_group_norm.default]})(
            x
        )
        return {n.target for n in graph.graph.nodes}, graph

    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6, affine=affine).to(dtype)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 4, 5, dtype=dtype)
    targets, _ = traced()
    assert (aten.as_strided.default in targets) is affine
    with as_cuda():
        targets, graph = traced()
    assert aten.native_group_norm.default not in targets and aten.as_strided.default not in targets
    torch.testing.assert_close(graph(x), norm(x))
    assert (aten.as_strided.default in traced()[0]) is affine, "it is over after the block"
