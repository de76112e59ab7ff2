"""Record what the installed transformers' mixers read: sspruner/graph/class_reads.json.

`python tests/support/class_reads.py` writes the entry of the installed version; run it, after a look at what is new,
when another version of transformers is permitted, and take out versions that no longer are.
"""

from __future__ import annotations

import json
from importlib import metadata

from transformers import CONFIG_MAPPING

from sspruner.graph.class_reads import FILE, class_reads
from sspruner.graph.known import installed_families
from sspruner.testing.models import FAMILIES, zoo


def found() -> dict[str, dict[str, str]]:
    """Return what the class of every family reads that this transformers has."""
    families = installed_families()
    entries = {}
    for name in sorted(set(FAMILIES) & set(CONFIG_MAPPING)):
        mixer = next(module for module in zoo(name).modules() if families[name].recognises(module))
        reads = class_reads(mixer)
        assert reads is not None, name
        entries[name] = reads.to_json()
    return entries


def main() -> None:
    """Write the file."""
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    recorded[metadata.version("transformers")] = found()
    FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
