"""Playing traces through an allocator: by hand, and against what real compiled steps allocate."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.codegen import wrapper
from torch._inductor.virtualized import V

import ciuic_compile
from bench import measure
from bench.models import MODELS, WithLoss
from ciuic_compile import compat_wrapper
from ciuic_compile.allocator import CachingAllocator, ExactAllocator
from ciuic_compile.replay import FREE, Event, Joint, Trace, replay
from ciuic_compile.types import Plan
from tests.training import Lambda, rows

CPU = torch.device("cpu")

FORWARD = Trace(
    ("primals_1",),
    ("loss", "kept", "primals_1"),
    (Event("a", 100), Event("kept", 40), Event("loss", 4), Event("a", FREE)),
)
BACKWARD = Trace(
    ("kept", "primals_1", "tangents_1"),
    ("grad",),
    (Event("b", 50), Event("kept", FREE), Event("grad", 30), Event("b", FREE)),
)
JOINT = Joint(3, 1, {"kept": 1, "primals_1": 2}, {"tangents_1": 4})


def test_a_step_by_hand() -> None:
    peaks = replay(FORWARD, BACKWARD, JOINT, ExactAllocator())
    assert peaks.forward == 144
    assert peaks.backward == 4 + 40 + 4 + 50  # loss, saved, tangent, b
    assert peaks.peak == 144


def test_a_saved_tensor_lives_until_the_backward_frees_it() -> None:
    late = replace(BACKWARD, events=(Event("b", 50), Event("grad", 30), Event("kept", FREE)))
    assert replay(FORWARD, late, JOINT, ExactAllocator()).backward == 4 + 40 + 4 + 50 + 30


def test_two_inputs_of_one_storage_free_it_once() -> None:
    forward = replace(FORWARD, outputs=("loss", "kept", "kept"))
    joint = replace(JOINT, received={"kept": 1, "view": 2})
    events = (Event("kept", FREE), Event("b", 50), Event("view", FREE), Event("grad", 60))
    backward = Trace(("kept", "view", "tangents_1"), ("grad",), events)
    assert replay(forward, backward, joint, ExactAllocator()).backward == 4 + 4 + 50 + 60


def test_tangents_that_autograd_holds_outlive_what_frees_them() -> None:
    early = replace(BACKWARD, events=(Event("tangents_1", FREE), *BACKWARD.events))
    held = replace(JOINT, holds_tangents=True)
    assert replay(FORWARD, early, JOINT, ExactAllocator()).backward == 4 + 40 + 50
    assert replay(FORWARD, early, held, ExactAllocator()).backward == 4 + 40 + 50 + 4


def test_what_the_user_gets_outlives_the_backward() -> None:
    joint = replace(JOINT, num_fwd_outputs=2)
    assert replay(FORWARD, BACKWARD, joint, ExactAllocator()).backward == 4 + 40 + 4 + 50 + 30


def test_temporaries_count_once() -> None:
    inside = (Event("inside", 500), Event("inside", FREE))
    backward = replace(BACKWARD, events=(*inside, *BACKWARD.events))
    assert replay(FORWARD, backward, JOINT, ExactAllocator()).backward == 4 + 40 + 4 + 500


LASTING = Event("cublas", 0, lasting=True)


def test_a_workspace_is_taken_once_a_thread_and_kept() -> None:
    """It is reserved, but in use before the last step begins: no part of its peak."""
    forward = replace(FORWARD, events=(LASTING, FORWARD.events[0], LASTING, *FORWARD.events[1:]))
    backward = replace(BACKWARD, events=(LASTING, *BACKWARD.events, LASTING))
    allocator, without = ExactAllocator(), replay(FORWARD, BACKWARD, JOINT, ExactAllocator())
    peaks = replay(forward, backward, JOINT, allocator, steps=4, workspaces={"cublas": 1000, "other": 7})
    assert (peaks.forward, peaks.backward) == (without.forward, without.backward)
    assert peaks.lasting == allocator.allocated == 2000
    assert peaks.reserved == without.reserved + 2000
    assert replay(forward, backward, JOINT, ExactAllocator()) == without


def test_a_workspace_takes_what_is_free_when_it_is_made() -> None:
    """In the order of allocations: at the first call it may lie in what a buffer has left, later not."""
    mib = 2**20
    buffer = (Event("x", 40 * mib), Event("x", FREE))
    joint, backward = Joint(0, 0, {}, {}), Trace((), (), ())
    for events, segments in (((*buffer, LASTING), 80), ((LASTING, *buffer), 72)):
        allocator = CachingAllocator()
        replay(Trace((), (), events), backward, joint, allocator, workspaces={"cublas": 32 * mib})
        assert allocator.reserved == segments * mib


def test_steps_give_everything_back() -> None:
    for allocator in (ExactAllocator(), CachingAllocator()):
        first = replay(FORWARD, BACKWARD, JOINT, allocator)
        assert allocator.allocated == 0
        assert replay(FORWARD, BACKWARD, JOINT, allocator, steps=5) == first


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_the_planned_peak_is_the_measured_one(name: str, mode: str) -> None:
    """On a CPU the replay leaves out what attention allocates for itself: some KiB a thread."""
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[name]("tiny")
    plan, measured = planned_and_measured(WithLoss(built, loss_fn), *batches(0, CPU), mode=mode)
    assert 0 <= measured - plan.planned_peak_bytes <= 64 << 10


@pytest.mark.parametrize("mode", ["lossless", "4:1", "6:1"])
def test_without_external_kernels_the_planned_peak_is_exact(mode: str) -> None:
    def forward(m: nn.ModuleList, ids: Tensor) -> Tensor:
        x = F.embedding(ids, m[2].weight)
        for _ in range(3):
            hidden = F.silu(m[0](F.rms_norm(x, (64,))))
            x = x + m[1](F.dropout(hidden, 0.1)) * x.tanh()
        return F.cross_entropy(x @ m[2].weight.T, ids)

    model = Lambda(forward)
    ids = torch.randint(64, (4096,), generator=torch.Generator().manual_seed(0))
    plan, measured = planned_and_measured(model, ids, mode=mode)
    assert abs(plan.planned_peak_bytes - measured) <= 8  # a number of the loss's
    assert plan.gradient_bytes == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert plan.input_bytes == ids.nbytes + sum(p.nbytes for p in model.parameters() if p.grad is not None)


def planned_and_measured(model: nn.Module, *batch: Tensor, mode: str) -> tuple[Plan, int]:
    """The plan of a step, and the peak of its second run."""
    run = torch.compile(model, backend="ciuic", options={"mode": mode, "min_bytes": 256, "report": "off"})
    run(*batch).backward()
    (plan,) = ciuic_compile.plans()
    assert plan.replayed
    model.zero_grad(set_to_none=True)
    with measure.peak(CPU) as peak:
        run(*batch).backward()
    return plan, peak.nbytes


def test_a_plan_that_cannot_be_replayed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: object, line: object) -> None:
        raise compat_wrapper._Unknown("its generated code is split in parts")

    monkeypatch.setattr(compat_wrapper._Reader, "_line", unreadable)
    run = torch.compile(Lambda(lambda m, x: m[0](x).sin()), backend="ciuic", options={"report": "off"})
    run(rows()).sum().backward()
    (plan,) = ciuic_compile.plans()
    assert not plan.replayed
    assert plan.planned_peak_bytes == plan.simulated_peak_bytes
    assert plan.notes[-1] == "the peak is simulated, not replayed: its generated code is split in parts"


def test_the_whole_of_code_in_parts_is_not_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs the allocations are in the parts: the whole's alone would be a false plan."""
    monkeypatch.setattr(wrapper.PythonWrapperCodegen, "run_wrapper_ir_passes", lambda self, inference: None)
    graph = SimpleNamespace(is_backward=False, graph_input_names=[], graph_outputs=[])
    with V.set_graph_handler(graph), compat_wrapper.recorded() as recording:
        for kind in (wrapper.SubgraphPythonWrapperCodegen, wrapper.PythonWrapperCodegen):
            code = object.__new__(kind)
            code.lines = []
            code.run_wrapper_ir_passes(False)
        assert recording.forward is None
        assert recording.problems == ["its generated code is split in parts (CUDA graphs, control flow)"]
        code.run_wrapper_ir_passes(False)  # the next graph is whole
        assert recording.forward == Trace((), (), ())
