"""What a command plans: a function of the user's that makes a model, or a Hugging Face configuration."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import hugging_face
from .errors import TargetError, nearest
from .planning import user_frame
from .weightless import weightless

_VALID = (
    "package.module:function or path/to/file.py:function, which returns (model, example_inputs) or "
    "(model, example_inputs, loss_fn); a folder with a Hugging Face config.json; "
    "transformers.NAMEConfig"
)


@dataclass(frozen=True)
class Target:
    """A model and what it is called with.

    Attributes:
        name: as the user wrote it.
        model: the module.
        inputs: a batch, as :func:`ciuic_compile.planning.plan` takes it.
        loss_fn: computes the loss; None: the model alone is the step.
    """

    name: str
    model: nn.Module
    inputs: Any
    loss_fn: Callable[..., Tensor] | None = None


def load(
    name: str, shape: hugging_face.Shape | None = None, *, allocate: torch.device | None = None
) -> Target:
    """Make the model that a command line names.

    Args:
        name: ``package.module:function``, ``path/to/file.py:function``, a folder with ``config.json``, or the
            name of one of transformers' configuration classes (``transformers.LlamaConfig``).
        shape: batch, sequence length and dtype of a Hugging Face model; a function has its own.
        allocate: a device on which the model is really made, in order to run; None: parameters
            take no memory, and what the function does to their values is not done.

    Raises:
        TargetError: nothing of that name, an error in the user's code (in which line), a function that
            returns something else, or a ``shape`` for a function.
    """
    where, colon, function_name = name.rpartition(":")
    if not colon or (os.sep in function_name):
        if hugging_face.is_config(name):
            return Target(name, *hugging_face.build(name, shape or hugging_face.Shape(), allocate))
        raise _not_a_target(name)
    if shape is not None and shape != hugging_face.Shape():
        raise TargetError(
            f"target {name!r}: --batch, --seq and --dtype are for Hugging Face configurations\n"
            f"  fix: leave them out; {function_name} says what its example inputs are"
        )
    function = _function(name, _module(name, where), function_name)
    context: AbstractContextManager[Any] = weightless() if allocate is None else nullcontext()
    try:
        with context:
            made = function()
    except (Exception, SystemExit) as error:  # sys.exit(0) there is no verdict
        raise _failed(name, f"{function_name}() failed", error) from error
    return _checked(name, function_name, made)


def _not_a_target(name: str) -> TargetError:
    path = Path(name)
    fix = "name the function: FILE.py:FUNCTION or MODULE:FUNCTION"
    if path.suffix == ".py" and path.is_file():
        names = re.findall(r"^def (\w+)\(", path.read_text("utf-8", "replace"), re.MULTILINE)
        fix = f"name the function: {name}:{names[0] if names else 'make_model'}"
    elif path.is_dir():
        fix = "a Hugging Face folder has a config.json; this one has none"
    return TargetError(f"target {name!r}: no such target\n  valid: {_VALID}\n  fix: {fix}")


def _module(name: str, where: str) -> ModuleType:
    """The user's module, by path or by name; the current folder is on the path, as for ``python -m``."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if where.endswith(".py") or os.sep in where:
            return _from_file(name, Path(where))
        return importlib.import_module(where)
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            path = f"{where.replace('.', os.sep)}.py"
            raise TargetError(
                f"target {name!r}: no module named {error.name!r}\n  valid: {_VALID}\n"
                f"  fix: run from the folder that has {path}, or install the package"
            ) from error
        raise _failed(name, f"{where} cannot be imported", error) from error
    except (Exception, SystemExit) as error:
        raise _failed(name, f"{where} cannot be imported", error) from error


def _from_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise TargetError(
            f"target {name!r}: no file {str(path)!r}{nearest(path.name, others)}\n  valid: {_VALID}\n"
            f"  fix: correct the path; the current folder is {os.getcwd()!r}"
        )
    # A name of its own: another module of that name stays, and Dynamo, which finds globals by their module's
    # name, never meets an older version of the file.
    number = itertools.count(2)
    module_name = path.stem
    while module_name in sys.modules:
        module_name = f"{path.stem}_{next(number)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"target {name!r}: {str(path)!r} is no Python file\n  fix: name a .py file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as for `python FILE.py`
        sys.path.insert(0, folder)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _function(name: str, module: ModuleType, function_name: str) -> Callable[[], Any]:
    function = getattr(module, function_name, None)
    if function is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise TargetError(
            f"target {name!r}: {module.__name__} has no function {function_name!r}"
            f"{nearest(function_name, public)}\n  valid: a function without arguments, which returns "
            "(model, example_inputs) or (model, example_inputs, loss_fn)\n  fix: correct the name"
        )
    if not callable(function):
        raise TargetError(
            f"target {name!r}: {function_name} is a {type(function).__name__}, no function\n"
            "  fix: name a function that returns (model, example_inputs)"
        )
    return function  # type: ignore[no-any-return]


def _checked(name: str, function_name: str, made: Any) -> Target:
    def wrong(what: str, fix: str) -> TargetError:
        return TargetError(
            f"target {name!r}: {function_name}() returned {what}\n"
            f"  valid: (model, example_inputs) or (model, example_inputs, loss_fn)\n  fix: {fix}"
        )

    if not isinstance(made, tuple) or not 2 <= len(made) <= 3:
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise wrong(what, "return the model and the inputs to call it with, as a tuple")
    model, inputs, loss_fn = (*made, None)[:3]
    if not isinstance(model, nn.Module):
        raise wrong(f"a {type(model).__name__} as the model", "return the nn.Module first")
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    leaves = torch.utils._pytree.tree_leaves(inputs)
    if not isinstance(inputs, (Tensor, tuple, list, dict)) or not any(isinstance(x, Tensor) for x in leaves):
        raise wrong(
            f"inputs without a tensor (a {type(inputs).__name__})",
            "give a tensor, a tuple of them, or a dict of keyword arguments: what the model is called with",
        )
    if loss_fn is not None and not callable(loss_fn):
        raise wrong(f"a {type(loss_fn).__name__} as loss_fn", "return a function of the model's output")
    return Target(name, model, inputs, loss_fn)


def _failed(name: str, what: str, error: BaseException) -> TargetError:
    said = " ".join(str(error).split())[:500]
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno} ({(error.text or '').strip()})"
        said = str(error.msg)
    else:
        where = user_frame(error)
    at = f"\n  at: {where}" if where else ""
    return TargetError(
        f"target {name!r}: {what}: {type(error).__name__}: {said}{at}\n"
        "  fix: mend that line; --traceback shows how it was reached"
    )
