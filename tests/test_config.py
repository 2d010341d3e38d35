"""Options: what is accepted, what it becomes, and what every refusal says."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_compile.calibration import Calibration, GraphCalibration
from ciuic_compile.config import (
    INDUCTOR_MODES,
    OPTION_NAMES,
    CompileConfig,
    default_config,
    parse_options,
    parse_size,
    set_default_config,
)
from ciuic_compile.devices import named
from ciuic_compile.errors import CiuicError, OptionError


def refused(options: Any, mode: Any = None, base: CompileConfig | None = None) -> str:
    """The message that these options are refused with."""
    with pytest.raises(OptionError) as caught:
        parse_options(options, mode, base=base)
    assert isinstance(caught.value, CiuicError)
    message = str(caught.value)
    assert "\n  valid: " in message
    assert "\n  fix: " in message
    return message


@pytest.mark.parametrize("nothing", [None, {}])
def test_defaults(nothing: Any) -> None:
    config = parse_options(nothing)
    assert config == CompileConfig()
    assert (config.mode, config.ratio, config.lossy) == ("4:1", 4.0, True)
    assert (config.report, config.min_bytes, config.group_size, config.budget) == ("short", 16384, 64, None)
    assert (config.chunk_loss, config.loss_chunk_bytes, config.chunk_ffn) == ("auto", None, "auto")
    assert config.inductor_options == {}
    assert hash(config) == hash(CompileConfig())
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("given_mode", "canonical", "ratio"),
    [
        ("4:1", "4:1", 4.0),
        (" 2.50 : 1 ", "2.5:1", 2.5),
        ("1:1", "1:1", 1.0),
        ("10:1", "10:1", 10.0),
        ("10.00:1", "10:1", 10.0),
        ("04:1", "4:1", 4.0),
        ("lossless", "lossless", None),
        ("off", "off", None),
    ],
)
def test_mode_is_canonical(given_mode: str, canonical: str, ratio: float | None) -> None:
    for config in (parse_options({"mode": given_mode}), parse_options(None, given_mode)):
        assert (config.mode, config.ratio, config.lossy) == (canonical, ratio, ratio is not None)


@given(st.integers(10, 10**9))
def test_ratio_survives_its_text(tenths: int) -> None:
    config = parse_options({"mode": f"{tenths / 10!r}:1"})
    assert config.ratio == tenths / 10
    assert parse_options({"mode": config.mode}) == config


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("1:4", "mode='4:1'"),
        ("0.5:1", "R >= 1"),
        ("0:1", "R >= 1"),
        ("4:0", "R >= 1"),
        ("inf:1", "R >= 1"),
        ("nan:1", "R >= 1"),
        ("1e3:1", "R >= 1"),
        ("-4:1", "R >= 1"),
        ("4", "'4:1'"),
        (4, "mode='4:1'"),
        (2.5, "mode='2.5:1'"),
        (True, "R >= 1"),
        (float("nan"), "R >= 1"),
        (None, "R >= 1"),
        ("losless", "did you mean 'lossless'?"),
        ("max-autotune", "'inductor_mode': 'max-autotune'"),
        ("9" * 400 + ":1", "R >= 1"),
        ("\u0664:1", "R >= 1"),
    ],
)
def test_wrong_mode(mode: Any, says: str) -> None:
    message = refused({"mode": mode})
    assert "'mode'" in message
    assert says in message


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (12, 12),
        ("12GiB", 12 * 2**30),
        ("800MB", 800 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        (" 4096 ", 4096),
        ("0.5 kB", 500),
        ("7b", 7),
        ("1tib", 2**40),
        (0, 0),
    ],
)
def test_sizes(value: Any, nbytes: int) -> None:
    assert parse_size("min_bytes", value) == nbytes
    assert parse_options({"min_bytes": value}).min_bytes == nbytes


@given(st.integers(0, 10**12), st.sampled_from([("", 1), ("KiB", 1024), ("GB", 10**9), ("PiB", 2**50)]))
def test_whole_sizes_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_size("budget", f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (True, "whole number of bytes"),
        (-1, "whole number of bytes"),
        (0, "more than 0"),
        ("0 GiB", "more than 0"),
        (0.5, "not torch's fraction"),
        (12e9, "12000000000"),
        (math.nan, "whole number of bytes"),
        (math.inf, "whole number of bytes"),
        ("12G", "'12GiB'"),
        ("12 GiBs", "did you mean 'GiB'?"),
        ("-3GiB", "whole number of bytes"),
        ("1.5", "whole number of bytes"),
        ("", "whole number of bytes"),
        ("nan", "whole number of bytes"),
        ("9" * 5000, "whole number of bytes"),
        ([1], "whole number of bytes"),
        (b"12", "whole number of bytes"),
    ],
)
def test_wrong_budget(value: Any, says: str) -> None:
    message = refused({"budget": value})
    assert "'budget'" in message
    assert says in message
    assert len(message) < 1000


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True, "0.1", 10**400])
def test_wrong_max_error(value: Any) -> None:
    assert "'max_error'" in refused({"max_error": value})


@pytest.mark.parametrize("value", [0.05, 1, None])
def test_max_error(value: Any) -> None:
    assert parse_options({"max_error": value}).max_error == value


@pytest.mark.parametrize("value", [0, 65, 64.0, "64", True, None])
def test_wrong_group_size(value: Any) -> None:
    assert "32, 64, 128" in refused({"group_size": value})


def test_patterns() -> None:
    config = parse_options({"allow": "blocks.*", "deny": ["aten.mm", "blocks.0", "aten.mm"]})
    assert (config.allow, config.deny) == (("blocks.*",), ("aten.mm", "blocks.0"))
    assert config.excluded_because("blocks.1.mlp", "aten.mul.Tensor") is None
    assert config.excluded_because("blocks.0.mlp", "aten.mul.Tensor") == "deny: 'blocks.0'"
    assert config.excluded_because("blocks.1", "aten.mm.default") == "deny: 'aten.mm'"
    assert config.excluded_because("head", "aten.mul.Tensor") == "not in allow"
    assert config.excluded_because("", "") == "not in allow"
    assert CompileConfig().excluded_because("", "") is None


@pytest.mark.parametrize("value", ["auto", True, False])
def test_chunk_loss(value: Any) -> None:
    assert parse_options({"chunk_loss": value}).chunk_loss is value
    assert parse_options({"chunk_ffn": value}).chunk_ffn is value


@pytest.mark.parametrize("value", [None, 1, "yes", "Auto", 8, "true"])
def test_wrong_chunk_loss(value: Any) -> None:
    assert "'auto', True or False" in refused({"chunk_loss": value})
    assert "'auto', True or False" in refused({"chunk_ffn": value})


def test_loss_chunk_bytes() -> None:
    assert parse_options({"loss_chunk_bytes": "16MiB"}).loss_chunk_bytes == 16 * 2**20
    assert parse_options({"loss_chunk_bytes": None}).loss_chunk_bytes is None
    assert "more than 0" in refused({"loss_chunk_bytes": 0})
    assert "whole number of bytes" in refused({"loss_chunk_bytes": -1})


@pytest.mark.parametrize("pattern", ["mm", "aten.mm", "aten.mm.default", "aten.*", "?m"])
def test_ops_match_with_and_without_namespace(pattern: str) -> None:
    assert parse_options({"deny": [pattern]}).excluded_because("a.b", "aten.mm.default")
    assert not parse_options({"deny": [pattern]}).excluded_because("a.b", "prims.mul.default")


@pytest.mark.parametrize("value", [[], [""], [3], 3, None, [["a"]]])
def test_wrong_allow(value: Any) -> None:
    assert "'allow'" in refused({"allow": value})


def test_contradictions() -> None:
    assert "'budget'" in refused({"mode": "off", "budget": "1GiB"})
    assert "not also in deny" in refused({"allow": ["a", "b"], "deny": ["b"]})
    assert "keep one of the two" in refused({"mode": "4:1"}, "8:1")
    assert "keep one of the two" in refused({"inductor_mode": "default"}, "max-autotune")
    assert parse_options({"mode": "4.0:1"}, "4:1").mode == "4:1"


@pytest.mark.parametrize("name", ["plan.json", "plan.html", "plan.txt"])
def test_report_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_options({"report": name}).report == str(tmp_path / name)
    assert parse_options({"report": tmp_path / name}).report == str(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_wrong_report(tmp_path: Path) -> None:
    (tmp_path / "dir.json").mkdir()
    assert "did you mean 'short'?" in refused({"report": "shirt"})
    assert "existing directory" in refused({"report": tmp_path / "none" / "plan.json"})
    assert "is a directory" in refused({"report": tmp_path / "dir.json"})
    for value in (tmp_path / "plan.yaml", ".json", True, None, 3, "", "a\0.json", b"plan.json"):
        assert "'.json', '.html', '.txt'" in refused({"report": value})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_report_in_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "can be written" in refused({"report": tmp_path / "plan.json"})


@pytest.mark.parametrize("mode", INDUCTOR_MODES)
def test_inductor_modes(mode: str) -> None:
    from torch._inductor import list_mode_options

    for config in (parse_options(None, mode), parse_options({"inductor_mode": mode})):
        assert config.inductor_mode == mode
        assert config.inductor_options == list_mode_options(mode)
        assert config.mode == "4:1"


def test_inductor_options() -> None:
    given_options = {"triton.cudagraphs": False, "triton-unique_kernel_names": True, "max_autotune": True}
    config = parse_options({**given_options, "inductor_mode": "reduce-overhead"})
    assert config.inductor_options == {
        "triton.cudagraphs": False,
        "triton.unique_kernel_names": True,
        "max_autotune": True,
    }
    assert parse_options({"triton_cudagraphs": True}).inductor_options == {"triton.cudagraphs": True}
    assert "two spellings" in refused({"triton_cudagraphs": True, "triton.cudagraphs": True})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("custom_partitioner_fn", None, "ciuic installs its own"),
        ("max_autotune", "yes", "bool"),
        ("realize_reads_threshold", True, "int"),
        ("cpu_backend", "gcc", "'cpp'"),
        ("triton.cudagraph", True, "did you mean 'triton.cudagraphs'?"),
        ("budgt", 1, "did you mean 'budget'?"),
        ("activation_memory_budget", 0.5, "'budget', in bytes"),
        ("fullgraph", True, "argument of torch.compile"),
        ("zzzzzzzz", 1, ", ".join(OPTION_NAMES)),
        ("", 1, "unknown"),
        (3, 1, "unknown"),
        (None, 1, "unknown"),
    ],
)
def test_wrong_inductor_option(name: Any, value: Any, says: str) -> None:
    message = refused({name: value})
    assert says in message
    assert repr(name) in message or "two spellings" in message


def test_every_default_of_inductor_is_accepted() -> None:
    from torch._inductor import config as inductor_config

    options = {k: v for k, v in inductor_config.get_config_copy().items() if k != "custom_partitioner_fn"}
    assert parse_options(options).inductor_options == options


@pytest.mark.parametrize("mode", ["fastest", "max-autotun", 3, True, "lite"])
def test_wrong_mode_argument_names_both_kinds(mode: Any) -> None:
    message = refused(None, mode)
    assert "'4:1'" in message
    assert "'max-autotune'" in message


@pytest.mark.parametrize("options", [["mode"], "4:1", 3])
def test_options_must_be_a_mapping(options: Any) -> None:
    assert "'options'" in refused(options)


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


@given(
    st.sampled_from(OPTION_NAMES), st.integers() | st.floats() | st.text() | st.binary() | st.just(Broken())
)
def test_any_value_is_accepted_or_refused_with_a_message(name: str, value: object) -> None:
    try:
        parse_options({name: value})
    except OptionError as error:
        message = str(error)
    else:
        return
    assert repr(name) in message


def test_fingerprint_tells_plans_apart_and_ignores_the_report(tmp_path: Path) -> None:
    def of(**options: Any) -> str:
        return parse_options(options).fingerprint()

    different = [
        of(), of(mode="5:1"), of(mode="off"), of(budget=1), of(budget=2), of(max_error=0.1), of(allow="a"),
        of(deny="a"), of(min_bytes=0), of(group_size=32), of(chunk_loss=True), of(chunk_ffn=True),
        of(loss_chunk_bytes=1), of(inductor_mode="max-autotune"),
        of(max_autotune=True), of(post_grad_custom_pre_pass=len), of(post_grad_custom_pre_pass=max),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert of(report="off") == of(report=str(tmp_path / "p.json")) == of()
    assert of(budget="1KiB") == of(budget=1024)
    assert of(deny=["b", "a"]) == of(deny=["a", "b", "a"])
    assert of(mode="4.0:1") == of()
    assert " at 0x" not in of(post_grad_custom_pre_pass=lambda graph: None)
    assert json.loads(of())["schema"] == "ciuic.config/1"


def test_process_wide_default() -> None:
    try:
        assert set_default_config({"mode": "8:1", "budget": "1GiB", "deny": "head"}) is default_config()
        assert parse_options(None).mode == "4:1"
        config = parse_options({"budget": 5}, base=default_config())
        assert (config.mode, config.budget, config.deny) == ("8:1", 5, ("head",))
        assert parse_options({"mode": "off"}, base=default_config()).budget is None
        with pytest.raises(OptionError):
            set_default_config({"mode": "eight"})
        assert default_config().mode == "8:1"
        assert set_default_config(config) == config
    finally:
        assert set_default_config() == CompileConfig()


def test_the_docs_name_every_option_and_their_examples_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Calibration({"graph": GraphCalibration((1.0,), {}, {})}, 1, "2.13.0", "cpu").save("calibration.json")
    named("cpu").save("device.json")
    text = (Path(__file__).parent.parent / "docs" / "options.md").read_text("utf-8")
    examples = re.findall(r"options=(\{[^}]*\})", text)
    assert len(examples) > 10
    for example in examples:
        parse_options(ast.literal_eval(example))
    for name in OPTION_NAMES:
        assert f"`{name}`" in text
        assert any(f'"{name}"' in example for example in examples), name
    assert refused({"mode": "losless"}) in text


def test_base_inductor_mode_can_be_replaced() -> None:
    base = parse_options({"max_autotune_gemm": True}, "max-autotune")
    config = parse_options({"inductor_mode": "reduce-overhead"}, base=base)
    assert config.inductor_options == {"triton.cudagraphs": True, "max_autotune_gemm": True}
