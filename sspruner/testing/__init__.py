"""Conformance kit for plugin authors: one call in a test checks a scorer or a family on random tiny models.

Public names: `check_scorer`, `check_family`, `zoo`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sspruner.errors import install

if TYPE_CHECKING:
    from sspruner.testing.family import check_family
    from sspruner.testing.models import zoo
    from sspruner.testing.scorer import check_scorer

_HOME = {
    "check_family": "sspruner.testing.family",
    "check_scorer": "sspruner.testing.scorer",
    "zoo": "sspruner.testing.models",
}

__all__ = ["check_family", "check_scorer", "zoo"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sspruner.testing' has no attribute {name!r}")
    if find_spec("hypothesis") is None:
        raise ImportError(f"sspruner.testing needs hypothesis, which is not installed: {install('testing')}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
