"""Text in any form that people have: the same windows from every one of them, and one line for what is no text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BatchEncoding

import sspruner
from sspruner.calibrate import documents, encode
from sspruner.calibrate.documents import PACKED, TABLES, Reading, pieces, read_text
from sspruner.errors import InputError
from sspruner.io.source import DEFAULT, REFERENCES
from support.letters import Letters
from support.tables import as_table
from support.tiny import VOCABULARY, tiny_model

MODEL = tiny_model()
TEXTS = [f"It was bright cold day number {number} in April." for number in range(60)]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
TALKS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
JOINED = "\n\n".join(TEXTS)


class Small(Letters):
    """A tokenizer of one token per character, with a template for conversations."""

    chat_template = "a template"

    def __call__(self, text: Any, add_special_tokens: bool = False) -> dict[str, Any]:
        def ids(one: str) -> list[int]:
            return [ord(letter) % VOCABULARY for letter in one]

        return {"input_ids": ids(text) if isinstance(text, str) else [ids(each) for each in text]}

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool = True) -> str:
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


WRITTEN = "\n\n".join(Small().apply_chat_template(talk, tokenize=False) for talk in TALKS)


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def windows(source: Any, **options: Any) -> sspruner.Calibration:
    return sspruner.calibration(source, MODEL, Small(), **{"samples": 4, "seq_len": 64, "held_out": 2, **options})


def same(one: sspruner.Calibration, other: sspruner.Calibration) -> bool:
    names = ("tokens", "mask", "held_out", "held_out_mask")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture
def expected(tmp_path: Path) -> sspruner.Calibration:
    """The windows of the same text in a plain file."""
    (tmp_path / "plain.txt").write_text(JOINED, encoding="utf-8")
    return windows(tmp_path / "plain.txt")


@pytest.mark.parametrize("suffix", TABLES)
def test_a_table_is_its_column_of_text(suffix: str, tmp_path: Path, expected: sspruner.Calibration) -> None:
    assert same(windows(as_table(suffix, ROWS, tmp_path)), expected)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_files(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path, expected: sspruner.Calibration
) -> None:
    plain, table = tmp_path / f"a.txt{suffix}", tmp_path / f"a.jsonl{suffix}"
    plain.write_bytes(pack(JOINED.encode()))
    table.write_bytes(pack("\n".join(map(json.dumps, ROWS)).encode()))
    assert same(windows(plain), expected)
    assert same(windows(str(table)), expected)


def test_another_column_and_conversations(tmp_path: Path, expected: sspruner.Calibration) -> None:
    renamed = [{"body": row["text"], "text": "no"} for row in ROWS]
    assert same(windows(as_table(".jsonl", renamed, tmp_path), text_column="body"), expected)
    talks = windows(as_table(".jsonl", [{"messages": talk} for talk in TALKS], tmp_path))
    (tmp_path / "written.txt").write_text(WRITTEN, encoding="utf-8")
    assert same(talks, windows(tmp_path / "written.txt"))
    assert same(windows(TALKS), talks)
    with pytest.raises(InputError, match="row 0 is a conversation, and the tokenizer has no chat template"):
        sspruner.calibration(TALKS, MODEL, Letters())


def test_folders(tmp_path: Path, expected: sspruner.Calibration) -> None:
    """Of tables, of plain text (a file is a document), of `save_to_disk`; their splits by the names of the files."""
    table, plain, disk = tmp_path / "table", tmp_path / "plain", tmp_path / "saved"
    (table / "data").mkdir(parents=True)
    (table / "README.md").write_text("a card")
    half = len(ROWS) // 2
    for name, rows in (("train-0", ROWS[:half]), ("train-1", ROWS[half:]), ("test-0", ROWS[:1])):
        (table / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    plain.mkdir()
    (plain / "README.md").write_text("a card")
    (plain / ".hidden.txt").write_text("no")
    for number, text in enumerate(TEXTS):
        (plain / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(disk))
    data.save_to_disk(str(tmp_path / "one"))
    for folder in (table, plain, disk, tmp_path / "one", f"{disk}::train", f"{table}::train"):
        assert same(windows(folder), expected), folder
    assert read_text(f"{table}::test", Reading()) == read_text(f"{disk}::test", Reading()) == TEXTS[0]


def generated() -> Iterator[dict[str, Any]]:
    """Rows without an end."""
    number = 0
    while True:
        yield {"text": TEXTS[number % len(TEXTS)]}
        number += 1


def test_rows_in_python(expected: sspruner.Calibration) -> None:
    data = datasets.Dataset.from_list(ROWS)
    for source in (ROWS, tuple(ROWS), data, data.to_iterable_dataset(), iter(ROWS), {"text": TEXTS}):
        assert same(windows(source), expected), type(source)
    assert windows(generated()).tokens.shape == (4, 64)


def test_strings_in_python() -> None:
    """Each is a sequence."""
    ragged = [text[: 20 + number] for number, text in enumerate(TEXTS[:6])]
    wanted = windows(ragged)
    assert wanted.mask.sum(1).tolist() == [20, 21, 22, 23]
    column = datasets.Dataset.from_dict({"text": ragged})["text"]
    for source in (tuple(ragged), column, iter(ragged), numpy.array(ragged)):
        assert same(windows(source), wanted), type(source)


def test_token_ids_in_python() -> None:
    """Padding is left out where a mask says so, on whichever side it is."""
    ids = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [4, 3, 2, 1], [9, 8], [1, 2, 3]]
    wanted = windows(ids, samples=3)
    assert wanted.mask.sum(1).tolist() == [6, 3, 4]
    width = max(map(len, ids))
    for left in (False, True):
        rows, masks = [], []
        for row in ids:
            pad = [0] * (width - len(row))
            rows.append(pad + row if left else row + pad)
            masks.append([0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad))
        padded = {"input_ids": rows, "attention_mask": masks}
        tensors = {name: torch.tensor(value) for name, value in padded.items()}
        for source in (padded, BatchEncoding(padded), BatchEncoding(tensors), datasets.Dataset.from_dict(padded)):
            assert same(windows(source, samples=3), wanted), (left, type(source))
    for source in (
        [torch.tensor(row) for row in ids],
        [numpy.array(row) for row in ids],
        [{"input_ids": r} for r in ids],
    ):
        assert same(windows(source, samples=3), wanted)
    whole = numpy.arange(60).reshape(6, 10) % VOCABULARY
    for kind in ("int64", "uint16", "int32"):
        assert same(windows(whole.astype(kind)), windows(torch.tensor(whole)))
    assert windows({"input_ids": [1, 2, 3, 4]}).tokens.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "calibration list: empty"),
        ([None, None], "calibration list: empty"),
        ([" ", None], "strings: empty"),
        (["text", 3], "calibration list: row 1 holds int, not text"),
        ([1, 2, 3], "calibration list: row 0 holds int, not text"),
        ([[1, 2], [1.5, 2.5]], "row 1 is not a sequence of token ids"),
        ([{"body": "x"}], "no column 'text'; it has body: name the one of the text \\(--text-column\\)"),
        ([{"text": 3}], "its column 'text' holds int, not text"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"its attention mask has shape \(1,\), its ids \(2,\)"),
        ({"text": ["a", "b"], "id": [1]}, "its columns have different lengths"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "has the splits train; give one of them"),
        (numpy.zeros((3, 4)), "row 0 is not a sequence of token ids: torch.float64"),
        (numpy.zeros(3, int), r"shape \(3,\); expected \(sequences, tokens >= 2\)"),
        (b"bytes", "a bytes is not read as text; give plain text, .jsonl"),
        (7, "a int is not read as text"),
        (None, "a NoneType is not read as text"),
    ],
    ids=range(16),
)
def test_values_that_are_no_text(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        windows(source)


FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a.zip": (b"PK", ".zip is not read as text; give plain text, .jsonl"),
    "a.pkl": (b"\x80", ".pkl is not read as text"),
    "a.tar.gz": (b"\x80", ".tar is not read as text"),
    "a.gz": (b"no gzip", "cannot be unpacked"),
    "a.jsonl.xz": (b"no xz", "cannot be unpacked"),
    "utf16.txt": ("text".encode("utf-16-le"), "holds NUL characters; convert it"),
    "latin.txt": (b"a" * documents.CHARACTERS + b"caf\xe9", f"not UTF-8 \\(byte {documents.CHARACTERS + 3}\\)"),
    "bomb.txt.gz": (lambda: gzip.compress(b"a" * 2**27), "unpacks to over 200 times its size"),
    "bomb.jsonl.gz": (lambda: gzip.compress(b'{"text":"' + b"a" * 2**27 + b'"}'), "unpacks to over 200 times its size"),
    "list.json": (b"[1, 2]", "."),
    "bad.parquet": (b"PAR1" + b"\0" * 99 + b"PAR1", "datasets cannot load it"),
    "bad.arrow": (b"ARROW1" + b"\xff" * 99, "datasets cannot load it"),
    "bad.csv": (b'a,b\n"' + b"\n1" * 9, "."),
    "none.csv": (b"", "."),
}


@pytest.mark.cover(most=3)
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_text(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(InputError, match=message) as error:
        windows(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_text(tmp_path: Path) -> None:
    mixed, nothing, saved = tmp_path / "mixed", tmp_path / "nothing", tmp_path / "saved"
    for folder in (mixed, nothing):
        folder.mkdir()
    with pytest.raises(InputError, match="nothing: an empty folder"):
        windows(nothing)
    (nothing / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="nothing: none of its files is text"):
        windows(nothing)
    (mixed / "a.txt").write_text("x")
    (mixed / "b.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"mixed: holds \.jsonl and \.txt files; name one of them"):
        windows(mixed)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(saved))
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../elsewhere.arrow"
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"names a file outside its folder: '\.\./elsewhere\.arrow'"):
        windows(saved)
    (saved / "state.json").write_text("[]")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        windows(saved)


def test_a_table_is_not_split_and_not_quoted(tmp_path: Path) -> None:
    """A row's text is whole, whatever is in it."""
    rows = [{"text": 'one, "two"\nthree\t{four}'}, {"text": None}, {"text": "five"}]
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        found = [text for text, _ in pieces(str(as_table(suffix, rows, tmp_path)), Reading())]
        assert found == [rows[0]["text"], "five"], suffix


