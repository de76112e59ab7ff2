"""Run a part of the tests with the newest transformers that pyproject.toml permits: `make compat`.

The oldest is what is installed (constraints.txt), with which all tests run. The newest lies in a folder of its own,
.compat/transformers-VERSION, which is put before the environment's packages; nothing that is installed changes. The
exit code is 1 if a test fails. torch is that of the environment: others have no build for the CPU alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("5.24.0",)
PARTS = {  # what changes between versions: caches, forwards, configs, the way that models are saved and loaded
    "families": ["tests/laws/test_families.py"],
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


def installed(version: str) -> Path:
    """Return the folder of a version, after it was installed there."""
    folder = ROOT / ".compat" / f"transformers-{version}"
    if not (folder / "installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder)]
        subprocess.run([*pip, "--no-deps", f"transformers=={version}"], check=True)
        (folder / "installed").touch()
    return folder


def main() -> int:
    """Run the parts, or those that are named, with every version."""
    chosen = sys.argv[1:] or [*PARTS]
    files = [file for part in chosen for file in PARTS[part]]
    failed = 0
    for version in VERSIONS:
        print(f"\ntransformers {version}: {', '.join(chosen)}", flush=True)
        path = os.pathsep.join([str(installed(version)), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
        failed |= subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
