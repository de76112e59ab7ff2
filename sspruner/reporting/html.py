"""Report: a folder's results as one HTML file that needs no network, and its figures as PNG files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from sspruner.errors import InputError, install
from sspruner.files.output import atomic_file, check_file
from sspruner.files.provenance import versions
from sspruner.reporting.content import Figure, Section
from sspruner.reporting.folder import read_folder

NEEDS = ("jinja2", "matplotlib")
OUT = "report.html"


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the results in `folder`, of compare, bench, evaluate, prune and score, as HTML. Return the HTML file.

    out: path of the file, default `report.html` in the folder; PNG files go to `report-figures` beside it. Both are
    written at the end, atomically. Raises InputError for a folder without results, a damaged file in it, an output that
    cannot be written, and a missing jinja2 or matplotlib.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise InputError(f"report: needs {' and '.join(missing)}: {install('report')}")
    results = read_folder(folder)
    path = check_file(Path(folder).expanduser() / OUT if out is None else out)
    pictures = path.with_name(f"{path.stem}-figures")
    _check_pictures(pictures)

    from sspruner.reporting.figures import png
    from sspruner.reporting.headline import headline
    from sspruner.reporting.sections import sections

    content = sections(results)
    page = render(content, Path(folder).expanduser().resolve().name, headline(results))
    images = {figure.name: png(figure.draw) for section in content for figure in section.figures}
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
        _write_pictures(pictures, images)
    return path


def render(content: Sequence[Section], name: str, results: Sequence[str] = ()) -> str:
    """Return the page. name: of the folder. results: sentences that stand on top."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from sspruner.reporting.figures import svg
    from sspruner.reporting.folder import clean

    def picture(figure: Figure) -> Markup:
        return Markup(svg(figure.draw, figure.name))  # matplotlib has escaped its texts

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["picture"] = picture
    template = (resources.files("sspruner.reporting") / "page.html").read_text(encoding="utf-8")
    page: str = environment.from_string(template).render(
        name=clean(name), sections=content, version=versions()["sspruner"], results=results
    )
    return page


def _check_pictures(folder: Path) -> None:
    """Raise InputError if the folder of figures holds anything but PNG files."""
    if folder.exists() and not (folder.is_dir() and all(p.suffix == ".png" and p.is_file() for p in folder.iterdir())):
        raise InputError(f"output {folder}: is not a folder of PNG files, so it is not replaced; give another --out")


def _write_pictures(folder: Path, images: dict[str, bytes]) -> None:
    """Replace the folder atomically by one with these figures."""
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        for name, image in images.items():
            (new / f"{name}.png").write_bytes(image)
        _check_pictures(folder)
        if folder.exists():
            os.rename(folder, work / "old")
        if images:
            os.rename(new, folder)
    finally:
        if (work / "old").exists() and images and not folder.exists():
            os.rename(work / "old", folder)
        shutil.rmtree(work, ignore_errors=True)
