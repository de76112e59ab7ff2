"""The list of deliberate faults: read it, check it against the code, write a fault into a copy of the project."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("faults.toml")
AREAS = ("surgery", "folds", "proof", "budgets", "scoring", "calibration", "evaluation", "io", "records")


class ListError(Exception):
    """The list does not fit the code or the tests; the message says where."""


@dataclass(frozen=True)
class Fault:
    """One deliberate fault.

    Args:
        name: what is wrong, in a few words.
        area: one of AREAS.
        file: path from the root of the project.
        old: text that occurs exactly once in the file.
        new: the text that replaces it.
        tests: fast tests that are expected to catch it, `basename::function` each.
        caught_before: whether the tests caught it before the redesign of issue 20.
    """

    name: str
    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    caught_before: bool

    def problem(self, root: Path = ROOT) -> str:
        """Say why the fault cannot be written into the project at `root`; "" if it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.name}: there is no file {self.file}"
        count = path.read_text(encoding="utf-8").count(self.old)
        return "" if count == 1 else f"{self.name}: its text occurs {count} times in {self.file}, not once"

    def write(self, root: Path) -> str:
        """Write the fault into the copy of the project at `root`. Return the file's text without it."""
        path = root / self.file
        if why := self.problem(root):
            raise ListError(why)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


def load_faults(path: Path = LIST) -> list[Fault]:
    """Read the list."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    return [Fault(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def find_tests(names: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Find `basename::function` in tests/, wherever the files lie: name -> node id.

    A function that has moved to another file is found there. Raises ListError where there is none, or more than one.
    """
    defined: dict[str, list[Path]] = {}
    for file in sorted((root / "tests").rglob("test_*.py")):
        for function in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M):
            defined.setdefault(function, []).append(file)
    found = {}
    for name in names:
        basename, _, function = name.partition("::")
        files = defined.get(function, [])
        files = [file for file in files if file.name == basename] or files
        if len(files) != 1:
            raise ListError(f"{name}: {len(files)} test files define {function}")
        found[name] = f"{files[0].relative_to(root).as_posix()}::{function}"
    return found
