"""Run one part of parts.yaml and print its tables: an experiment of recipes/, or a study.

    python benchmarks/run.py damage --data ../shared/data
    python benchmarks/run.py joint --quick
    python benchmarks/run.py reference --set 'models=[mamba2-books-4m]'

WORK in a setting is the work folder. `--set` changes any setting of the part; its value is YAML.
"""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """One section of a page between its marks, or (trains) a model that other parts need.

    recipe, study: what makes it: a file of recipes/, or a module of studies/. quick: other settings, to see that it
    runs. after: parts whose files it needs. timed: runs alone. drawn: a picture shows its numbers.
    """

    name: str
    recipe: str = ""
    study: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    page: str = "benchmarks.md"
    timed: bool = False
    large: bool = False
    drawn: bool = False
    trains: bool = False
    gpu: bool = False
    after: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The file that makes it."""
        return HERE / (f"recipes/{self.recipe}.yaml" if self.recipe else f"studies/{self.study}.py")


def read_parts() -> dict[str, Part]:
    """Return the parts of parts.yaml, by name and in their order."""
    found = yaml.safe_load((HERE / "parts.yaml").read_text(encoding="utf-8"))
    return {name: Part(name, **{"after": ()} | data) for name, data in found.items()}


def main() -> None:
    """Run a part with its settings."""
    parts = read_parts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the texts")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/sspruner-bench"), help="folder of what is kept")
    parser.add_argument("--quick", action="store_true", help="a little of it, to see that it runs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: the part's, else torch's")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting. Repeatable")
    given = parser.parse_args()
    part = parts[given.part]
    settings = part.settings | (part.quick if given.quick else {})
    settings |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given.set)}
    settings = {k: v.replace("WORK", str(given.work)) if isinstance(v, str) else v for k, v in settings.items()}
    import torch
    from common import provenance

    if threads := given.threads or settings.pop("threads", None):
        torch.set_num_threads(threads)
    given.work.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module("experiment" if part.recipe else f"studies.{part.study}")
    base = {"file": part.file, "data": given.data, "work": given.work, "quick": given.quick}
    text, note, numbers = module.tables(SimpleNamespace(**base, **settings))
    print(f"{text}\n\n{provenance(note)}")
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
