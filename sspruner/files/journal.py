"""Journal of a long run: finished phases in a folder, from which an interrupted run resumes with the same result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sspruner.errors import InputError
from sspruner.files import strict_json

NAME = "run.json"


class Journal:
    """Tensors by phase, each with the number of finished steps. Files are written atomically."""

    def __init__(self, folder: Path, key: str, *, resume: bool) -> None:
        """Open or create a journal. Without resume, or if no phase was finished, the folder is emptied.

        key: digest of everything that the run depends on. Raises InputError for resuming a different run, and for a
        folder with files that are not a run's.
        """
        self.folder = folder
        if resume and (folder / NAME).is_file():
            if _key(folder / NAME) != key:
                raise InputError(
                    f"resume: what was interrupted in {folder} was another run (model, text, options or versions "
                    "differ); leave --resume out to start anew"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        files = list(folder.iterdir())
        if files and not (folder / NAME).is_file():
            raise InputError(f"offload {folder}: holds files of another kind; give a folder of its own")
        for file in files:
            if file.suffix in (".safetensors", ".part") and file.is_file():
                file.unlink()
        (folder / NAME).write_text(strict_json.dumps({"key": key}) + "\n", encoding="utf-8")

    def write(self, phase: str, done: int, tensors: dict[str, torch.Tensor]) -> None:
        """Record that a phase has finished `done` steps, with the tensors to resume from."""
        write_tensors(self.folder / f"{phase}.safetensors", tensors, {"done": str(done)})

    def mapped(self, phase: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a phase as parts of its file, which take no memory until they are read."""
        with safe_open(str(self.folder / f"{phase}.safetensors"), framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118

    def read(self, phase: str) -> tuple[int, dict[str, torch.Tensor]]:
        """Return the finished steps of a phase and the tensors to resume from; 0 and {} if it was never begun."""
        file = self.folder / f"{phase}.safetensors"
        if not file.is_file():
            return 0, {}
        try:
            with safe_open(str(file), framework="pt") as f:
                return int(f.metadata()["done"]), {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"resume: {file} cannot be read ({error}); leave --resume out to start anew") from error


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors atomically. Raises InputError if it cannot be written."""
    temporary = file.with_name(f"{file.name}.part")
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{file} cannot be written ({error}); make room, and go on with --resume") from error


def _key(file: Path) -> str:
    try:
        return str(strict_json.loads(file.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
