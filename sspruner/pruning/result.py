"""Result: the return value of `prune`; prints as a table, and saves itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from torch import nn

from sspruner.plans.plan import Plan
from sspruner.pruning.report import Report
from sspruner.pruning.table import result_table
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.scores import Scores


@dataclass(frozen=True)
class Result:
    """A pruned model with its plan, scores, report and recipe.

    model: the model passed to `prune`, cut in place.
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    report: Report
    recipe: Recipe

    def named(self, model: str, command: str) -> Result:
        """Return the same result with a report that names the model and the command that ran."""
        return replace(self, report=replace(self.report, model=model, command=command))

    def save(self, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False) -> None:
        """Save the model with its plan, scores, report, recipe and model card; `sspruner.load` reads it back."""
        from sspruner.io.save import save  # the one way up the house: a contract names it

        save(self.model, folder, tokenizer, result=self, overwrite=overwrite)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(result_table(self.report))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        from rich.console import Console

        console = Console(file=StringIO(), width=120, record=True)
        console.print(result_table(self.report))
        return console.export_html(inline_styles=True, code_format='<pre style="font-family:monospace">{code}</pre>')
