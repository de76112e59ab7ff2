"""Run a part of the tests with other versions that pyproject.toml permits: `make compat`.

The oldest transformers is what is installed (constraints.txt), with which all tests run; here runs the newest. Another
torch is for `make compat COMPAT="--torch 2.6.0"`: outside CI, for it comes with gigabytes of CUDA. Each version lies in
a folder of its own, .compat/NAME-VERSION, which is put before the environment's packages; nothing that is installed
changes. The exit code is 1 if a test fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("5.24.0",)
PARTS = {  # what changes between versions: caches, forwards, configs, the way that models are saved and loaded
    "families": ["tests/laws/test_families.py", "tests/unit/graph/test_class_reads.py"],
    "projection": ["tests/laws/test_projection.py"],
    "generation": ["tests/unit/compute/test_accelerate.py", "tests/unit/calibrate/test_calibration.py"],
    "save and load": [
        "tests/laws/test_save_load.py",
        "tests/laws/test_saved_again.py",
        "tests/laws/test_saved_by_0_1.py",
    ],
    "export": ["tests/unit/formats/test_export.py", "tests/unit/formats/test_export_stock.py"],
    "offload": ["tests/unit/io/test_offload.py"],
    "training": ["tests/unit/training/test_train.py", "tests/unit/training/test_train_subnet.py"],
}


def installed(package: str, version: str, *options: str) -> str:
    """Return the folder of a version, after it was installed there."""
    folder = ROOT / ".compat" / f"{package}-{version}"
    if not (folder / "installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", "--target", str(folder)]
        subprocess.run([*pip, *options, f"{package}=={version}"], check=True)
        (folder / "installed").touch()
    return str(folder)


def main() -> int:
    """Run the parts, or those that are named, with every version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--torch", metavar="VERSION", help="that torch, with the transformers that is installed")
    asked = parser.parse_args()
    if unknown := [part for part in asked.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    chosen = asked.parts or [*PARTS]
    overlays = (
        {f"torch {asked.torch}": installed("torch", asked.torch)}
        if asked.torch
        else {f"transformers {version}": installed("transformers", version, "--no-deps") for version in VERSIONS}
    )
    failed = 0
    for name, folder in overlays.items():
        print(f"\n{name}: {', '.join(chosen)}", flush=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        files = [file for part in chosen for file in PARTS[part]]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
        failed |= subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
