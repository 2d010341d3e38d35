"""Graphs for the passes: one small model that has every kind of saved tensor, static and symbolic."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from ciuic_compile import markers
from ciuic_compile.passes import Graphs, Pass, run_pipeline
from tests.stages import Stage, stage

CODECS = ("int8_group64", "int4_group64_affine", "int4_group64")


class Mixed(nn.Module):
    """A convolution (channels last), ReLU (a mask), a skip connection, GELU, and a matmul on a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv(image.to(memory_format=torch.channels_last)))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        x = x + self.down(torch.sin(self.up(x)))
        return self.head(x)


@functools.cache
def mixed(dynamic: bool) -> Stage:
    """The model, staged once a session."""
    torch.manual_seed(0)
    image = torch.randn(3, 3, 5, 7)
    if dynamic:
        torch._dynamo.mark_dynamic(image, 0)
        torch._dynamo.mark_dynamic(image, 2)
    return stage(Mixed(), image)


def codecs_for(found: Stage) -> dict[str, str]:
    """A codec for every saved tensor that may have one, all kinds in turn."""
    chosen = {}
    for index, node in enumerate(found.model.storages_of(found.selection.saved)):
        offered = [c.name for c in found.model.codecs(node)]
        if offered:
            chosen[node.name] = next((c for c in CODECS[index % 3 :] if c in offered), offered[0])
    assert len(chosen) >= 4
    assert {"bitmask", *CODECS} <= set(chosen.values())
    return chosen


def find(graph: fx.Graph, marker: object) -> list[fx.Node]:
    """Calls of a marker."""
    return [n for n in graph.nodes if markers.is_marker(n, marker)]


def position(graph: fx.Graph) -> dict[fx.Node, int]:
    """Place of each node."""
    return {n: i for i, n in enumerate(graph.nodes)}


def saved_names(graphs: Graphs) -> list[str]:
    """What the forward returns beside the user's outputs."""
    return [getattr(n, "name", "") for n in graphs.forward_outputs()[graphs.num_fwd_outputs :]]


def received_names(graphs: Graphs) -> list[str]:
    """The backward's inputs."""
    return [n.name for n in graphs.backward.graph.find_nodes(op="placeholder")]


def rewrite(graphs: Graphs, passes: Sequence[Pass], observe: Any = None) -> tuple[str, ...]:
    """Run the pipeline as AOTAutograd runs a partitioner: with the Python dispatcher on."""
    with enable_python_dispatcher():
        return run_pipeline(graphs, passes, observe)
