"""Malformed text files and folders: windows or one clear error, in bounded time; nothing else, whatever is in them."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import hostile
from sspruner.calibrate.documents import TABLES
from support.bounded import survives
from support.letters import Letters
from support.tables import as_table
from support.tiny import tiny_model

MODEL = tiny_model()
ROWS = [{"id": number, "text": f"It was bright cold day number {number} in April."} for number in range(40)]
KINDS = [*TABLES, ".txt", ".txt.gz", ".jsonl.gz", ".csv.xz", ".parquet.gz"]
PIECES = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"]", b'"', b"\\u12", b"\n", b"\r", b",,,,", b"\t", b"null",
    b"1e999", b"PAR1", b"ARROW1", b"\x80\x04cos\nsystem\n", b'{"text": {"text": []}}\n', b'{"text": 3}\n',
    b"[" * 3000, b"x" * 9999,
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    tables = {suffix: as_table(suffix, ROWS, folder).read_bytes() for suffix in TABLES}
    packed = {kind: gzip.compress(tables[f".{kind.split('.')[1]}"]) for kind in (".jsonl.gz", ".parquet.gz")}
    text = "\n\n".join(row["text"] for row in ROWS).encode()
    return tables | packed | {".txt": text, ".txt.gz": gzip.compress(text), ".csv.xz": b"\xfd7zXZ\x00" + text}


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def read(source: Path) -> None:
    sspruner.calibration(source, MODEL, Letters(), samples=4, seq_len=16, held_out=2)


def one_line(source: Path) -> None:
    error = survives(lambda: read(source))
    if error is not None:
        assert "\n" not in str(error)
        assert str(source) in str(error)


@st.composite
def damages(draw: st.DrawFn, size: int) -> list[tuple[int, int, bytes]]:
    """Cuts and insertions: (place, bytes that go, bytes that come)."""
    place, gone = st.integers(0, size), st.sampled_from([0, 0, 1, 7, size])
    return draw(
        st.lists(st.tuples(place, gone, st.sampled_from(PIECES) | st.binary(max_size=9)), min_size=1, max_size=4)
    )


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pandas leaves files open


@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_damage_to_a_file(data: st.DataObject, kind: str, good: dict[str, bytes]) -> None:
    content = good[kind]
    for place, gone, come in data.draw(damages(len(content))):
        content = content[:place] + come + content[place + gone :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{kind}"
        file.write_bytes(content)
        one_line(file)


@given(kind=st.sampled_from(KINDS), other=st.sampled_from(KINDS))
def test_a_file_of_one_kind_named_as_another(kind: str, other: str, good: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{other}"
        file.write_bytes(good[kind])
        one_line(file)


NAMES = st.sampled_from(
    ["a", "train", "test-0", "data", "..a", ".hidden", "__pycache__", "-rf", "a b", "*", "[a]", "dataset_infos", "état"]
)
ENDINGS = st.sampled_from([*KINDS, ".py", ".zip", ".json", "", ".pkl", ".md"])


@given(
    files=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), ENDINGS, st.sampled_from(KINDS)), max_size=5),
    link=st.sampled_from(["", "cycle", "outside", "nowhere"]),
)
def test_any_folder(files: list[tuple[list[str], str, str]], link: str, good: dict[str, bytes]) -> None:
    """Any names, subfolders and links; a script in it is not run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        for parts, ending, kind in files:
            file = folder.joinpath(*parts).with_name(parts[-1] + ending)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"raise SystemExit(7)" if ending == ".py" else good[kind])
            except OSError:  # a file where a folder should be
                continue
        if link:
            target = {"cycle": folder, "outside": Path(name), "nowhere": folder / "nowhere"}[link]
            os.symlink(target, folder / "link", target_is_directory=True)
        one_line(folder)


@given(data=st.data())
def test_any_damage_to_a_saved_dataset(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
        file = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = file.read_bytes()
        for place, gone, come in data.draw(damages(len(content))):
            content = content[:place] + come + content[place + gone :]
        file.write_bytes(content)
        one_line(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"_data_files": [{"filename": "/etc/passwd"}]},
        {"_data_files": [{"filename": "../outside.arrow"}]},
        {"_data_files": "data.arrow"},
        {"_split": ["train"]},
        {"_format_type": "nosuch", "_format_columns": 7},
        {"_fingerprint": "../" * 50},
    ],
    ids=str,
)
def test_any_field_of_a_saved_dataset(fields: dict[str, Any], tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    state = tmp_path / "saved/state.json"
    state.write_text(json.dumps(json.loads(state.read_text("utf-8")) | fields), "utf-8")
    one_line(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json", "deep.jsonl.gz"])
def test_deep_json_does_not_take_the_parser_down(name: str, tmp_path: Path) -> None:
    """That of Arrow ends the process at some 10,000 brackets in brackets, behind good rows too."""
    deep = b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    content = b"\n".join([*(json.dumps(row).encode() for row in ROWS), deep])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(sspruner.InputError, match=rf"{name}: nests over 500 brackets; give rows"):
        read(tmp_path / name)


JSON = st.recursive(
    st.text(st.sampled_from('a"\\[]{}é'), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('x"[', max_size=2), inner, max_size=3),
    max_leaves=20,
)


@given(value=JSON, at_once=st.integers(1, 30), ascii_only=st.booleans())
def test_brackets_are_counted_outside_strings(value: Any, at_once: int, ascii_only: bool) -> None:
    """Whatever is in the strings, and wherever the parts that are read begin."""

    def depth(part: Any) -> int:
        if isinstance(part, str):
            return 0
        return 1 + max(map(depth, part.values() if isinstance(part, dict) else part), default=0)

    content = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile, "AT_ONCE", at_once)
        found = [hostile.nested(io.BytesIO(content), most) for most in range(depth(value) + 1)]
    assert found == [True] * depth(value) + [False]


def test_an_error_names_some_columns(tmp_path: Path) -> None:
    wide = [{f"c{number}": "x" for number in range(50)}]
    with pytest.raises(sspruner.InputError, match=r"it has c0, c1, .*, c19 and 30 others: name the one") as error:
        read(as_table(".jsonl", wide, tmp_path))
    assert len(str(error.value)) < 400
