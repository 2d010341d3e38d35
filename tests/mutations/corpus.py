"""Seeded regressions of corpus.toml: edits of the models beside it that make training need more memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE: Final = Path(__file__).parent
FOLDER: Final = HERE / "models"


@dataclass(frozen=True)
class Regression:
    """One edit that needs more memory.

    Attributes:
        name: what was done, unique.
        entry: of models/ciuic.toml, that is to be flagged.
        file: of models/, that is edited.
        edits: (old text, new text) in order; each old text occurs exactly once.
        culprit: parts of lines of the entry's model that are a right answer beside the edit's own lines.
    """

    name: str
    entry: str
    file: str
    edits: tuple[tuple[str, str], ...]
    culprit: tuple[str, ...] = ()

    def apply(self, text: str) -> str:
        """The edited text.

        Raises:
            ValueError: an old text is not there exactly once.
        """
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} is {text.count(old)} times in {self.file}, not once")
            text = text.replace(old, new)
        return text

    def right_answers(self, files: dict[str, str]) -> set[tuple[str, int]]:
        """Where the culprit may rightly be said to be: (file, line) of the edited files.

        Args:
            files: texts of models/ by name, before the edit.

        Raises:
            ValueError: a culprit is not the part of exactly one line.
        """
        edited = {**files, self.file: self.apply(files[self.file])}
        known = set(files[self.file].splitlines())
        lines = edited[self.file].splitlines()
        right = {(self.file, n) for n, line in enumerate(lines, 1) if line.strip() and line not in known}
        if not right:  # lines were removed: where they were
            gone = next(n for n, line in enumerate(files[self.file].splitlines()) if line != lines[n])
            right = {(self.file, next(n + 1 for n in range(gone, len(lines)) if lines[n].strip()))}
        model = next(name for name in files if name.endswith(".py") and self.entry.startswith(name[:-3]))
        for part in self.culprit:
            texts = {file: edited[file].splitlines() for file in (self.file, model)}
            found = [(file, n) for file in texts for n, line in enumerate(texts[file], 1) if part in line]
            if len(found) != 1:
                raise ValueError(f"{self.name}: {part!r} is in {found}, not in one line")
            right.add(found[0])
        return right


def files() -> dict[str, str]:
    """The folder models/: text by file name."""
    return {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.*"))}


def _read() -> tuple[Regression, ...]:
    with open(HERE / "corpus.toml", "rb") as file:
        tables: list[dict[str, Any]] = tomllib.load(file)["regression"]
    return tuple(
        Regression(
            f"{table['entry']}: {table['name']}",
            table["entry"],
            table.get("file", f"{table['entry']}.py"),
            tuple((edit["old"], edit["new"]) for edit in table["edit"]),
            tuple(table.get("culprit", ())),
        )
        for table in tables
    )


REGRESSIONS: Final = _read()
