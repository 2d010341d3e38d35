"""In which order the dimensions of what is encoded are stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ciuic_compile import markers
from ciuic_compile.capture import tensor
from ciuic_compile.passes import InsertCodecs, PassResult
from tests.stages import Stage, differ, run_pair, stage


class Masked(nn.Module):
    """A mask of an image between two convolutions, and one of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.second(F.leaky_relu(self.first(image)))
        return self.head(F.leaky_relu(self.head(x.mean((2, 3)))))


def dims_and_orders(found: Stage, dtype: torch.dtype, codec: str) -> dict[int, list[int]]:
    """How the saved tensors of a type are encoded, by their number of dimensions; backwards agree."""
    saved = [n for n in found.untouched.forward_outputs() if isinstance(n, fx.Node)]
    of_type = [n for n in saved if (value := tensor(n)) is not None and value.dtype == dtype]
    codecs = {n.name: codec for n in of_type if n.op != "placeholder"}
    graphs = found.graphs()
    assert InsertCodecs(codecs).run(graphs) == PassResult(True)
    calls = [n for n in graphs.forward.graph.nodes if markers.is_marker(n, markers.encode)]
    ours, theirs = (run_pair(g, found.inputs[0])[1] for g in (graphs, found.graphs()))
    assert max(differ(theirs, ours)) < (0.03 if codec != "bitmask" else 1e-9)
    return {n.args[0].meta["val"].dim(): n.args[2] for n in calls}


def test_masks_of_images_are_packed_as_inductor_lays_them_out() -> None:
    torch.manual_seed(0)
    found = stage(Masked(), torch.randn(2, 3, 9, 9))
    assert dims_and_orders(found, torch.bool, "bitmask") == {2: [0, 1], 4: [0, 2, 3, 1]}


def test_other_values_keep_the_graphs_order() -> None:
    torch.manual_seed(0)
    found = stage(Masked(), torch.randn(2, 3, 9, 9))
    assert dims_and_orders(found, torch.float32, "int8_group64")[4] == [0, 1, 2, 3]
