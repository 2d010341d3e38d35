"""What gets installed: every package, one top-level module, an entry point that needs no import."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ciuic_compile

ROOT = Path(__file__).resolve().parent.parent
tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def load_check_wheel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_of_the_tree_is_listed() -> None:
    inside = {p.parent.relative_to(ROOT) for p in (ROOT / "ciuic_compile").rglob("__init__.py")}
    names = {".".join(p.parts) for p in inside} | {"ciuic_compile.passes"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"ciuic_compile.passes": "passes"}


def test_passes_is_one_folder_under_one_name() -> None:
    import ciuic_compile.passes as passes

    assert (ROOT / "ciuic_compile" / "passes").resolve() == ROOT / "passes"
    assert passes.__name__ == "ciuic_compile.passes"
    assert Path(passes.__file__ or "").resolve().parent == ROOT / "passes"


def test_importing_passes_by_its_folder_is_banned() -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--stdin-filename",
        "ciuic_compile/x.py",
        "-",
    ]
    wrong = subprocess.run(
        command,
        input="import passes\n\nprint(passes)\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 1
    assert "TID251" in wrong.stdout
    right = "from ciuic_compile import passes\n\nprint(passes)\n"
    done = subprocess.run(command, input=right, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_package_imports_is_declared() -> None:
    declared = {re.split(r"[<>=\[; ]", d)[0] for d in PROJECT["project"]["dependencies"]}
    allowed = declared | {"ciuic_compile", "triton"} | set(sys.stdlib_module_names)  # torch brings Triton
    files = [*(ROOT / "ciuic_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    assert len(files) > 10
    for file in files:
        plugin = {"pytest"} if file.name == "pytest_plugin.py" else set()  # pytest loads it: it is there
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            unknown = {n.split(".")[0] for n in names} - allowed - plugin
            assert not unknown, (
                f"{file.relative_to(ROOT)} imports {unknown}, which pyproject.toml does not declare"
            )


def test_version_is_the_same_everywhere() -> None:
    assert ciuic_compile.__version__ == PROJECT["project"]["version"]
    assert f"## {ciuic_compile.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_is_in_the_declared_range() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    (torch,) = (d for d in PROJECT["project"]["dependencies"] if d.startswith("torch"))
    assert requirements.Requirement(torch).specifier.contains(metadata.version("torch").split("+")[0])
    pins = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    (pinned,) = (p for p in pins if p.startswith("torch=="))
    assert requirements.Requirement(torch).specifier.contains(pinned.removeprefix("torch=="))


def test_backend_is_found_with_no_import() -> None:
    installed = metadata.entry_points(group="torch_dynamo_backends", name="ciuic")
    if not installed:
        pytest.skip("ciuic-compile is not installed here, only importable")
    code = (
        "import sys, torch\n"
        "assert 'ciuic' in torch._dynamo.list_backends()\n"
        "assert 'ciuic_compile' not in sys.modules\n"
        "torch._dynamo.lookup_backend('ciuic')\n"
        "assert 'ciuic_compile.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("build", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    if tuple(int(n) for n in metadata.version("setuptools").split(".")[:1]) < (77,):
        pytest.skip("setuptools is older than 77")
    path: Path = load_check_wheel().build(tmp_path_factory.mktemp("wheel"))
    return path


@pytest.mark.slow
def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    load_check_wheel().check_contents(wheel)
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert (
        "[torch_dynamo_backends]\nciuic = ciuic_compile.backend:ciuic" in archive.read(entry_points).decode()
    )


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a stray module", "no marker for type checkers", "a pass left out"])
def test_a_wrong_wheel_is_refused(wheel: Path, tmp_path: Path, change: str) -> None:
    broken = tmp_path / wheel.name
    left_out = {
        "no marker for type checkers": "ciuic_compile/py.typed",
        "a pass left out": "ciuic_compile/passes/insert_codecs.py",
    }.get(change)
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(broken, "w") as target:
        assert left_out is None or left_out in source.namelist()
        for name in source.namelist():
            if name != left_out:
                target.writestr(name, source.read(name))
        if left_out is None:
            target.writestr("passes/__init__.py", "")
    with pytest.raises(AssertionError, match=left_out or "top-level modules"):
        load_check_wheel().check_contents(broken)


def test_make_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [line.split()[1] for line in listed.stdout.splitlines()]
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(rules)
    assert {"demo", "test", "lint", "types", "wheel", "docs-test", "bench"} <= set(names)
    assert all(len(line.split()) > 3 for line in listed.stdout.splitlines()), "each with a line about it"
