"""Which lines count as changed: what may make a step grow, and neither renames nor what was only moved."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from ciuic_compile.gate.source_lines import Text, changes, digest, parse, user_files

BEFORE = '''\
"""A model."""
import torch
import torch.nn.functional as F

WIDTH = 512


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)

    def forward(self, x):
        x = self.up(x)
        return F.relu(x)
'''


def known(text: str) -> Text:
    """What a baseline has of a file."""
    return replace(parse(text), lines=(), scopes=(), inert=frozenset())


def changed(*edits: tuple[str, str]) -> list[str]:
    """The lines that count as changed after these edits."""
    text = BEFORE
    for old, new in edits:
        assert text.count(old) >= 1
        text = text.replace(old, new)
    found = changes(known(BEFORE), parse(text))
    return [text.splitlines()[n - 1].strip() for n in sorted(found.changed)]


@pytest.mark.parametrize(
    "edit",
    [
        ("self.up", "self.widen"),
        ("x = self.up(x)\n        return F.relu(x)", "y = self.up(x)\n        return F.relu(y)"),
        ("Block", "Layer"),
        ('"""A model."""', '"""A better\n\nmodel."""'),
        ("        x = self.up(x)\n", '        """What it does."""\n\n        x = self.up(x)  # wider\n'),
        ("import torch\n", "import math\n\nimport torch\n"),
        ("        x = self.up(x)\n", "        assert x.dim() == 3\n        pass\n        x = self.up(x)\n"),
        (
            "        x = self.up(x)\n",
            "        if x is None:\n            raise TypeError\n        x = self.up(x)\n",
        ),
        ("class Block(torch.nn.Module):\n", "class Block(torch.nn.Module):\n\n"),
    ],
)
def test_what_changes_nothing(edit: tuple[str, str]) -> None:
    assert changed(edit) == []


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (("512", "640"), "WIDTH = 640"),
        (("F.relu", "F.silu"), "return F.silu(x)"),
        (("self.up(x)", "self.up(x).float()"), "x = self.up(x).float()"),
        (("(self, width)", "(self, width, scale=8)"), "def __init__(self, width, scale=8):"),
    ],
)
def test_what_may_make_a_step_grow(edit: tuple[str, str], line: str) -> None:
    assert changed(edit) == [line]
    assert changed(edit, ("self.up", "self.widen")) == [line.replace("self.up", "self.widen")]


def test_a_method_that_moved_is_where_it_is_now() -> None:
    start, end = BEFORE.index("    def __init__"), BEFORE.index("    def forward")
    text = BEFORE[:start] + BEFORE[end:] + "\n" + BEFORE[start:end]
    found = changes(known(BEFORE), parse(text))
    assert not found.changed and not found.removed
    before, now = BEFORE.splitlines(), text.splitlines()
    assert len(found.moved) == 10
    assert all(before[old - 1] == now[new - 1] for old, new in found.moved.items())


def test_a_line_that_is_gone_shows_in_what_comes_behind_it() -> None:
    assert changed(("        x = self.up(x)\n", "")) == ["return F.relu(x)"]
    found = changes(known(BEFORE), parse(BEFORE.replace("        x = self.up(x)\n", "")))
    assert found.removed == found.changed


PROGRAM = {
    "train.py": "import sys\nimport torch, plain\nfrom package.part import X\nimport package.deep.er as e\n",
    "plain.py": "def f():\n    import lazy\n    from package import late\n",
    "lazy.py": "import plain\nimport importlib\nimportlib.import_module('named')\n",
    "named.py": "",
    "package/__init__.py": "",
    "package/part.py": "from . import beside\nfrom .deep import around\nfrom missing import x\n",
    "package/late.py": "try:\n    import optional\nexcept ImportError:\n    pass\n",
    "package/beside.py": "",
    "package/deep/__init__.py": "from ..up import y\n",
    "package/deep/er.py": "",
    "package/deep/around.py": "",
    "package/up.py": "import ciuic_compile.config\n",
    "optional.py": "",
    "unused.py": "",
    "package/unused.py": "",
}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules, none of which is loaded."""
    for name, text in PROGRAM.items():
        monkeypatch.delitem(sys.modules, name.partition("/")[0].removesuffix(".py"), raising=False)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


USED = sorted(name for name in PROGRAM if "unused" not in name)


def test_what_a_target_imports_counts_whether_it_is_loaded_or_not(program: Path) -> None:
    before = set(sys.modules)
    assert list(user_files(None, "train.py:make", (), program)) == USED
    assert list(user_files(None, "train:make", (), program)) == USED
    assert list(user_files(None, "package.part:make", ["named.py"], program)) == [
        "named.py", *(name for name in USED if name.startswith("package/") and name not in LATER),
    ]  # fmt: skip
    assert set(sys.modules) == before


LATER = ("package/late.py", "package/deep/er.py")


@pytest.mark.parametrize("name", USED)
def test_an_edit_of_any_of_them_is_seen(program: Path, name: str) -> None:
    before = digest(user_files(None, "train.py:make", (), program))
    (program / name).write_text(PROGRAM[name] + "WIDTH = 512\n")
    assert digest(user_files(None, "train.py:make", (), program)) != before
    (program / name).write_text(PROGRAM[name] + "# a comment\n")
    assert digest(user_files(None, "train.py:make", (), program)) == before


def test_a_module_that_is_loaded_is_the_file_that_was_loaded(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program / "elsewhere").mkdir()
    (program / "elsewhere" / "named.py").write_text("")
    module = ModuleType("named")
    module.__file__ = str(program / "elsewhere" / "named.py")
    monkeypatch.setitem(sys.modules, "named", module)
    found = user_files(None, "train.py:make", (), program)
    assert "elsewhere/named.py" in found and "named.py" not in found


def test_files_outside_of_the_root_have_names_of_their_own(program: Path) -> None:
    root = program / "root"
    root.mkdir()
    (root / "plain.py").write_text("")
    found = user_files(None, "none:make", [str(program / n) for n in USED] + ["plain.py"], root)
    assert len(found) == len(USED) + 1
    assert {"plain.py", f"{program.name}/plain.py", "__init__.py", "deep/__init__.py"} <= set(found)
