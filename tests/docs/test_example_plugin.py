"""The example plugin: a package that installs, is found, passes its own tests, and prunes."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from support.paths import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "sspruner-example"
MISSING = [name for name in ("build", "hatchling", "pip") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the example's wheel, and sees the packages of this one."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns(".*", "__pycache__", "dist"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    venv.create(folder / "env", with_pip=False, symlinks=True)
    found = folder / "env" / "bin" / "python"
    site = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    here = sysconfig.get_path("purelib")
    Path(site, "here.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")  # reads its .pth
    pip = [sys.executable, "-m", "pip", "--python", found, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run(*pip, cwd=folder)
    return found


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_is_listed_with_its_origin(python: Path, tmp_path: Path) -> None:
    (line,) = [
        line for line in run(python, "-m", "sspruner", "scorers", cwd=tmp_path).splitlines() if "outflow" in line
    ]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        "outflow", "channel, head, head_dim", "activations", "example",
    ]  # fmt: skip


def test_it_is_not_installed_here() -> None:
    assert importlib.util.find_spec("sspruner_example") is None


@pytest.mark.exhaustive
@pytest.mark.slow
def test_its_own_tests_pass(python: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests", cwd=tmp_path)
    assert "3 passed" in said


@pytest.mark.slow
def test_it_prunes(python: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((EXAMPLE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    options = shlex.split("--axis head --sparsity 0.25 --calibration text.txt --samples 1 --seq-len 32 --out pruned")
    said = run(python, "-m", "sspruner", "prune", "--scorer", "outflow", *options, cwd=tmp_path)
    assert "outflow on axis head" in said
    assert (tmp_path / "pruned" / "config.json").is_file()
