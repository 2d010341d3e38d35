"""The first convolution's backward gets its image in the layout that the others have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ciuic_compile import compat
from ciuic_compile.passes import ChannelsLast, Graphs, PassResult, verify
from tests.stages import SMALL, differ, run_pair, stage

aten = torch.ops.aten
backward_of_convolution = aten.convolution_backward.default


class Net(nn.Module):
    """Two convolutions; the first reads the image, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(F.relu(self.first(image * 0.5))).mean((2, 3))


def images(graphs: Graphs) -> dict[str, Tensor]:
    """What each convolution's backward reads, by the name of its weight."""
    calls = graphs.backward.graph.find_nodes(op="call_function", target=backward_of_convolution)
    return {str(n.args[2]): n.args[1].meta["val"] for n in calls}


def test_the_image_of_plain_operands_is_laid_out() -> None:
    torch.manual_seed(0)
    found = stage(Net(), torch.randn(2, 3, 6, 6))
    before, graphs = found.graphs(), found.graphs()
    (name,) = (n for n, image in images(before).items() if image.shape[1] == 3)
    assert not images(before)[name].is_contiguous(memory_format=torch.channels_last)
    assert ChannelsLast().run(graphs).changed
    verify(graphs)
    assert images(graphs)[name].is_contiguous(memory_format=torch.channels_last)
    ours, theirs = (run_pair(g, found.inputs[0]) for g in (graphs, before))
    assert max(differ(theirs[0], ours[0])) == 0
    assert max(differ(theirs[1], ours[1])) < 1e-6  # another kernel sums in another order
    assert not ChannelsLast().run(graphs).changed


def test_nothing_is_laid_out_where_inductor_runs_convolutions_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = stage(Net(), torch.randn(2, 3, 6, 6)).graphs()
    monkeypatch.setattr(compat, "prefers_channels_last", lambda graph, kind: False)
    assert not ChannelsLast().run(graphs).changed


def test_nor_an_image_that_lies_so_already() -> None:
    image = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert not ChannelsLast().run(stage(Net(), image).graphs()).changed


class Images(TorchDispatchMode):
    """Notes whether the images of convolutions' backwards have their channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is backward_of_convolution and args[1].shape[1] == 3:
            self.seen.append(args[1].is_contiguous(memory_format=torch.channels_last))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("without", [False, True], ids=["with", "without"])
def test_the_generated_code_hands_torch_such_an_image(without: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without:  # or there would be no need of it
        monkeypatch.setattr(ChannelsLast, "run", lambda self, graphs: PassResult(False))
    compiled = torch.compile(Net(), backend="ciuic", options={"mode": "lossless", **SMALL})
    loss = compiled(torch.randn(2, 3, 6, 6)).sum()
    with Images() as images:
        loss.backward()
    assert images.seen == [not without]


class Last(nn.Module):
    """A mask, and a value that the user gets, behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.second(F.leaky_relu(self.first(image))))
        return x.mean((2, 3)), torch.tanh(x)


def masks(graphs: Graphs) -> dict[str, bool]:
    """Whether saved masks have their channels last, by name, on either side."""
    outputs = [n for n in graphs.forward_outputs()[graphs.num_fwd_outputs :] if isinstance(n, fx.Node)]
    sent = {n.name: n.meta["val"] for n in outputs}
    received = {n.name: n.meta["val"] for n in graphs.backward.graph.find_nodes(op="placeholder")}
    found = {}
    for name, value in sent.items():
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            found[name] = value.is_contiguous(memory_format=torch.channels_last)
            assert received[name].stride() == value.stride()
    return found


def test_a_mask_behind_the_last_convolution_is_saved_laid_out() -> None:
    torch.manual_seed(0)
    found = stage(Last(), torch.randn(2, 3, 9, 9))
    before, graphs = found.graphs(), found.graphs()
    assert list(masks(before).values()) == [False, False]
    assert ChannelsLast().run(graphs).changed
    verify(graphs)
    behind = [n for n, last in masks(graphs).items() if last]
    assert masks(graphs).keys() == masks(before).keys() and len(behind) == 1  # Inductor lays out the other
    ours, theirs = (run_pair(g, found.inputs[0]) for g in (graphs, before))
    assert max(differ(theirs[0], ours[0])) == max(differ(theirs[1], ours[1])) == 0
    assert not ChannelsLast().run(graphs).changed


class Strided(torch.autograd.Function):
    """Its backward reads a mask as it lies in memory, by ``as_strided``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        flat = mask.detach().as_strided((mask.numel(),), (1,))
        return grad * (flat * torch.linspace(0, 1, flat.numel())).view(grad.shape)


class ReadAsItLies(Last):
    """A mask behind the last convolution whose strides are part of the gradient."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        return Strided.apply(self.second(self.first(image))).mean((2, 3))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
def test_a_mask_that_is_read_as_it_lies_keeps_its_strides(mode: str) -> None:
    torch.manual_seed(0)
    model, image = ReadAsItLies(), torch.randn(2, 3, 9, 9)
    gradients = []
    for each in (model, torch.compile(model, backend="ciuic", options={"mode": mode, **SMALL})):
        model.zero_grad()
        each(image).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert max(differ(*gradients)) < (1e-5 if mode == "lossless" else 0.05)


def test_what_the_user_gets_keeps_its_strides() -> None:
    torch.manual_seed(0)
    model, image = Last(), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(model, backend="ciuic", options={"mode": "lossless", **SMALL})
    expected, got = model(image), compiled(image)
    assert [g.stride() for g in got] == [e.stride() for e in expected]
    gradients = []
    for pair in (expected, got):
        model.zero_grad()
        sum(each.square().sum() for each in pair).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert max(differ(*gradients)) < 1e-5
