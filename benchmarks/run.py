"""Run one part of parts.yaml and print its tables: an experiment of recipes/, or a study.

    python benchmarks/run.py reference --data ../shared/data --quick --set 'models=[mamba2-books-4m]'

WORK in a setting is the work folder. `--set` changes any setting of the part; its value is YAML.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """One section of a page between its marks, or (trains) a model that other parts need.

    recipe, study: what makes it: a file of recipes/, and a module of studies/ or else tables.py. quick: other settings,
    to see that it runs. after: parts whose files it needs. timed: runs alone.
    """

    name: str
    recipe: str = ""
    study: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    timed: bool = False
    large: bool = False
    trains: bool = False
    gpu: bool = False
    after: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """Return the recipe and the study that make it."""
        study = self.study.partition(".")[0]
        found = {f"recipes/{self.recipe}.yaml": self.recipe, f"studies/{study}.py": study}
        return [HERE / file for file, name in found.items() if name]

    @property
    def function(self) -> Callable[[Any], Any]:
        """Return the function that makes it: `tables` of its study, unless that names another, or of tables.py."""
        study, _, name = self.study.partition(".")
        module = import_module(f"studies.{study}" if study else "tables")
        return getattr(module, name or "tables")  # type: ignore[no-any-return]


def read_parts() -> dict[str, Part]:
    """Return the parts of parts.yaml, by name and in their order."""
    found = yaml.safe_load((HERE / "parts.yaml").read_text(encoding="utf-8"))
    return {name: Part(name, **{"after": ()} | data) for name, data in found.items()}


def arguments(about: str) -> argparse.ArgumentParser:
    """Return a parser of what run.py and all.py share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the texts")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/sspruner-bench"), help="folder of what is kept")
    parser.add_argument("--quick", action="store_true", help="a little of it, to see that it runs")
    return parser


def provenance(note: str) -> str:
    """Return the command that runs, the date, the machine, the versions, and `note` (seeds, repeats)."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sspruner"))
    return (
        f"`{command}` · {datetime.date.today()} · {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} torch threads · Python {platform.python_version()}, {versions} · {note}"
    )


def main() -> None:
    """Run a part with its settings."""
    parts, parser = read_parts(), arguments(str(__doc__))
    parser.add_argument("part", choices=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting. Repeatable")
    given = parser.parse_args()
    part = parts[given.part]
    settings = part.settings | (part.quick if given.quick else {})
    settings |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given.set)}
    work = given.work / "quick" if given.quick else given.work  # a model of a few steps takes no other's place
    settings = {k: v.replace("WORK", str(work)) if isinstance(v, str) else v for k, v in settings.items()}
    if threads := settings.pop("threads", None):
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    base = {"file": part.files[0], "data": given.data, "work": work, "quick": given.quick}
    made, note = part.function(SimpleNamespace(**base, **settings))
    print("\n".join([*made, "", provenance(note)]))


if __name__ == "__main__":
    main()
