"""The gradient of an embedding, decomposed or by torch's own kernel: the same sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ciuic_compile.passes import NativeEmbedding
from tests.stages import Stage, differ, run_pair, stage

ANY = NativeEmbedding(min_bytes=0, devices=("cpu",))


def staged(dtype: torch.dtype = torch.bfloat16, **kwargs: int) -> Stage:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16, **kwargs), nn.Linear(16, 8)).to(dtype)
    return stage(model, torch.randint(40, (3, 30)))


@pytest.mark.parametrize("kwargs", [{}, {"padding_idx": 3}], ids=["plain", "padding"])
def test_the_gradient_is_the_same_without_the_accumulator(kwargs: dict[str, int]) -> None:
    found = staged(**kwargs)
    before, graphs = found.graphs(), found.graphs()
    result = ANY.run(graphs)
    assert result.changed and "without a float32 accumulator" in result.notes[0]
    graphs.backward.graph.lint()
    graphs.backward.recompile()
    values = [n.meta.get("val") for n in graphs.backward.graph.nodes]
    widest = [v.dtype for v in values if isinstance(v, torch.Tensor) and tuple(v.shape) == (40, 16)]
    assert widest and set(widest) == {torch.bfloat16}
    (_, theirs), (_, ours) = (run_pair(g, found.inputs[0]) for g in (before, graphs))
    assert max(differ(theirs, ours)) < 2**-8
    assert not ANY.run(graphs).changed


def test_what_stays_as_it_is() -> None:
    for found, settings in (
        (staged(torch.float32), ANY),  # its accumulator is the gradient itself
        (staged(), NativeEmbedding(devices=("cpu",))),  # small
        (staged(), NativeEmbedding(min_bytes=0)),  # on the CPU
    ):
        graphs = found.graphs()
        text = str(graphs.backward.graph)
        assert not settings.run(graphs).changed
        assert str(graphs.backward.graph) == text


def test_masked_gradients_do_not_count() -> None:
    """Not even where they are NaN: they are left out, not multiplied by zero."""
    found = staged(padding_idx=3)
    graphs = found.graphs()
    ANY.run(graphs)
    (put,) = [n for n in graphs.backward.graph.nodes if "embedding_gradient" in str(n.target)]
    selects = [n for n in graphs.backward.graph.nodes if n.target is torch.ops.aten.where.self]
    assert put.args[0].all_input_nodes[0] in selects
