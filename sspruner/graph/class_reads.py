"""What the forward of a mixer's class reads, compared with what it read when its family was described.

A layout says which integers a forward reads and a cut changes, and a replaced forward repeats what the stock one does.
Another version of transformers may read something else. So `class_reads.json` holds, for every version that was tested
and every family, the arguments of the forward, the attributes that it reads and the functions that it calls, from its
source, those of the mixer's own parts included; tests/support/class_reads.py writes it.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from sspruner.graph.family import Family
from sspruner.graph.layout import Fold

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Reads:
    """What a forward takes and reads.

    arguments  names of its arguments
    attributes attributes of the mixer, and of its parts with a forward of their own, such as `norm.variance_epsilon`
    calls      functions of its module that it calls
    """

    arguments: frozenset[str]
    attributes: frozenset[str]
    calls: frozenset[str]

    def to_json(self) -> dict[str, str]:
        """Return the names as one line of text for each kind."""
        return {kind: " ".join(sorted(names)) for kind, names in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Reads:
        """Parse what `to_json` returned."""
        return cls(*(frozenset(data[kind].split()) for kind in ("arguments", "attributes", "calls")))


def class_reads(mixer: nn.Module) -> Reads | None:
    """Return what the classes of a mixer and of its parts read; None where their source is not installed.

    Parts are the modules inside the mixer whose class is defined in the same file.
    """
    attributes, calls = set[str](), set[str]()
    for path, module in mixer.named_modules():
        if type(module).__module__ != type(mixer).__module__ and module is not mixer:
            continue
        try:
            found = _names(type(module))
        except (OSError, TypeError, SyntaxError):
            return None
        attributes |= {f"{path}.{name}".lstrip(".") for name in found[0]}
        calls |= found[1]
    arguments = inspect.signature(type(mixer).forward).parameters
    return Reads(frozenset(arguments) - {"self"}, frozenset(attributes), frozenset(calls))


def changes(family: Family, mixer: nn.Module) -> str:
    """Return how a family's installed class differs from all that are recorded, in one line; "" if it does not.

    Unknown is what no recorded version reads, takes or calls; missing is what every one of them reads or takes and a
    cut, or sspruner's calls, set.
    """
    recorded = [families[family.name] for families in known_reads().values() if family.name in families]
    now = class_reads(mixer)
    if not recorded or now is None:
        return ""
    every = [_united(recorded, kind) for kind in ("arguments", "attributes", "calls")]
    parts = [
        _listed("takes the argument", now.arguments - every[0]),
        _listed("reads the attribute", now.attributes - every[1]),
        _listed("calls", now.calls - every[2]),
    ]
    layout = family.layout(mixer)
    written = {*layout.attributes, *(fold.target for fold in layout.folds if _is_number(mixer, fold))}
    always = frozenset.intersection(*(reads.attributes for reads in recorded))
    parts.append(_listed("no longer reads", (written & always) - now.attributes))
    said = [part for part in parts if part]
    return f"{type(mixer).__name__} {' and '.join(said)}; known are those of transformers {_versions()}" if said else ""


@cache
def known_reads() -> dict[str, dict[str, Reads]]:
    """Return what is recorded: version of transformers -> family -> what its class reads."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        version: {name: Reads.from_json(reads) for name, reads in families.items()}
        for version, families in data.items()
    }


def _versions() -> str:
    return ", ".join(known_reads())


def _united(recorded: Iterable[Reads], kind: str) -> frozenset[str]:
    return frozenset().union(*(getattr(reads, kind) for reads in recorded))


def _listed(verb: str, names: Iterable[str]) -> str:
    listed = ", ".join(sorted(names))
    return f"{verb} {listed}" if listed else ""


def _is_number(mixer: Any, fold: Fold) -> bool:
    """Return whether a fold changes a number that the forward reads, and not a tensor."""
    value = mixer
    for name in fold.target.split("."):
        value = getattr(value, name, None)
    return isinstance(value, int | float)


def _names(cls: type) -> tuple[set[str], set[str]]:
    """Return the attributes of self that a class's forward reads, and the functions that it calls.

    Methods that it calls are read with it.
    """
    attributes, calls = set[str](), set[str]()
    todo, seen = ["forward"], set[str]()
    while todo:
        name = todo.pop()
        seen.add(name)
        function: Callable[..., Any] = inspect.unwrap(getattr(cls, name))
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(definition, ast.FunctionDef):
            raise TypeError(f"{cls.__name__}.{name} is no function that was written out")
        tree = ast.Module(definition.body, [])  # without its decorators
        calls |= {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        for attribute in _of_self(tree):
            if inspect.isfunction(getattr(cls, attribute, None)):
                todo += [attribute] if attribute not in seen else []
            else:
                attributes.add(attribute)
    return attributes, calls


def _of_self(tree: ast.AST) -> Iterator[str]:
    """Yield the names X of `self.X` and `getattr(self, "X", ...)` that are read."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Load()):
                yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id="self"), ast.Constant(value=str(name)), *_]
            ):
                yield name
