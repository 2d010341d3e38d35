"""The nouns that travel from stage to stage: plain frozen data, no behaviour beyond sums.

Sizes are bytes (int), times are microseconds (float), errors are relative gradient errors
(``||g' - g|| / ||g||``, dimensionless).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate

from .devices import DeviceProfile
from .symbolic import PlanAt, SymbolicPlan, plan_at


class Action(str, Enum):
    """What the plan does with one storage between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    COMPRESS = "compress"


class TensorClass(str, Enum):
    """What a saved tensor is used for; it decides which codecs are legal (docs/numerics.md)."""

    INPUT = "input"  # shares storage with a parameter, graph input or graph output
    STATISTIC = "statistic"  # logsumexp, mean, rstd, running statistics: any reduction
    INDEX = "index"  # integers, booleans, masks, seeds
    LOSS = "loss"  # nothing but the loss is computed from it (logits, log-probabilities)
    SOFTMAX_INPUT = "softmax_input"  # exponentiated against a saved statistic
    SINGULAR = "singular"  # reaches an op where a small error becomes a large one (log, 1/x, sign)
    ATTENTION_QK = "attention_qk"  # Q and K of fused attention, used beside its saved logsumexp
    ATTENTION_V = "attention_v"
    ATTENTION_OUT = "attention_out"
    LINEAR_INPUT = "linear_input"  # the backward only multiplies it (weight gradients)
    ACTIVATION = "activation"  # goes through elementwise derivatives, norms, recomputation


@dataclass(frozen=True)
class Source:
    """Where the user's program made a tensor. Empty strings and line 0 when unknown."""

    file: str = ""  # never absolute (``sources.py``)
    line: int = 0
    code: str = ""
    module: str = ""  # module path, e.g. "blocks.3.mlp"

    @property
    def where(self) -> str:
        """``file:line``, or ``?`` when tracing lost it."""
        return f"{self.file}:{self.line}" if self.file else "?"


@dataclass(frozen=True)
class Storage:
    """One storage that could live from the forward to the backward.

    Attributes:
        name: joint-graph node that owns the storage.
        shape: of the owning node; symbolic sizes at their hints.
        dtype: e.g. ``"bfloat16"``.
        id: the same in every process, and after edits that change no computation (``identity.py``).
        nbytes: its size in bytes at the hints.
        symbolic_bytes: the same as a sympy expression in text, e.g. ``"4096*s77"``.
        kind: its class.
        kept_because: why it may never be lossy; None when a codec is legal.
        min_bits: fewest payload bits a codec may use on it.
        op: the op that makes it, e.g. ``"aten.mm.default"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    symbolic_bytes: str
    kind: TensorClass
    op: str = ""
    source: Source = field(default_factory=Source)
    kept_because: str | None = None
    min_bits: int = 4
    id: str = ""


@dataclass(frozen=True)
class Decision:
    """What the plan does with one storage, and what that costs.

    Attributes:
        codec: codec name when compressed, else None.
        saved_bytes: bytes that live from forward to backward after the decision.
        baseline_bytes: bytes Inductor's own min-cut would save for it (0 if it would not).
        error: contribution to the relative gradient error (standard deviation).
        time_us: estimated extra time per step in microseconds.
        reason: one sentence for the report.
    """

    storage: Storage
    action: Action
    codec: str | None = None
    saved_bytes: int = 0
    baseline_bytes: int = 0
    error: float = 0.0
    time_us: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Price:
    """What another budget would change, by the planner's time model; gradient error is weighed in as time.

    Attributes:
        step_bytes: how much more or less.
        more_saves_us: microseconds a step that so much more would save, at least.
        less_costs_us: what so much less would cost, at most; None if no plan was found for it.
    """

    step_bytes: int
    more_saves_us: float
    less_costs_us: float | None


class Role(str, Enum):
    """What a storage is to the step while it is alive."""

    SAVED = "saved"  # waits in the forward for its use in the backward, compressed or not
    RETURNED = "returned"  # an output of the forward: alive until the step is over
    GRADIENT = "gradient"  # what the backward is given, and what it returns
    RECOMPUTED = "recomputed"  # a forward value that the backward makes again
    CODEC = "codec"  # a decoded tensor
    WORKSPACE = "workspace"  # what a library's call takes for itself
    TEMPORARY = "temporary"


@dataclass(frozen=True)
class Line:
    """A line of the user's program."""

    file: str
    line: int
    code: str


