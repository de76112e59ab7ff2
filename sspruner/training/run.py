"""The folder of a training run: what it was asked for, so that only the same run goes on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sspruner.compute.processes import barrier, rank
from sspruner.errors import InputError
from sspruner.files import strict_json
from sspruner.files.output import atomic_file, check_results
from sspruner.recipes.common import FILE, Recorded

MARK = "run.json"
RECIPE = "recipe"  # its key in run.json


def run_folder(out: str | Path, asked: dict[str, Any], recipe: Recorded | None = None) -> Path:
    """Make the folder of a run, or return the one that is there.

    Args:
        asked: what makes it this run and no other, as JSON. It is in run.json, with the recipe, and only the same run
            goes on in the folder.
        recipe: the recipe of the run, written beside it. It may differ in what is not in `asked`, such as max_minutes.

    Raises:
        InputError: for a folder that holds another run, or other things.
    """
    folder = check_results(out, (MARK,))
    file = folder / MARK
    asked = strict_json.loads(strict_json.dumps(asked))
    if file.exists():
        try:
            before = strict_json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"output {file}: is damaged ({error}); remove the folder") from error
        before.pop(RECIPE, None)
        differs = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
        if differs:
            first = differs[0]
            raise InputError(
                f"output {folder}: holds a run with another {first} ({before.get(first)}, now {asked.get(first)}); "
                "choose another folder"
            )
    elif rank() == 0:
        with atomic_file(file) as temporary:
            written = asked | ({RECIPE: recipe.to_json()} if recipe else {})
            temporary.write_text(strict_json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if recipe and rank() == 0 and not (folder / FILE).exists():
        recipe.save(folder / FILE)
    barrier()
    return folder
