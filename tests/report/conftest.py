"""Plans to render: one as a Llama-like model gives, and a strategy for every other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st

from ciuic_compile.devices import named
from ciuic_compile.symbolic import Symbol, SymbolicBytes, SymbolicPlan
from ciuic_compile.types import Action, Decision, Plan, Price, Source, Storage, TensorClass

_SIZES = st.integers(0, 2**50)
_COSTS = st.floats(allow_nan=False)
_SOURCES = st.builds(
    Source, file=st.text(max_size=300), line=st.integers(0, 10**6), code=st.text(max_size=300)
)
_STORAGES = st.builds(
    Storage,
    name=st.text(max_size=200),
    shape=st.lists(st.integers(0, 2**20), max_size=5).map(tuple),
    dtype=st.sampled_from(["bfloat16", "float32", "int64"]),
    nbytes=_SIZES,
    symbolic_bytes=st.text(max_size=100),
    kind=st.sampled_from(TensorClass),
    op=st.text(max_size=100),
    source=st.builds(replace, _SOURCES, module=st.text(max_size=300)),
    kept_because=st.none() | st.text(max_size=300),
    min_bits=st.integers(2, 16),
)
_DECISIONS = st.builds(
    Decision,
    storage=_STORAGES,
    action=st.sampled_from(Action),
    codec=st.none()
    | st.sampled_from(["int8_group64", "int4_group64_affine", "fp8_e5m2", "int2"])
    | st.text(),
    saved_bytes=_SIZES,
    baseline_bytes=_SIZES,
    error=_COSTS,
    time_us=_COSTS,
    reason=st.text(max_size=300),
)
_BYTES = st.integers(0, 3).flatmap(
    lambda width: st.builds(
        SymbolicBytes,
        terms=st.lists(
            st.sampled_from(["1", "s0", "s0*s1", "((s0 + 63)//64)"]), min_size=width, max_size=width
        ).map(tuple),
        rows=st.lists(st.tuples(*[_SIZES] * width), max_size=4).map(tuple),
    )
)
_SYMBOLIC = st.builds(
    SymbolicPlan,
    symbols=st.tuples(
        st.builds(Symbol, st.just("s0"), st.text(max_size=300), _SIZES, _SIZES, st.none() | _SIZES),
        st.builds(Symbol, st.just("s1"), st.text(max_size=300), _SIZES, _SIZES, st.none() | _SIZES),
    ),
    guards=st.lists(st.text(max_size=200), max_size=3).map(tuple),
    baseline_saved=_BYTES,
    planned_saved=_BYTES,
    baseline_peak=_BYTES,
    planned_peak=_BYTES,
)
_PLANS = st.builds(
    Plan,
    name=st.text(max_size=300),
    mode=st.sampled_from(["4:1", "lossless", "off"]),
    decisions=st.lists(_DECISIONS, max_size=12).map(tuple),
    baseline_saved_bytes=_SIZES,
    planned_saved_bytes=_SIZES,
    baseline_peak_bytes=_SIZES,
    planned_peak_bytes=_SIZES,
    gradient_error=_COSTS,
    gradient_error_bound=_COSTS,
    time_us=_COSTS,
    gap=_COSTS,
    lower_bound=_COSTS,
    budget_bytes=st.none() | _SIZES,
    dynamic=st.booleans(),
    device=st.text(max_size=200),
    profile=st.none() | st.sampled_from([named("h200"), named("cpu")]),
    symbolic_saved_bytes=st.text(max_size=300),
    symbolic=st.none() | _SYMBOLIC,
    notes=st.lists(st.text(max_size=800), max_size=8).map(tuple),
    baseline_saved_count=st.integers(0, 10**6),
    simulated_peak_bytes=_SIZES,
    replayed=st.booleans(),
    tightened=st.booleans(),
    price=st.none() | st.builds(Price, _SIZES, _COSTS, st.none() | _COSTS),
    input_bytes=_SIZES,
    gradient_bytes=_SIZES,
    reserved_bytes=st.none() | _SIZES,
    blas_bytes=_SIZES,
    process_bytes=st.none() | _SIZES,
    correction_bytes=st.integers(-(2**50), 2**50),
)


@pytest.fixture(scope="session")
def plans() -> st.SearchStrategy[Plan]:
    """Any plan that the types allow, consistent or not."""
    return _PLANS


@pytest.fixture
def plan() -> Plan:
    """Two layers of a Llama-like model: something kept, recomputed, in 8 and in 4 bits."""
    decisions: list[Decision] = []
    mib = 1024 * 1024
    for i in range(2):
        block = f"blocks.{i}"
        rows = (
            ("mlp", "aten.mm.default", 57, "gate = self.gate(x)", 64, Action.COMPRESS, "int4_group64", 17),
            ("attn", "aten.mm.default", 31, "q = self.wq(x)", 16, Action.COMPRESS, "int8_group64", 8),
            ("norm", "aten.mul.Tensor", 12, "return x * self.weight", 16, Action.RECOMPUTE, None, 0),
        )
        for module, op, line, code, size, action, codec, saved in rows:
            source = Source("/home/user/project/llama/model.py", line, code, f"{block}.{module}")
            storage = Storage(
                f"{module}_{i}",
                (8192, 4096),
                "bfloat16",
                size * mib,
                str(size * mib),
                TensorClass.ACTIVATION,
                op,
                source,
            )
            decisions.append(Decision(storage, action, codec, saved * mib, size * mib, 0.01, 5.0, ""))
    logits = Storage(
        "logits", (8192, 32000), "bfloat16", 500 * mib, "", TensorClass.LOSS, "aten.mm.default",
        Source("/home/user/project/train.py", 99, "loss = cross_entropy(logits, y)", "lm_head"),
    )  # fmt: skip
    decisions.append(
        Decision(logits, Action.KEEP, None, 500 * mib, 500 * mib, reason="only the loss is computed from it")
    )
    weight = Storage("primals_1", (4096, 4096), "bfloat16", 32 * mib, "", TensorClass.INPUT)
    decisions.append(Decision(weight, Action.KEEP, None, 32 * mib, 32 * mib, reason="parameter"))
    return Plan(
        "graph 0 (Model.forward)", "4:1", tuple(decisions), 692 * mib, 550 * mib, 900 * mib, 640 * mib,
        0.013, 0.05, 30.0, budget_bytes=700 * mib, device="cuda: NVIDIA H200", baseline_saved_count=7,
        notes=("4:1 was asked for and 1.26:1 is what the tensors that may be compressed allow.",),
    )  # fmt: skip
