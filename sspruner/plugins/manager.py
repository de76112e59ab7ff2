"""Find plugins: entry points of the group `sspruner`, built-ins included, and files given with --plugin."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from sspruner.errors import InputError, PluginError
from sspruner.plugins import hookspecs

if TYPE_CHECKING:
    pass


@cache
def plugin_manager() -> pluggy.PluginManager:
    """Return the process's plugin manager, with every installed plugin registered under its entry point's name."""
    manager = pluggy.PluginManager("sspruner")
    manager.add_hookspecs(hookspecs)
    for entry in sorted(entry_points(group="sspruner"), key=lambda e: e.name):
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; the error names it
            raise PluginError(
                f"plugin {entry.name!r} ({entry.value}): import failed: {_brief(error)}; fix or uninstall it"
            ) from error
        _register(manager, module, entry.name)
    return manager


def load_file(path: str | Path) -> str:
    """Register the plugin in a Python file and return its name, the path. Loading it again does nothing.

    Raises InputError for a missing file, PluginError if it cannot be imported or implements no hook.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise InputError(f"--plugin {path}: no such file")
    manager, name = plugin_manager(), str(path)
    if manager.has_plugin(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]  # two files may have one name
    spec = importlib.util.spec_from_file_location(f"sspruner_plugin_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {name}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise PluginError(f"plugin {name}: import failed: {_brief(error)}") from error
    _register(manager, module, name)
    return name


def _register(manager: pluggy.PluginManager, module: Any, name: str) -> None:
    try:
        manager.register(module, name=name)
    except (pluggy.PluginValidationError, ValueError) as error:
        if isinstance(error, pluggy.PluginValidationError) and manager.is_registered(module):  # older pluggy
            manager.unregister(module)
        raise PluginError(f"plugin {name!r}: {_brief(error)}") from error
    callers = manager.get_hookcallers(module) or []
    unknown = [caller.name for caller in callers if not caller.has_spec()]
    if unknown or not callers:
        manager.unregister(module)
        hooks = ", ".join(n for n in vars(hookspecs) if n.startswith("sspruner_"))
        problem = f"there is no hook {unknown[0]!r}" if unknown else "implements no hook"
        raise PluginError(f"plugin {name!r}: {problem}; decorate one of {hooks} with @sspruner.hookimpl")


def collect(hook_name: str) -> list[tuple[Any, str]]:
    """Return (object, plugin name) for everything that the plugins return from one hook."""
    collected = []
    for impl in getattr(plugin_manager().hook, hook_name).get_hookimpls():
        try:
            items = list(impl.function())
        except Exception as error:
            raise PluginError(f"plugin {impl.plugin_name!r}: {hook_name} failed: {_brief(error)}") from error
        collected += [(item, impl.plugin_name) for item in items]
    return collected


def _brief(error: BaseException) -> str:
    """Return the type of an error and its message, on one line."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def __getattr__(name: str) -> Any:
    """Resolve old names of the registries until the next minor version, as docs/plugins.md promised."""
    homes = {
        "families": ("sspruner.graph.known", "installed_families"),
        "scorers": ("sspruner.scoring.known", "installed_scorers"),
        "scorer": ("sspruner.scoring.known", "find_scorer"),
        "scorer_of_basis": ("sspruner.scoring.known", "scorer_of_basis"),
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, new = homes[name]
    warnings.warn(f"sspruner.plugins.manager.{name} is now {module}.{new}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(module), new)
