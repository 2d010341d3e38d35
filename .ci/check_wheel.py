"""Build the wheel, check what is in it, install it in an empty environment and compile a model there.

Run by ``make wheel``. torch and the other dependencies are those of the environment that runs this: the
empty one sees them through a .pth file, ciuic-compile itself only through the wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import sys, torch
assert "ciuic_compile" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
compiled = torch.compile(model, backend="ciuic")
compiled(torch.randn(32, 64)).square().mean().backward()
import ciuic_compile
assert ROOT not in ciuic_compile.__file__, f"the checkout was imported: {ciuic_compile.__file__}"
assert all(p.grad is not None for p in model.parameters())
assert ciuic_compile.plans(), "no plan was made"
print("check_wheel:", ciuic_compile.__file__, "plans:", len(ciuic_compile.plans()))
"""


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a command, or leave with what it said."""
    print("+", *(c if len(str(c)) < 200 else "..." for c in command), flush=True)
    subprocess.run([str(c) for c in command], check=True, cwd=cwd)


def build(out: Path) -> Path:
    """Build the wheel into ``out``, with the setuptools that is here (no network needed).

    From a copy: in the checkout, setuptools would put modules that were deleted since back from ``build/``.
    """
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "ciuic"
        shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
        command = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(out),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (wheel,) = out.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """One top-level module, every package of the tree, the marker for type checkers."""
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    top = {n.split("/")[0] for n in names}
    assert top == {"ciuic_compile"}, f"top-level modules: {sorted(top)}"
    tree = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ciuic_compile").rglob("*.py")}
    tree |= {f"ciuic_compile/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "passes").rglob("*.py")}
    data = [
        p for folder in ("schema", "templates") for p in (ROOT / "ciuic_compile/report" / folder).iterdir()
    ]
    tree |= {p.relative_to(ROOT).as_posix() for p in data}
    missing = sorted((tree | {"ciuic_compile/py.typed"}) - set(names))
    assert not missing, f"not in the wheel: {missing}"
    stray = sorted(n for n in names if n.endswith(".pyc"))
    assert not stray, f"should not be in the wheel: {stray}"
    if util.find_spec("check_wheel_contents"):
        run(sys.executable, "-m", "check_wheel_contents", wheel)


def check_installed(wheel: Path, where: Path) -> None:
    """Install the wheel in an empty environment and train one step there, with no import by the user."""
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(where / "venv")
    python = where / "venv" / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    # dependencies by path, without following the checkout's own editable install (a .pth there)
    paths = dict.fromkeys([sysconfig.get_path("purelib"), *_hosted()])
    Path(site, "dependencies.pth").write_text("\n".join(paths) + "\n")
    run(python, "-I", "-c", CODE.replace("ROOT", repr(str(ROOT) + "/ciuic_compile")), cwd=where)


def _hosted() -> list[str]:
    """Where torch lies, if not in this environment itself (`.ci/setup` builds upon such a torch)."""
    spec = util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return [str(Path(spec.origin).parent.parent)]


def main() -> None:
    """Build, look inside, install, run."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder) / "dist")
        check_contents(wheel)
        check_installed(wheel, Path(folder))
    print("check_wheel: ok")


if __name__ == "__main__":
    main()
