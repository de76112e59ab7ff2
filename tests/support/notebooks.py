"""Run the cells of the notebooks in docs/notebooks, and write what they print.

`python tests/support/notebooks.py` writes it; run it after a change of a cell or of what is printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs/notebooks").glob("*.ipynb"))


def read(notebook: Path) -> Any:
    """Return a notebook as its JSON object."""
    return json.loads(notebook.read_text(encoding="utf-8"))


def code_cells(notebook: Any) -> list[dict[str, Any]]:
    """Return the cells of code, in their order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """Return what a cell shows as printed."""
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def printed(notebook: Any) -> list[str]:
    """Run all cells in one namespace, in the working directory, and return what each prints."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        found.append(out.getvalue())
    return found


def main() -> None:
    for file in NOTEBOOKS:
        notebook = read(file)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            texts = printed(notebook)
        for number, (cell, text) in enumerate(zip(code_cells(notebook), texts, strict=True), start=1):
            cell["execution_count"] = number
            stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            cell["outputs"] = [stream] if text else []
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