@given(text=st.text(st.sampled_from("ab \n\ré☃"), max_size=80), characters=st.integers(1, 9))
def test_a_plain_text_in_parts_is_whole(text: str, characters: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHARACTERS", characters)
        found = list(pieces(str(file), Reading()))
    assert "".join(part for part, _ in found) == text
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]


def test_a_long_text_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS", 100)
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 500)
    (tmp_path / "a.txt").write_text(JOINED, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"a\.txt: the first 5\d\d characters are read; what follows is left out"):
        found = read_text(str(tmp_path / "a.txt"), Reading())
    assert 400 <= len(found) <= 600
    assert JOINED.startswith(found)


WORD = st.text(st.sampled_from("abé,.'☃1"), min_size=1, max_size=6)
GAP = st.text(st.sampled_from(" \n\t"), min_size=1, max_size=3)


@given(words=st.lists(st.tuples(WORD, GAP), max_size=40), at_once=st.integers(10, 40))
def test_a_long_text_is_encoded_in_parts_as_the_whole(
    words: list[tuple[str, str]], at_once: int, tokenizer: Any
) -> None:
    """By a tokenizer that begins words with their white space: the same tokens, and never too many at once."""
    text, seen = "".join(word + gap for word, gap in words), []

    def watched(part: str, **options: Any) -> Any:
        seen.append(part)
        return tokenizer(part, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "AT_ONCE", at_once)
        found = encode._text(text, watched)
    assert found.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(seen) == text
    assert max(map(len, seen)) <= 2 * at_once


def test_a_text_without_white_space_is_encoded_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "AT_ONCE", 10)
    assert encode._text("x" * 95, Small()).tolist() == [ord("x") % VOCABULARY] * 95


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCES / DEFAULT)


def test_a_mask_belongs_to_token_ids() -> None:
    with pytest.raises(InputError, match="mask: belongs to token ids"):
        windows(["some text"], mask=torch.ones(1, 9, dtype=torch.bool))


def test_scores_use_every_window(tmp_path: Path) -> None:
    """Of a short text: no part is held out."""
    (tmp_path / "a.txt").write_text("It was a bright cold day." * 20, encoding="utf-8")
    scores = sspruner.score(MODEL, "ghost", calibration=tmp_path / "a.txt", tokenizer=Small(), samples=32, seq_len=50)
    assert scores.metadata["tokens"] == str(500)


def test_every_suffix_is_known() -> None:
    assert set(PACKED) == {".gz", ".bz2", ".xz"}
    assert not set(TABLES) & set(documents.NO_TEXT)
