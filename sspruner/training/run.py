"""Folder of a training run, with its settings, so that only the same run continues there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sspruner.compute.processes import barrier, from_one, rank
from sspruner.errors import InputError
from sspruner.files import strict_json
from sspruner.files.output import atomic_file, check_results
from sspruner.recipes.common import FILE, Recorded

MARK = "run.json"
RECIPE = "recipe"  # its key in run.json


def run_folder(out: str | Path, settings: dict[str, Any], recipe: Recorded | None = None) -> Path:
    """Create the folder of a run, or return the existing one.

    Args:
        settings: the settings that identify the run, as JSON. run.json holds them, with the recipe; only a run with the
            same settings continues in the folder.
        recipe: the recipe of the run, written to the folder. Fields that are not in `settings`, such as max_minutes,
        may
            differ.

    Raises:
        InputError: for a folder with another run, or with other files.
    """
    folder = from_one(lambda: check_results(out, (MARK,)))  # checked once, before the first process writes there
    file = folder / MARK
    settings = strict_json.loads(strict_json.dumps(settings))
    if file.exists():
        try:
            before = strict_json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"output {file}: is damaged ({error}); remove the folder") from error
        before.pop(RECIPE, None)
        differs = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if differs:
            first = differs[0]
            raise InputError(
                f"output {folder}: holds a run with another {first} ({before.get(first)}, now {settings.get(first)}); "
                "choose another folder"
            )
    elif rank() == 0:
        with atomic_file(file) as temporary:
            written = settings | ({RECIPE: recipe.to_json()} if recipe else {})
            temporary.write_text(strict_json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if recipe and rank() == 0 and not (folder / FILE).exists():
        recipe.save(folder / FILE)
    barrier()
    return folder
