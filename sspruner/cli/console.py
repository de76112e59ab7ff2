"""Shared by all commands: one-line errors, output streams, quiet libraries."""

from __future__ import annotations

import functools
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sspruner.errors import InputError, Remark, SSPrunerError

Command = TypeVar("Command", bound=Callable[..., None])

DEBUG = "SSPRUNER_DEBUG"  # set to anything to get tracebacks


def reports_errors(command: Command) -> Command:
    """Turn errors into one line on standard error and an exit code: 2 the user's, 1 a failed check, 130 Ctrl-C."""
    return _reporting(command, shared=False)


def reports_errors_of_all(command: Command) -> Command:
    """Report errors of a command that runs under torchrun: one line and one exit code for all processes."""
    return _reporting(command, shared=True)


def _reporting(command: Command, shared: bool) -> Command:
    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        with ExitStack() as joined:  # until the error has been reported
            try:
                import numpy  # noqa: F401  # before torch, which swallows a Ctrl-C that comes while it imports numpy

                if _together():
                    from sspruner.compute.processes import lost_peers, processes

                    if not shared:
                        raise InputError(
                            "this command runs in one process: start it without torchrun (or unset WORLD_SIZE)"
                        )
                    joined.enter_context(processes())
                    with lost_peers():
                        command(*args, **kwargs)
                else:
                    command(*args, **kwargs)
            except BrokenPipeError:
                raise
            except (Exception, KeyboardInterrupt) as error:
                known = known_error(error)
                if known is None and not _together():
                    raise
                code, line = known or (1, "".join(traceback.format_exception(error)))
                if code == 0:
                    say(line.removeprefix("sspruner: "))
                    raise SystemExit(0) from None
                raise SystemExit(fail(code, line)) from None

    return wrapper  # type: ignore[return-value]


def known_error(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code of an error and its one line, None for one that needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "sspruner: interrupted; nothing written"
    if os.environ.get(DEBUG):
        return None
    if isinstance(error, SSPrunerError):
        return error.exit_code, f"sspruner: {' '.join(str(error).split())}"
    if isinstance(error, OSError):  # the file system: path too long, permission denied
        return 2, f"sspruner: {error}"
    return None


def _together() -> bool:
    """Check whether torchrun started other processes, without importing torch unless it did."""
    if "RANK" not in os.environ:
        return False
    from sspruner.compute.processes import started_together

    return started_together()


def fail(code: int, line: str) -> int:
    """Report on standard error why a run fails; under torchrun only the first process does. Return the exit code."""
    if not _together():
        warn(line)
        return code
    from sspruner.compute.processes import fail as fail_together

    return fail_together(code, lambda: warn(line))


@contextmanager
def kept_if_interrupted(working: Path | None) -> Iterator[None]:
    """Report, when Ctrl-C stops a resumable run, where the finished part is. None: not resumable."""
    try:
        yield
    except KeyboardInterrupt:
        if working is None or not working.exists():
            raise
        warn(f"sspruner: interrupted; what is finished is kept in {working}: go on with --resume")
        raise SystemExit(130) from None


def names_from(texts: list[str] | None) -> list[str]:
    """Read `ghost,balanced`, one text or several: unique names, in order."""
    return list(dict.fromkeys(name.strip() for text in texts or [] for name in text.split(",") if name.strip()))


def fractions_from(texts: list[str] | None, what: str) -> list[float]:
    """Read `0.25,0.5`, one text or several, as numbers."""
    return [_fraction(text, what) for text in names_from(texts)]


def prepare(plugins: Sequence[Path] | None, *models: str | None) -> None:
    """Prepare a command: load --plugin files, silence libraries, and say which model is meant where none is given.

    Characters that the output's encoding lacks are printed as `?`: generated text may contain any.
    """
    import transformers

    from sspruner.compute.processes import rank
    from sspruner.plugins import manager

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of libraries: their users are we, not who reads this
    warnings.simplefilter("always", Remark)
    warnings.showwarning = lambda message, *where: warn(f"sspruner: {message}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if None in models and rank() == 0:
        from sspruner.io.source import DEFAULT

        warn(f"no MODEL given: {DEFAULT}, the small reference model that ships with sspruner")
    for path in plugins or ():
        manager.load_file(path)


def from_cache(scores: Any) -> str:
    """Return a remark for scores from the cache, else ""."""
    return " (from the cache: nothing has changed since; --no-cache scores again)" if scores.from_cache else ""


def sizes_from(texts: Sequence[str]) -> dict[int | str, int] | None:
    """Read `PLACE=SIZE` texts: a GPU's number or another place, and the bytes it may use."""
    from sspruner.units import parse_bytes

    if not texts:
        return None
    pairs = [pair for text in texts for pair in _pairs(text, f"--max-memory {text!r}")]
    return {
        int(place) if place.isdigit() else place: int(parse_bytes(size, f"--max-memory {place}"))
        for place, size in pairs
    }


def batches_from(text: str) -> tuple[int, ...]:
    """Read `1,16,64`: whole numbers of at least 1."""
    return numbers_from(text, "--batch")


def numbers_from(text: str | None, option: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1, separated by commas; empty if the option is not given."""
    if text is None:
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option} {text!r}: expected whole numbers of at least 1, separated by commas")
    return tuple(dict.fromkeys(numbers))


def _pairs(text: str, what: str) -> list[tuple[str, str]]:
    pairs = [part.rpartition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if not all(names) or len(set(names)) != len(names):
        raise InputError(f"{what}: expected NAME=VALUE, several separated by commas, each name once")
    return [(name, value.strip()) for name, (_, _, value) in zip(names, pairs, strict=True)]


def _fraction(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{what}: {text!r} is not a number") from None


def say(text: str) -> None:
    """Print a line on standard output."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(renderable: Any) -> None:
    """Print a rich renderable on standard output; without colour and never truncated if that is not a terminal."""
    from rich.console import Console

    terminal = Console()
    width = terminal.width if terminal.is_terminal else 120
    Console(width=width).print(renderable)


def command_line() -> str:
    """Return the command as typed."""
    import shlex

    return shlex.join(["sspruner", *sys.argv[1:]])


def check_json(path: Path | None) -> None:
    """Raise InputError, before any work, if `emit` could not write to `path`."""
    from sspruner.files.output import check_file

    if path is not None and str(path) != "-":
        check_file(path)


def emit(text: str, path: Path | None) -> None:
    """Write `text` to a file, atomically, or to standard output if the path is `-`."""
    from sspruner.files.output import write_file

    if path is None:
        return
    if str(path) == "-":
        say(text.removesuffix("\n"))
        return
    write_file(path, text)
