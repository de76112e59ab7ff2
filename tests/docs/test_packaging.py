"""The wheel: complete, small enough, and working where there is no checkout."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sspruner
from support.paths import ROOT
from support.zoo import FAMILIES

MISSING = [name for name in ("build", "hatchling", "pip") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

PROGRAM = """if True:
    import json, sys
    from importlib.metadata import distribution, entry_points
    sys.path.insert(0, sys.argv[1])
    import sspruner, sspruner_plugins.ghost
    from sspruner.graph.known import installed_families
    from sspruner.scoring.known import installed_scorers
    model, tokenizer = sspruner.load()
    print(json.dumps({
        "files": [sspruner.__file__, sspruner_plugins.__file__, str(distribution("sspruner").locate_file(""))],
        "version": distribution("sspruner").version,
        "state": sspruner.trace(model).state_bytes,
        "vocabulary": len(tokenizer),
        "scorers": sorted(installed_scorers()),
        "families": sorted(installed_families()),
        "plugins": sorted(e.name for e in entry_points(group="sspruner")),
        "command": [e.value for e in entry_points(group="console_scripts", name="sspruner")],
    }))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    (made,) = out.iterdir()
    return made


@pytest.mark.slow
def test_what_the_wheel_holds(wheel: Path) -> None:
    assert wheel.name == f"sspruner-{sspruner.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        info = f"sspruner-{sspruner.__version__}.dist-info"
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    for package in ("sspruner", "sspruner_plugins"):
        sources = {str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py")}
        assert sources <= set(sizes)
    assert {"sspruner/formats/targets.toml", "sspruner/reporting/page.html"} <= set(sizes)
    assert not {name for name in sizes if not name.startswith(("sspruner/", "sspruner_plugins/", f"{info}/"))}
    assert 2**20 < sizes["sspruner/reference/mamba2-books-4m/model.safetensors"] < 8_000_000
    assert {f"sspruner/reference/mamba2-books-4m/{name}" for name in ("config.json", "tokenizer.json")} <= set(sizes)
    assert f"{info}/licenses/LICENSE" in sizes
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "sspruner = sspruner.cli.main:main" in entries
    families = [p for p in (ROOT / "sspruner/graph/families").glob("*.py") if "sspruner_families" in p.read_text()]
    assert len(families) > 10
    for name in (p.stem for p in families):
        assert f"{name} = sspruner.graph.families.{name}\n" in f"{entries}\n"
    for name in ("ghost", "block-influence", "magnitude", "random"):
        module = name.replace("-", "_")
        assert f"{module} = sspruner_plugins.{module}\n" in f"{entries}\n"


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=300)
    # -I: neither PYTHONPATH nor the current folder; the checkout, installed as editable, comes after the wheel.
    python = [sys.executable, "-I", "-c", PROGRAM, str(site)]
    done = subprocess.run(python, check=True, cwd=elsewhere, stdout=subprocess.PIPE, timeout=300)
    found = json.loads(done.stdout)
    for file in found["files"]:
        assert Path(file).is_relative_to(site)
    assert found["version"] == sspruner.__version__
    assert found["state"] == 6 * 8 * 64 * 128 * 4  # layers, heads, head size, state, bytes
    assert found["vocabulary"] == 4096
    assert {"ghost", "block-influence", "magnitude", "random"} <= set(found["scorers"])
    assert set(FAMILIES) <= set(found["families"])
    homes = {"mamba2", "zamba2", "qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear"}
    assert {*homes, "ghost", "block_influence", "magnitude", "random", "reap"} <= set(found["plugins"])
    assert found["command"][0] == "sspruner.cli.main:main"
    assert list(elsewhere.iterdir()) == []
