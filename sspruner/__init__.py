"""sspruner: structured pruning of state-space language models. The public names, and nothing else.

They are listed in `__init__.pyi` and loaded on first use, so that `import sspruner` and `sspruner --help` do not import
torch.
"""

import warnings
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

#: Names of the version before, until the next minor one.
_RENAMED = {"evaluate_model": "evaluate", "write_report": "report"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"sspruner.{name} is now sspruner.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return _attribute(_RENAMED.get(name, name))
