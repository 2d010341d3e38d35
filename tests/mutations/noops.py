"""Edits that leave what is computed as it was: renames, comments, order, format, annotations, equal rewrites.

Each kind is a function that lists what it could make of a source text; :func:`edits` draws from all of them.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_KEPT = {"make", "forward", "__init__", "self"}  # names that torch or the settings know


@dataclass(frozen=True)
class NoOp:
    """One edit: what kind, where, and the text after it."""

    kind: str
    detail: str
    text: str


def edits(text: str, count: int, seed: int) -> list[NoOp]:
    """``count`` different edits of ``text``, the kinds in turn; equal for equal arguments.

    Raises:
        ValueError: so many do not exist.
    """
    rng = random.Random(seed)
    queues = []
    for kind, made in KINDS.items():
        found = [NoOp(kind, detail, new) for detail, new in made(text)]
        rng.shuffle(found)
        queues.append(found)
    drawn: dict[str, NoOp] = {}
    for edit in itertools.chain.from_iterable(itertools.zip_longest(*queues)):
        if edit is not None and edit.text != text and len(drawn) < count:
            ast.parse(edit.text)
            drawn.setdefault(edit.text, edit)
    if len(drawn) < count:
        raise ValueError(f"{len(drawn)} edits are all there are, not {count}")
    return list(drawn.values())


def all_at_once(text: str, seed: int) -> NoOp:
    """One edit of every kind, one after the other."""
    rng = random.Random(seed)
    done = []
    for kind, made in KINDS.items():
        found = [(detail, new) for detail, new in made(text) if new != text]
        if found:
            detail, text = rng.choice(found)
            done.append(f"{kind}: {detail}")
    return NoOp("all at once", "; ".join(done), text)


Edits = Iterator[tuple[str, str]]


# ---------------------------------------------------------------- names


def _replace(text: str, spans: Iterable[tuple[int, int, int]], new: str) -> str:
    """Put ``new`` in place of (line, column, length) spans."""
    lines = text.splitlines(keepends=True)
    for line, column, length in sorted(set(spans), reverse=True):
        old = lines[line - 1]
        lines[line - 1] = old[:column] + new + old[column + length :]
    return "".join(lines)


def _local_variables(text: str) -> Edits:
    for function in _nodes(text, _FUNCTIONS):
        inner = list(ast.walk(function))
        stored = {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name in sorted(stored):
            spans = [(n.lineno, n.col_offset, len(name)) for n in inner if _is_name(n, name)]
            spans += [(a.lineno, a.col_offset, len(name)) for a in function.args.args if a.arg == name]
            yield f"variable {name} of {function.name}", _replace(text, spans, f"{name}_value")


def _parameters(text: str) -> Edits:
    for function in _nodes(text, _FUNCTIONS):
        keywords = {k.arg for k in _nodes(text, ast.keyword)}
        for argument in function.args.args:
            name = argument.arg
            if name in _KEPT or name in keywords or (name in ("ids", "labels") and "{" in text):
                continue  # called by name
            spans = [(n.lineno, n.col_offset, len(name)) for n in ast.walk(function) if _is_name(n, name)]
            spans.append((argument.lineno, argument.col_offset, len(name)))
            yield f"parameter {name} of {function.name}", _replace(text, spans, f"the_{name}")


def _definitions(text: str) -> Edits:
    for node in ast.parse(text).body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and node.name not in _KEPT:
            yield f"definition {node.name}", re.sub(rf"(?<![\w.]){node.name}\b", f"{node.name}Renamed", text)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            yield f"constant {name}", re.sub(rf"\b{name}\b", f"{name}_RENAMED", text)


def _attributes(text: str) -> Edits:
    attributes = list(_nodes(text, ast.Attribute))
    stored = {n.attr for n in attributes if isinstance(n.ctx, ast.Store) and _is_name(n.value, "self")}
    methods = {n.name for n in _nodes(text, _FUNCTIONS)}
    for name in sorted(stored - methods):
        if all(_is_name(n.value, "self") for n in attributes if n.attr == name):
            yield f"attribute {name}", re.sub(rf"\bself\.{name}\b", f"self.{name}_renamed", text)


def _methods(text: str) -> Edits:
    for owner in _nodes(text, ast.ClassDef):
        for method in owner.body:
            if isinstance(method, _FUNCTIONS) and method.name not in _KEPT:
                yield (
                    f"method {method.name}",
                    re.sub(
                        rf"(?<=self\.){method.name}\b|(?<=def ){method.name}\b", f"do_{method.name}", text
                    ),
                )


# ---------------------------------------------------------------- comments, order, format


def _comments(text: str) -> Edits:
    lines = text.splitlines(keepends=True)
    for node in _statements(text):
        at, indent = node.lineno - 1, " " * node.col_offset
        yield (
            f"comment before line {node.lineno}",
            "".join((*lines[:at], f"{indent}# unchanged, see above\n", *lines[at:])),
        )
        if node.lineno == node.end_lineno:
            line = f"{lines[at].rstrip()}  # as in the paper\n"
            yield f"comment at line {node.lineno}", "".join((*lines[:at], line, *lines[at + 1 :]))


def _blank_lines(text: str) -> Edits:
    lines = text.splitlines(keepends=True)
    for node in _statements(text):
        at = node.lineno - 1
        yield f"blank lines before line {node.lineno}", "".join((*lines[:at], "\n\n\n", *lines[at:]))
    yield "no blank lines", "".join(line for line in lines if line.strip())


def _order(text: str) -> Edits:
    tree = ast.parse(text)
    for body in (tree.body, *(n.body for n in tree.body if isinstance(n, ast.ClassDef))):
        for first, second in itertools.pairwise(body):
            if all(isinstance(n, (*_FUNCTIONS, ast.ClassDef)) for n in (first, second)):
                yield f"lines {first.lineno} and {second.lineno} swapped", _swapped(text, first, second)
    constants = [n for n in tree.body if isinstance(n, ast.Assign)]
    for first, second in itertools.pairwise(constants):
        yield f"constants in lines {first.lineno} and {second.lineno}", _swapped(text, first, second)


def _swapped(text: str, first: ast.stmt, second: ast.stmt) -> str:
    lines = text.splitlines(keepends=True)
    assert first.end_lineno is not None and second.end_lineno is not None
    one = lines[first.lineno - 1 : first.end_lineno]
    between = lines[first.end_lineno : second.lineno - 1]
    two = lines[second.lineno - 1 : second.end_lineno]
    return "".join((*lines[: first.lineno - 1], *two, *between, *one, *lines[second.end_lineno :]))


def _format(text: str) -> Edits:
    tree = ast.parse(text)
    yield "the file by ast.unparse", ast.unparse(tree)
    for node in _statements(text):
        if not isinstance(node, (ast.ClassDef, ast.Import, ast.ImportFrom)):
            for what, new in (("one line", ast.unparse(node)), ("parentheses", _broken(node))):
                if new:
                    yield f"line {node.lineno} in {what}", _with(text, node, new)


def _broken(node: ast.stmt) -> str:
    """An assignment or return with its value on lines of its own."""
    if isinstance(node, ast.Return) and node.value is not None:
        return f"return (\n    {ast.unparse(node.value)}\n)"
    if isinstance(node, ast.Assign):
        return f"{ast.unparse(node.targets[0])} = (\n    {ast.unparse(node.value)}\n)"
    return ""


def _with(text: str, node: ast.stmt, new: str) -> str:
    """The text with other lines for one statement."""
    lines = text.splitlines(keepends=True)
    assert node.end_lineno is not None
    indented = "".join(f"{' ' * node.col_offset}{line}\n" for line in new.splitlines())
    return "".join((*lines[: node.lineno - 1], indented, *lines[node.end_lineno :]))


# ---------------------------------------------------------------- words that say nothing to torch


def _annotations(text: str) -> Edits:
    for function in _nodes(text, _FUNCTIONS):
        spans = [
            (a.lineno, a.col_offset + len(a.arg), 0) for a in function.args.args if a.arg not in ("self",)
        ]
        if spans:
            new = _replace(text, spans, ': "object"')
            yield f"annotations of {function.name} in line {function.lineno}", new
    for node in _statements(text):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            yield (
                f"annotation in line {node.lineno}",
                _with(text, node, f'{name}: "object" = {ast.unparse(node.value)}'),
            )


def _docstrings(text: str) -> Edits:
    lines = text.splitlines(keepends=True)
    for node in _nodes(text, (*_FUNCTIONS, ast.ClassDef)):
        at = node.body[0].lineno - 1
        words = f'{" " * node.body[0].col_offset}"""What it says."""\n'
        yield (
            f"docstring of {node.name} in line {node.lineno}",
            "".join((*lines[:at], words, *lines[at:])),
        )
    yield "the file's docstring", "".join(lines[1:])


def _unused(text: str) -> Edits:
    yield "import", text.replace("import torch\n", "import math\n\nimport torch\n", 1)
    yield "constant", text.replace("from torch import nn\n", "from torch import nn\n\nUNUSED = 3\n", 1)
    yield "function", f"{text}\n\ndef unused(x):\n    return x.float() * 2\n"
    yield (
        "class",
        f"{text}\n\nclass Unused(nn.Linear):\n    def forward(self, x):\n        return x.double()\n",
    )
    for function in _nodes(text, _FUNCTIONS):
        first = function.body[0]
        if function.name == "forward":
            lines = text.splitlines(keepends=True)
            at, indent = first.lineno - 1, " " * first.col_offset
            for what, line in (
                ("assert", "assert self.training or not self.training"),
                ("branch", "if not isinstance(self, nn.Module):\n" + indent + "    raise TypeError"),
                ("pass", "pass"),
            ):
                yield (
                    f"{what} in line {first.lineno}",
                    "".join((*lines[:at], f"{indent}{line}\n", *lines[at:])),
                )


# ---------------------------------------------------------------- equal rewrites

_EQUAL: Final[tuple[tuple[str, str, str], ...]] = (
    ("transpose from the end", r"\.transpose\(1, 2\)", ".transpose(2, 1)"),
    ("torch.relu", r"F\.relu\(", "torch.relu("),
    ("swapped factors", r"\b4 \* width\b", "width * 4"),
    ("swapped factors", r"\bratio \* width\b", "width * ratio"),
    ("swapped factors", r"\b3 \* width\b", "width * 3"),
    ("super with arguments", r"super\(\)\.__init__\(\)", "nn.Module.__init__(self)"),
    ("size for shape", r"\b(\w+)\.shape\[(-?\d)\]", r"\1.size(\2)"),
    ("sum by torch.add", r"(?m)^( +)x = x \+ (.+)$", r"\1x = torch.add(x, \2)"),
    ("sum the other way round", r"image = image \+ branch", "image = branch + image"),
    ("dtype by method", r"\.to\(torch\.bfloat16\)", ".bfloat16()"),
    ("dtype by argument", r"\.bfloat16\(\)", ".to(dtype=torch.bfloat16)"),
    ("flatten by reshape", r"logits\.flatten\(0, 1\)", "logits.reshape(-1, logits.shape[-1])"),
    ("flatten by view", r"\b(targets|labels)\.flatten\(\)", r"\1.reshape(-1)"),
    ("float by to", r"x\.float\(\)", "x.to(torch.float32)"),
    ("square by multiplication", r"\.square\(\)", ".pow(2)"),
    ("module for function", r"F\.silu\(gate\)", "nn.functional.silu(gate)"),
    ("keyword", r"F\.gelu\(hidden\)", "F.gelu(input=hidden)"),
    ("keyword", r"is_causal=True\)", "dropout_p=0.0, is_causal=True)"),
    ("keyword", r"\.softmax\(-1\)", ".softmax(dim=-1)"),
    ("keyword", r"unsqueeze\(-1\)", "unsqueeze(dim=-1)"),
    ("keyword", r"chunk\(2, -1\)", "chunk(2, dim=-1)"),
    ("list for generator", r"nn\.ModuleList\((\w.+ for .+)\)", r"nn.ModuleList([\1])"),
    ("enumerate", r"for (block|layer|stage) in (self\.\w+):", r"for _, \1 in enumerate(\2):"),
    ("call of __call__", r"= (block|layer|stage)\(", r"= \1.__call__("),
    ("mean by keyword", r"mean\(\(2, 3\)\)", "mean(dim=(2, 3))"),
    ("product by torch.mul", r"mixed \* weights\.unsqueeze\(-1\)", "torch.mul(mixed, weights.unsqueeze(-1))"),
    ("negative by method", r"\(-second, first\)", "(second.neg(), first)"),
    ("integer division", r"width // heads", "int(width / heads)"),
)


def _equal(text: str) -> Edits:
    for name, pattern, new in _EQUAL:
        for match in re.finditer(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name} in line {line}", text[: match.start()] + match.expand(new) + text[match.end() :]


def _temporaries(text: str) -> Edits:
    """The value of a return or of an assignment gets a name first, or an argument does."""
    for node in _statements(text):
        if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Name):
            new = f"answer = {ast.unparse(node.value)}\nreturn answer"
            yield f"name for what line {node.lineno} returns", _with(text, node, new)
        if isinstance(node, (ast.Return, ast.Assign)) and isinstance(node.value, ast.Call):
            for argument in node.value.args:
                if isinstance(argument, (ast.Call, ast.BinOp)):
                    outer = ast.unparse(node).replace(ast.unparse(argument), "part", 1)
                    yield (
                        f"name for an argument in line {node.lineno}",
                        _with(text, node, f"part = {ast.unparse(argument)}\n{outer}"),
                    )


def _helpers(text: str) -> Edits:
    """A line of forward moves into a function of its own."""
    for owner in ast.parse(text).body:
        for method in owner.body if isinstance(owner, ast.ClassDef) else ():
            for node in method.body if isinstance(method, _FUNCTIONS) and method.name == "forward" else ():
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
                    known = {
                        "torch",
                        "F",
                        "nn",
                        "checkpoint",
                        "rotary",
                        "rotate",
                        "EXPERTS",
                        "CAPACITY",
                        "int",
                    }
                    given = ", ".join(sorted(names - known))
                    called = _with(text, node, f"{node.targets[0].id} = helper({given})")
                    yield (
                        f"helper for line {node.lineno}",
                        f"{called}\n\ndef helper({given}):\n    return {ast.unparse(node.value)}\n",
                    )


def _nodes(text: str, kinds: type | tuple[type, ...]) -> Iterator[ast.AST]:
    return (n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds))


def _statements(text: str) -> Iterator[ast.stmt]:
    return (n for n in _nodes(text, ast.stmt) if not isinstance(n, (*_FUNCTIONS, ast.For)))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


KINDS: Final[dict[str, Callable[[str], Edits]]] = {
    "variable renamed": _local_variables,
    "parameter renamed": _parameters,
    "definition renamed": _definitions,
    "attribute renamed": _attributes,
    "method renamed": _methods,
    "comment": _comments,
    "blank lines": _blank_lines,
    "order": _order,
    "format": _format,
    "annotation": _annotations,
    "docstring": _docstrings,
    "unused code": _unused,
    "equal rewrite": _equal,
    "temporary": _temporaries,
    "helper": _helpers,
}

#: Kinds after which every line is still there with its comment.
KEEP_COMMENTS: Final = frozenset(
    {
        "variable renamed", "parameter renamed", "definition renamed", "attribute renamed", "comment",
        "order", "docstring", "unused code", "equal rewrite",
    }
)  # fmt: skip