@dataclass(frozen=True)
class Block:
    """One storage of a step, and how long it lives.

    Attributes:
        id: unique in its track: ``Storage.id`` of what could be saved, ``.../payload`` of a codec's part.
        role: what it is to the step.
        kind: class of a forward value; None of anything else.
        module: module path, e.g. ``"blocks.3.mlp"``.
        line: index into ``Timeline.lines``; None where tracing lost it.
        dtype: e.g. ``"bfloat16"``; empty for a workspace.
        shape: elements by dimension; symbolic sizes at their hints.
        codec: by which it is encoded, or was until now (role ``codec``).
        nbytes: its size in bytes.
        first: first step at which it is alive.
        last: last step at which it is alive.
    """

    id: str
    role: Role
    kind: TensorClass | None
    module: str
    line: int | None
    dtype: str
    shape: tuple[int, ...]
    codec: str | None
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Track:
    """Everything that is alive during one simulated step, parameters and graph inputs left out.

    A step is one kernel. Where a kernel writes in place of what it reads for the last time, that ends a step
    before it, so that the bytes alive at a step are the sum of its blocks.

    Attributes:
        steps: id of the value that each kernel makes: the forward's, then the backward's. The first of the
            backward is empty: nothing runs, the gradients of the outputs arrive.
        forward_steps: how many of them are the forward's.
        blocks: by first step.
    """

    steps: tuple[str, ...]
    forward_steps: int
    blocks: tuple[Block, ...]

    def totals(self) -> list[int]:
        """Bytes alive at every step."""
        changes = [0] * (len(self.steps) + 1)
        for block in self.blocks:
            changes[block.first] += block.nbytes
            changes[block.last + 1] -= block.nbytes
        return list(accumulate(changes))[:-1]

    @property
    def peak_step(self) -> int:
        """The first step at which the most bytes are alive; 0 of an empty track."""
        totals = self.totals()
        return totals.index(max(totals)) if totals else 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at one time."""
        return max(self.totals(), default=0)

    def alive(self, step: int) -> list[Block]:
        """What is alive at a step, largest first."""
        return sorted((b for b in self.blocks if b.first <= step <= b.last), key=lambda b: (-b.nbytes, b.id))


@dataclass(frozen=True)
class Timeline:
    """What is alive when, as the simulator expects it: before Inductor has scheduled anything.

    Attributes:
        lines: the user's lines that blocks point at.
        baseline: with Inductor's own partition; its peak is ``Plan.baseline_peak_bytes``.
        planned: with this plan; its peak is ``Plan.simulated_peak_bytes``.
    """

    lines: tuple[Line, ...]
    baseline: Track
    planned: Track

    def line(self, block: Block) -> Line:
        """The user's line that made a block; empty where it is not known."""
        return Line("", 0, "") if block.line is None else self.lines[block.line]


@dataclass(frozen=True)
class Environment:
    """Versions and device that a plan was made with; two plans are compared without it."""

    ciuic: str
    torch: str
    triton: str  # empty: not installed
    python: str
    system: str  # e.g. "Linux x86_64"
    device: str  # name of the device profile


@dataclass(frozen=True)
class Plan:
    """One compiled graph's plan. Byte counts exclude parameters and graph inputs.

    ``decisions`` are in forward order, one a storage. ``gap`` is
    ``(cost - lower_bound) / cost`` of the optimiser, 0.0 when proved optimal.
    """

    name: str  # e.g. "graph 0 (Model.forward)"
    mode: str
    decisions: tuple[Decision, ...]
    baseline_saved_bytes: int
    planned_saved_bytes: int
    baseline_peak_bytes: int
    planned_peak_bytes: int
    gradient_error: float  # estimated relative error, whole gradient
    gradient_error_bound: float  # no single parameter's relative error should exceed this
    time_us: float  # estimated extra time a step
    gap: float = 0.0
    lower_bound: float = 0.0
    budget_bytes: int | None = None
    price: Price | None = None  # of the budget
    tightened: bool = False  # the budget, not the mode, decided how far to compress
    dynamic: bool = False
    device: str = ""
    profile: DeviceProfile | None = None  # the figures of that device that the plan rests on
    symbolic_saved_bytes: str = ""
    symbolic: SymbolicPlan | None = None  # bytes as functions of the dynamic sizes; None where they are fixed
    notes: tuple[str, ...] = ()  # sentences: targets missed, passes that declined, limits
    baseline_saved_count: int = 0
    simulated_peak_bytes: int = 0  # the rewritten graphs' peak, before Inductor has scheduled them
    replayed: bool = False  # planned_peak_bytes is of Inductor's own allocations, else simulated_peak_bytes
    input_bytes: int = 0  # parameters, buffers and inputs of this graph: alive all along
    gradient_bytes: int = 0  # what the backward returns: counted in the peak once, again while accumulating
    reserved_bytes: int | None = None  # that the allocator takes from the device, input_bytes included
    blas_bytes: int = 0  # of the reserved bytes: what cuBLAS keeps, from the first step on
    process_bytes: int | None = None  # reserved, and the device context; None where that was not measured
    timeline: Timeline | None = None  # what is alive when, simulated
    environment: Environment | None = None
    correction_bytes: int = 0  # replayed over simulated peak of an earlier round, when a budget asked for one

    @property
    def ratio(self) -> float:
        """Baseline over planned saved bytes; ``inf`` when nothing is saved any more."""
        if self.planned_saved_bytes == 0:
            return 1.0 if self.baseline_saved_bytes == 0 else float("inf")
        return self.baseline_saved_bytes / self.planned_saved_bytes

    def at(self, **sizes: int) -> PlanAt:
        """What the plan needs at other sizes of its dynamic dimensions, and whether its decisions still hold.

        Args:
            sizes: a value for each of ``symbolic.symbols``, by its name: ``plan.at(s77=64)``.

        Raises:
            SizeError: the plan has no dynamic sizes; a name is unknown or missing; torch would compile again.
        """
        return plan_at(self, sizes)
