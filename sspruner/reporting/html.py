"""`report`: a folder's results as one HTML file that needs no network, and its pictures as PNG files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from sspruner.errors import InputError
from sspruner.files.output import atomic_file, check_file
from sspruner.files.provenance import versions
from sspruner.reporting.content import Figure, Section
from sspruner.reporting.folder import read_folder

NEEDS = ("jinja2", "matplotlib")
OUT = "report.html"


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Show what lies in `folder`: results of compare, bench, evaluate and prune, and scores. Returns the HTML file.

    out: where to write it, `report.html` in the folder by default; PNG files go to `report-figures` beside it. Both
    are written at the end, whole. Raises InputError for a folder that holds nothing to show, a damaged file in it,
    an output that cannot be written, and where jinja2 or matplotlib is missing.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise InputError(f"report: needs {' and '.join(missing)}; pip install 'sspruner[report]'")
    found = read_folder(folder)
    path = check_file(Path(folder).expanduser() / OUT if out is None else out)
    pictures = path.with_name(f"{path.stem}-figures")
    _check_pictures(pictures)

    from sspruner.reporting.figures import png
    from sspruner.reporting.sections import sections

    shown = sections(found)
    page = render(shown, Path(folder).expanduser().resolve().name)
    images = {figure.name: png(figure.draw) for section in shown for figure in section.figures}
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
        _write_pictures(pictures, images)
    return path


def render(shown: Sequence[Section], name: str) -> str:
    """The page. name: of the folder."""
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
        name=clean(name), sections=shown, version=versions()["sspruner"]
    )
    return page


def _check_pictures(folder: Path) -> None:
    """Raise InputError if the folder of pictures is taken by anything but pictures."""
    if folder.exists() and not (folder.is_dir() and all(p.suffix == ".png" and p.is_file() for p in folder.iterdir())):
        raise InputError(f"output {folder}: is not a folder of PNG files, so it is not replaced; give another --out")


def _write_pictures(folder: Path, images: dict[str, bytes]) -> None:
    """Replace the folder by one with these pictures, at once."""
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made = work / "new"
        made.mkdir()
        for name, image in images.items():
            (made / f"{name}.png").write_bytes(image)
        _check_pictures(folder)
        if folder.exists():
            os.rename(folder, work / "old")
        if images:
            os.rename(made, folder)
    finally:
        if (work / "old").exists() and images and not folder.exists():
            os.rename(work / "old", folder)
        shutil.rmtree(work, ignore_errors=True)
