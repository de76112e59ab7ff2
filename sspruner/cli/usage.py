"""One line about wrong usage."""

from __future__ import annotations

from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from sspruner.recipes.yaml import nearest


def usage(error: CycloptsError, app: App) -> str:
    """What is wrong, the nearest name of a misspelt one, and where to read on."""
    chain = list(error.command_chain or _commands(error, app))
    return f"sspruner: {' '.join(_problem(error, app, chain).split())} (see `{' '.join(['sspruner', *chain])} --help`)"


def _problem(error: Any, app: App, chain: list[str]) -> str:
    if isinstance(error, UnknownOptionError):
        option = error.token.keyword or error.token.value
        known = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
        near = nearest(option.partition("=")[0], known)
        return f"no such option: {option}{near if 'did you mean' in near else ''}"
    if isinstance(error, UnknownCommandError):
        for command in chain:
            app = app[command]
        word = (error.unused_tokens or ["?"])[0]
        if word.startswith("-"):
            return f"no such option: {word}"
        return f"no such command: {word}{nearest(word, [name for name in app if not name.startswith('-')])}"
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument {(error.unused_tokens or ['?'])[0]!r}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{error.argument.name} {'is missing' if error.argument.required else 'needs a value'}"
    says = str(error).strip().removesuffix(".")
    return says[:1].lower() + says[1:]


def _commands(error: CycloptsError, app: App) -> list[str]:
    """The commands at the beginning of the line, where the error does not say."""
    found: list[str] = []
    for word in error.root_input_tokens or ():
        if word not in app or word.startswith("-"):
            break
        app = app[word]
        found.append(word)
    return found
