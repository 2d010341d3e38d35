"""``ciuic.toml``: what it says, and what is said where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciuic_compile.errors import SettingsError
from ciuic_compile.gate.settings import Allowance, load

ENTRY = '[[entry]]\nname = "a"\ntarget = "m.py:f"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "ciuic.toml"
    path.write_text(text)
    return path


def test_an_entry_takes_defaults_and_overrides_them(tmp_path: Path) -> None:
    text = """
[ciuic]
device = "h200"
mode = "2:1"
baseline = "ci/base.json"
max_increase = ["2%", "10 MiB"]
options = { min_bytes = 4096 }

[[entry]]
name = "a"
target = "m.py:f"

[[entry]]
name = "b"
target = "folder"
mode = "lossless"
batch = 4
options = { deny = "head" }
max_increase = "1 GiB"
max_time_increase = ["5%", "2 ms"]
hard_limit = "70 GiB"
max_error = 0.05
"""
    settings = load(write(tmp_path, text))
    a, b = settings.entries
    assert settings.baseline == tmp_path / "ci" / "base.json"
    assert (a.device, a.options, a.line) == ("h200", {"mode": "2:1", "min_bytes": 4096}, 10)
    assert b.options == {"mode": "lossless", "min_bytes": 4096, "deny": "head"} and b.shape == {"batch": 4}
    assert a.limits.max_increase == Allowance(0.02, 10 * 2**20)
    assert b.limits.max_increase == Allowance(None, 2**30) and b.limits.hard_limit == 70 * 2**30
    assert b.limits.max_time_increase == Allowance(0.05, 2000.0) and b.limits.max_error == 0.05


def test_the_smaller_allowance_counts() -> None:
    both = Allowance(0.01, 64)
    assert (both.of(100), both.of(100_000)) == (1.0, 64)
    assert Allowance().of(5) == float("inf")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[ciuic\n", None, "not valid TOML"),
        (ENTRY + "modee = 1\n", 4, "did you mean 'mode'?"),
        ("[ciuic]\nmax_increse = 1\n" + ENTRY, 2, "did you mean 'max_increase'?"),
        ("[cuic]\n" + ENTRY, 1, "did you mean 'ciuic'?"),
        (ENTRY + '[[entry]]\nname = "b"\n', 4, "target is missing"),
        (ENTRY + ENTRY, 5, "taken by another entry"),
        (ENTRY + 'mode = "5:2"\n', 4, "'R:1' with R >= 1"),
        (ENTRY + 'max_increase = "2 parsecs"\n', 4, "'2%' or '64 MiB'"),
        (ENTRY + 'max_increase = ["2%", "3%"]\n', 4, "one share in percent, one amount"),
        (ENTRY + 'max_time_increase = "3 MiB"\n', 4, "'5%' or '2 ms'"),
        (ENTRY + "max_error = 0\n", 4, "a number above 0"),
        (ENTRY + 'hard_limit = "much"\n', 4, "'12 GiB'"),
        (ENTRY + 'device = "h300"\n', 4, "no profile has that name"),
        (ENTRY + 'autocast = "int8"\n', 4, "'bfloat16' or 'float16'"),
        (ENTRY + "batch = 0\n", 4, "a whole number above 0"),
        (ENTRY + 'dtype = "bfloat1"\n', 4, "did you mean 'bfloat16'?"),
        (ENTRY + "options = { nonsense = 1 }\n", 4, "nonsense"),
        (ENTRY + 'options = { report = "full" }\n', 4, "--format says it"),
        ('[ciuic]\nenvironment = "wran"\n' + ENTRY, 2, "did you mean 'warn'?"),
        ('[entry]\nname = "a"\n', 1, "two brackets"),
        ("", None, "has no [[entry]]"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}:" if line else str(path))


def test_a_missing_file_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\[\[entry\]\]"):
        load(tmp_path / "ciuic.toml")


def test_an_unknown_name_is_told_with_the_nearest(tmp_path: Path) -> None:
    settings = load(write(tmp_path, ENTRY.replace('"a"', '"llama"')))
    assert [e.name for e in settings.chosen([])] == ["llama"]
    with pytest.raises(SettingsError, match="did you mean 'llama'"):
        settings.chosen(["lama"])
