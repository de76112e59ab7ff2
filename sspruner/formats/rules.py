"""Rules of runtimes: one condition each, on the sizes of a mixer or on a field of the model's config.

The table is targets.toml, which documents the fields.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is not needed to read the table
    from sspruner.graph.layout import Layout, Size

TABLE = Path(__file__).with_name("targets.toml")
LEVELS = ("must", "slow", "memory", "note")
HOW = {"run": "ran with", "read": "read in", "claimed": "claimed for"}  # how a rule is known


@dataclass(frozen=True)
class Rule:
    """One condition: on a quantity `of` every mixer or mixture of experts, on a `field` of the config, or never met."""

    why: str
    of: str = ""
    one_of: tuple[int, ...] = ()
    most: int = 0
    multiple: int | str = 1
    twice: str = ""
    equals: str = ""
    powers: int = 0
    shards: str = ""
    field: str = ""
    values: tuple[Any, ...] = ()
    items: tuple[str, ...] = ()
    same: str = ""
    given: bool = False
    when: str = ""
    models: tuple[str, ...] = ()
    level: str = "must"
    backends: tuple[str, ...] = ()
    writer: str = ""
    checked: str = ""
    how: str = "read"

    def holds(self, layout: Layout, tp: int) -> bool:
        """Return whether a module's quantity meets the condition, which is also the case if it lacks the quantity."""
        n, other = quantity(self.of, layout), self.twice or self.equals or self.multiple
        beside = quantity(other, layout) if isinstance(other, str) else other
        if n is None or beside is None:
            return True
        return (
            (not self.one_of or n in self.one_of)
            and (not self.most or n <= self.most)
            and (n == (2 if self.twice else 1) * beside if self.twice or self.equals else n % beside == 0)
            and (not self.powers or (n >= self.powers and n & (n - 1) == 0))
            and (not self.shards or _splits(n, tp, self.shards))
        )

    def allows(self, config: Any) -> bool:
        """Return whether a config meets the condition, which is also the case if `when` is not set in it."""
        if self.when and not value_of(self.when, config):
            return True
        value = value_of(self.field, config) if self.field else None
        if self.given or not self.field:
            return value is not None
        return value is None or (
            (not self.values or value in self.values)
            and (not self.items or all(item in self.items for item in value))
            and (not self.same or value == value_of(self.same, config))
        )

    def touches(self, axes: Sequence[str]) -> bool:
        """Return whether a cut of these axes changes the quantity."""
        return any(dim in axes for term in quantities()[self.of][0] for dim in term)

    @property
    def known(self) -> str:
        """Say how and in which version the rule was found: `ran with 0.32.0`."""
        return f"{HOW[self.how]} {self.checked}"


@cache
def table() -> dict[str, Any]:
    """Return the content of targets.toml."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@cache
def quantities() -> dict[str, tuple[Size, str]]:
    """Return name -> (a sum of products of dimensions, description)."""
    return {name: (tuple(map(tuple, q["sizes"])), q["says"]) for name, q in table()["quantities"].items()}


def rules_of(row: dict[str, Any]) -> tuple[Rule, ...]:
    """Return the rules of one target's row; those without `checked` and `how` have the row's."""
    common = {"checked": row["checked"], "how": row["how"]}
    return tuple(Rule(**{key: _frozen(value) for key, value in (common | rule).items()}) for rule in row["rules"])


def quantity(name: str, layout: Layout) -> int | None:
    """Return a quantity of a module; None if it lacks one of the dimensions."""
    size, _ = quantities()[name]
    return layout.stock_total(size) if all(dim in layout.sizes for term in size for dim in term) else None


def value_of(field: str, config: Any) -> Any:
    """Return a field of a config, `a.b` for key b of the dict a, with tuples for lists; None if there is none."""
    value = config
    for key in field.split("."):
        value = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
    return _frozen(value)


def said(rule: Rule, subject: Any) -> str:
    """Describe a rule that a module (its layout) or a config breaks."""
    if rule.of:
        return f"{quantities()[rule.of][1]} {quantity(rule.of, subject)}: {rule.why}"
    if rule.field and not rule.given:
        value = value_of(rule.field, subject)
        other = sorted(set(value) - set(rule.items)) if rule.items else value
        return f"{rule.field} {', '.join(other) if rule.items else _shown(other)}: {rule.why}"
    return rule.why


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).replace("True", "true").replace("False", "false")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _splits(n: int, tp: int, shards: str) -> bool:
    if shards == "none":
        return tp == 1
    return n % tp == 0 or (shards == "even or one" and n == 1) or (shards == "even or spread" and tp % n == 0)
