"""Write rows as a table of any kind that is read as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def as_table(suffix: str, rows: list[dict[str, Any]], path: Path) -> Path:
    """Write rows as a table of that kind."""
    data = datasets.Dataset.from_list(rows)
    file = path / f"rows{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix in (".jsonl", ".ndjson"):
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif suffix in (".csv", ".tsv"):
        data.to_csv(file, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        data.to_parquet(file)
    else:
        data.save_to_disk(path / "disk")
        next((path / "disk").glob("*.arrow")).rename(file)
    return file
