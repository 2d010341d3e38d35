"""Inductor's custom-partitioner hook: joint graph in, rewritten forward and backward out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from . import compat
from .analyze import MemoryModel, analyze
from .audit import audit, check
from .capture import CapturedGraph, tensor
from .chunking import Chunking, choose_chunks, choose_feed_forwards, why_whole
from .compat_extract import Extractor
from .compat_room import with_room
from .config import CompileConfig
from .confirm import joint_of
from .environment import environment
from .errors import InfeasibleBudgetError, PeakDisagreementError, VerificationError
from .passes import Graphs, default_passes, run_pipeline
from .planner import Codecs, Selection, choose_codecs, cost_us, fit_budget, make_plan, select
from .planner.select import follows_rules
from .replay import Joint
from .simulate import Peaks, saved_storages, simulate, tensor_bytes
from .symbolize import symbolized
from .timeline import timeline
from .types import Plan

STAYS_WHOLE = {
    "loss": "the loss is not chunked, though it could be",
    "feed-forwards": "feed-forwards are not chunked, though they could be",
}


class CiuicPartitioner(CustomPartitionerFn):
    """Capture, analyze, plan, rewrite, audit: one call is one compiled graph.

    Args:
        config: the user's options.
        key: everything that determines the plan, as one string (``cache.graph_key``). Inductor hashes it
            into its own cache keys, so no cached code of another configuration can be hit.
        name: the graph's name in reports.
        correction: bytes that Inductor's schedule of an earlier plan needed beyond the simulated peak.
        frugal: the mode's own plan under a budget, though another costs less time; an error where it is over.

    Attributes:
        plan: the plan, once called; None when nothing in the graph depends on gradients.
        joint: how the rewritten graphs belong together.
        called: whether Inductor asked at all (on a cache hit it does not).
        lowers: whether what is returned can be run; otherwise codecs are markers in it.
    """

    lowers = True

    def __init__(
        self, config: CompileConfig, key: str, name: str, correction: int = 0, frugal: bool = False
    ) -> None:
        self._config = config
        self._key = key + (f" {correction}" if correction else "") + (" frugal" if frugal else "")
        self._name = name
        self._correction = correction
        self._frugal = frugal
        self.plan: Plan | None = None
        self.joint: Joint | None = None
        self._by_last = False
        self.called = False

    def uuid(self) -> str:
        return self._key

    def is_by_last(self) -> bool:
        """Whether the backward's kernels are to run in the order of ``compat_order.py``."""
        return self._by_last

    def __getstate__(self) -> dict[str, Any]:
        # Inductor pickles its configuration into cache keys; what identifies us there is the key alone.
        return {"_key": self._key}

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.called = True
        with compat.collecting_later(), compat.cheap_copies():
            return with_room(lambda: self._partitioned(gm, joint_inputs, **kwargs))

    def _partitioned(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        def partition(
            joint: fx.GraphModule, whole: Candidate | None = None
        ) -> tuple[Graphs, Candidate | None]:
            return partition_joint(
                joint, joint_inputs, self._config, whole, self._correction, self._frugal, **kwargs
            )

        graphs, candidate = partition(gm)
        if candidate is None:  # nothing in this graph depends on the gradients
            graphs.forward.recompile()
            graphs.backward.recompile()
            return graphs.forward, graphs.backward
        whole, tried = candidate, [candidate]
        while (chunked := tried[-1].chunked) is not None:  # one loss after the other
            _, candidate = partition(chunked, whole)
            assert candidate is not None, "the gradients of a loss in chunks are gone"
            tried.append(candidate)
        losses = replace(tried[-1], done={"loss": " ".join(c.chunking.done for c in tried[:-1])})
        chosen, notes = whole, dict[str, str]()
        if len(tried) > 1:
            chosen = self._choose(whole, losses, notes)
        either = len(tried) > 1 and (chosen is whole or chosen.infeasible is not None)
        for base in [whole, losses] if either else [chosen]:
            if whole.feed_forwards.chunk is None:
                break
            if self._config.chunk_ffn is not True and not chosen.misses and not chosen.model.short_of_memory:
                why = "ratio and budget are met without their matmuls once more"
                notes.setdefault("feed-forwards", f"{STAYS_WHOLE['feed-forwards']}: {why}")
            elif base.feed_forward is not None:
                _, candidate = partition(base.feed_forward, whole)
                assert candidate is not None, "the gradients of feed-forwards in chunks are gone"
                candidate = replace(candidate, done={**base.done, "feed-forwards": base.feed_forwards.done})
                chosen = self._choose(chosen, candidate, notes)
        if chosen.infeasible is not None:
            raise chosen.infeasible
        kept = (note for kind, note in notes.items() if kind not in chosen.done)
        declined = (*tried[-1].chunking.declined, *whole.feed_forwards.declined)
        said = (*filter(None, chosen.done.values()), *declined, *kept)
        selection = replace(chosen.selection, notes=(*said, *chosen.selection.notes))
        self.plan = plan_and_rewrite(
            self._name,
            chosen.model,
            selection,
            chosen.baseline,
            chosen.graphs,
            self._correction,
            chosen.draft,
            whole.pair,
            self.lowers,
        )
        self.joint = joint_of(chosen.graphs)
        self._by_last = chosen.draft.planned.by_last
        return chosen.graphs.forward, chosen.graphs.backward

    def _choose(self, current: Candidate, other: Candidate, notes: dict[str, str]) -> Candidate:
        """One of two candidates, of which ``other`` has more in chunks; in ``notes``, why it was not taken.

        Compared are both final plans, codecs and budget included: what codecs do to the other saved tensors
        decides whether logits or a feed-forward set the peak.
        """
        config = self._config
        more = other.done.keys() - current.done.keys()
        why = ""
        if not follows_rules(other.model.captured, other.model.classes, other.selection.saved, config.lossy):
            # the logits that the backward makes again must be those of the forward
            why = "the hidden states cannot be saved as they are"
            notes |= {kind: f"{STAYS_WHOLE[kind]}: {why}" for kind in more}
            return current
        asked = {"loss": config.chunk_loss, "feed-forwards": config.chunk_ffn}
        if any(asked[kind] is True for kind in more):
            return other
        if (missed := current.infeasible) is not None:
            too = other.infeasible
            return current if too is not None and too.smallest_bytes > missed.smallest_bytes else other
        if other.infeasible is not None:
            why = "the budget leaves no room for it"
        elif not _is_better(current, other):
            if "feed-forwards" in more and not current.model.short_of_memory:
                why = "that brings ratio and budget no closer"
            elif config.budget is not None:
                why = "the budget is met for less time without"
            else:
                why = why_whole(current.draft.planned, other.draft.planned)
        if not why:
            return other
        if len(more) == 1:
            notes |= {kind: f"{STAYS_WHOLE[kind]}: {why}" for kind in more}
        return current


def _is_better(current: Candidate, other: Candidate) -> bool:
    """Whether the other plan is wanted whatever its peak: it is closer to a ratio that this one misses, or
    within a budget that binds this one it costs less, or memory is short and its smaller error is worth its
    matmuls once more."""
    before, after = current.draft.codecs, other.draft.codecs
    if _misses_ratio(current.draft, current.model) and not before.tightened:
        return after.nbytes < before.nbytes
    if before.tightened or (current.model.short_of_memory and after.variance < before.variance):
        rebuilt = before.tightened  # by the solver's account; without one the two cuts rebuild much the same
        return cost_us(other.model, after, rebuilt) < cost_us(current.model, before, rebuilt)
    return False


def _misses_ratio(draft: Draft, model: MemoryModel) -> bool:
    ratio = model.config.ratio
    return ratio is not None and draft.codecs.nbytes > int(model.baseline_bytes / ratio)


@dataclass(frozen=True)
class Candidate:
    """One way to compute loss and feed-forwards: the graphs partitioned for it, and what their plan needs.

    Attributes:
        chunking: which loss could be chunked next, and which could not.
        chunked: the joint graph with that in chunks; None where there is nothing (more) to chunk.
        feed_forwards: which feed-forwards could be chunked, and which could not.
        baseline: peaks of Inductor's own partition of the user's graph.
        correction: bytes that Inductor's schedule of an earlier plan needed beyond the simulated peak.
        pair: Inductor's own partition of the user's graph; None of a graph in chunks.
        trials: what the planner had simulated.
        done: what is in chunks, and the report's sentence on it.
    """

    graphs: Graphs
    model: MemoryModel
    selection: Selection
    baseline: Peaks
    chunking: Chunking
    chunked: fx.GraphModule | None
    feed_forwards: Chunking
    correction: int = 0
    infeasible: InfeasibleBudgetError | None = None
    pair: Graphs | None = None
    trials: Sequence[Trial] = ()
    done: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def feed_forward(self) -> fx.GraphModule | None:
        """The joint graph with all feed-forwards in chunks, or None."""
        captured, chunk = self.model.captured, self.feed_forwards.chunk
        joint = captured.graph.owning_module
        if chunk is None or joint is None:
            return None
        return fx.GraphModule(joint, chunk.run(captured))

    @property
    def misses(self) -> bool:
        """Whether its plan misses the ratio or the budget."""
        return self.infeasible is not None or _misses_ratio(self.draft, self.model)

    @cached_property
    def draft(self) -> Draft:
        """Its plan, as far as it is needed to choose."""
        return make_draft(self.model, self.selection, self.graphs, self.correction, self.trials)


def partition_joint(
    joint: fx.GraphModule,
    joint_inputs: Sequence[object],
    config: CompileConfig,
    whole: Candidate | None,
    correction: int,
    frugal: bool = False,
    **kwargs: Any,
) -> tuple[Graphs, Candidate | None]:
    """Partition a joint graph by our own selection; no candidate where no part of it depends on gradients.

    Args:
        whole: the user's own graph, where ``joint`` is that with its loss in chunks.
    """
    num_fwd_outputs: int = kwargs["num_fwd_outputs"]
    seen: dict[str, Any] = {}

    def choose(
        graph: fx.Graph, info: compat.NodeInfo, baseline: Callable[[], list[fx.Node]]
    ) -> list[fx.Node]:
        captured = CapturedGraph(graph, info, tuple(baseline()), num_fwd_outputs)
        model = analyze(captured, config, whole.model if whole is not None else None)
        extract = Extractor(joint, info, num_fwd_outputs)
        pair = None
        if whole is None:
            pair = Graphs(*extract(captured.baseline_saved), num_fwd_outputs)
            own = pair.forward.graph, pair.backward.graph
            peaks = simulate(*own, num_fwd_outputs, model.kind, reorder=False)
        else:
            peaks = whole.baseline
        chunking = choose_chunks(model)
        chunk = chunking.chunk
        chunked = fx.GraphModule(joint, chunk.run(captured)) if chunk is not None else None
        selection, infeasible = select(model), None
        trials: list[Trial] = []
        if config.budget is not None:

            def judge(saved: Sequence[fx.Node], codecs: Mapping[fx.Node, str | None]) -> Peaks:
                graphs = Graphs(*extract(saved), num_fwd_outputs)
                by_name = {n.name: codec for n, codec in codecs.items() if codec}
                trials.append(Trial.of(graphs, by_name, correction, model.kind))
                return trials[-1].peaks

            try:
                selection = fit_budget(model, selection, judge, frugal)
            except InfeasibleBudgetError as error:
                infeasible = error
        seen.update(
            model=model,
            selection=selection,
            baseline=peaks,
            chunking=chunking,
            chunked=chunked,
            feed_forwards=choose_feed_forwards(model),
            correction=correction,
            infeasible=infeasible,
            pair=pair,
            trials=[t for t in trials if selection.codecs and t.codecs == selection.codecs.by_name],
        )
        return list(selection.saved)

    forward, backward = compat.partition_with(joint, joint_inputs, choose, **kwargs)
    graphs = Graphs(forward, backward, num_fwd_outputs)
    return graphs, Candidate(graphs, **seen) if seen else None


@dataclass(frozen=True)
class Trial:
    """Graphs that were simulated with codecs, as markers, in them.

    Attributes:
        nodes: what the graphs were before.
    """

    nodes: tuple[tuple[str, object], ...]
    codecs: Mapping[str, str]
    graphs: Graphs
    peaks: Peaks

    @classmethod
    def of(cls, graphs: Graphs, codecs: Mapping[str, str], correction: int, kind: str | None) -> Trial:
        """Simulate graphs once these nodes are stored with these codecs; rewrites the graphs."""
        nodes = _nodes(graphs)
        run_pipeline(graphs, default_passes(codecs, kind)[:-1], trial=True)  # markers have the codecs' sizes
        peaks = simulate(graphs.forward.graph, graphs.backward.graph, graphs.num_fwd_outputs, kind)
        peaks = replace(peaks, forward=peaks.forward + correction, backward=peaks.backward + correction)
        return cls(nodes, codecs, graphs, peaks)


def _nodes(graphs: Graphs) -> tuple[tuple[str, object], ...]:
    """What tells two extractions from one joint graph apart."""
    both = (graphs.forward.graph, graphs.backward.graph)
    return tuple((node.name, node.target) for graph in both for node in graph.nodes)


@dataclass(frozen=True)
class Draft:
    """A plan before it is written down: its codecs, and the simulated peaks with them.

    Attributes:
        saved: the selected nodes, as far as the partitioned graphs save them.
        added: bytes of saved tensors that were not selected.
        trial: the graphs that were simulated, with the codecs as markers.
    """

    saved: tuple[fx.Node, ...]
    codecs: Codecs
    planned: Peaks
    added: int
    trial: Graphs


def make_draft(
    model: MemoryModel,
    selection: Selection,
    graphs: Graphs,
    correction: int = 0,
    trials: Sequence[Trial] = (),
) -> Draft:
    """Choose codecs for a partitioned graph, if the selection has none; the graphs stay as they are.

    Args:
        trials: simulated before; one of them may be of this very plan.
    """
    # RNG functionalization and symbol handling may have dropped or added saved values: plan on what is there.
    storages = saved_storages(graphs.forward.graph, graphs.num_fwd_outputs)
    present = {n.name for n in storages}
    chosen = {n.name for n in selection.saved}
    added = sum(tensor_bytes(n.meta["val"]) for n in storages if n.name not in chosen)
    selection = replace(selection, saved=tuple(n for n in selection.saved if _stays(n, present)))

    codecs = selection.codecs or choose_codecs(model, selection)
    nodes, by_name = _nodes(graphs), codecs.by_name
    same = (t for t in trials if t.codecs == by_name and t.nodes == nodes)
    trial = next(same, None) or Trial.of(_copy(graphs), by_name, correction, model.kind)
    return Draft(selection.saved, codecs, trial.peaks, added, trial.graphs)


def plan_and_rewrite(
    name: str,
    model: MemoryModel,
    selection: Selection,
    baseline: Peaks,
    graphs: Graphs,
    correction: int = 0,
    draft: Draft | None = None,
    pair: Graphs | None = None,
    lower: bool = True,
) -> Plan:
    """Choose codecs for a partitioned graph, rewrite it in place, audit it and return the plan.

    Args:
        draft: that of these graphs, where it was already made.
        pair: Inductor's own partition of the user's graph; the plan has no timeline without it.
        lower: whether the graphs are to be run; if not, codecs stay markers, and nothing is audited.

    Raises:
        VerificationError: the rewritten graphs save other bytes than the plan says. Where they keep more
            alive, by an independent account, the plan says so.
    """
    draft = draft or make_draft(model, selection, graphs, correction)
    selection = replace(selection, saved=draft.saved)
    codecs, planned, added = draft.codecs, draft.planned, draft.added
    passes = default_passes(codecs.by_name, model.kind)
    notes = run_pipeline(graphs, passes if lower else passes[:-1])
    stored = saved_storages(graphs.forward.graph, graphs.num_fwd_outputs)
    plan = make_plan(name, model, selection, codecs, baseline, planned, model.device, notes)
    plan = replace(
        plan,
        simulated_peak_bytes=planned.peak - correction,
        correction_bytes=correction,
        timeline=None if pair is None else timeline(model, draft.trial, pair, planned, baseline),
        environment=environment(plan.device),
    )
    if added:
        plan = replace(
            plan,
            baseline_saved_bytes=plan.baseline_saved_bytes + added,
            planned_saved_bytes=plan.planned_saved_bytes + added,
            notes=(*plan.notes, f"{added} bytes of it are RNG states that torch saves to replay random ops"),
        )
    if not lower:
        return symbolized(plan, model, baseline, planned, stored, added)
    audited = audit(graphs.forward.graph, graphs.backward.graph, graphs.num_fwd_outputs)
    try:
        check(audited, plan.planned_saved_bytes, plan.simulated_peak_bytes)
    except PeakDisagreementError as error:
        # Either account may be wrong about what Inductor fuses (attention written by hand: 48%), and the
        # replay of Inductor's own allocations, which comes next, tells: no reason not to train.
        plan = replace(plan, notes=(*plan.notes, str(error)))
    except VerificationError as error:
        raise VerificationError(f"{name}: {error}") from None
    return symbolized(plan, model, baseline, planned, stored, added)


def _stays(node: fx.Node, present: set[str]) -> bool:
    return node.name in present or tensor(node) is None or node.op in ("placeholder", "get_attr")


def _copy(graphs: Graphs) -> Graphs:
    return Graphs(compat.copied(graphs.forward), compat.copied(graphs.backward), graphs.num_fwd_outputs)
