"""Training text: nothing is lost, repeated or held out by mistake, and a restart reads on where it was."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sspruner.calibrate import documents
from sspruner.errors import InputError
from sspruner.training.text import Text, packed, shuffled
from support.letters import Letters
from support.training_text import sources

WORDS = st.text(st.sampled_from("ab \n"), max_size=60)


def joined(blocks: list[torch.Tensor]) -> list[int]:
    return torch.cat(blocks).tolist() if blocks else []


@given(text=WORDS, length=st.integers(2, 9), characters=st.integers(1, 9))
def test_a_plain_text_is_cut_into_blocks_whole(
    text: str, length: int, characters: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the parts in which it is read: all tokens in order, one end behind them, less than a block dropped."""
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHARACTERS", characters)
        blocks = list(packed(str(file), Letters(), length))
    wanted = [*Letters().ids(text), 0]
    assert joined(blocks) == wanted[: len(wanted) // length * length]
    assert all(block.shape == (length,) for block in blocks)


def test_rows_of_json_lines_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    texts = [letter * 3 for letter in "abcdefgh"]
    file.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts), encoding="utf-8")
    wanted = [token for text in texts for token in (*Letters().ids(text), 0)]
    assert joined(list(packed(str(file), Letters(), 4))) == wanted
    endless = Letters()
    endless.eos_token_id = None
    assert joined(list(packed(str(file), endless, 3))) == [token for token in wanted if token]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe\xff", "not UTF-8 \\(byte 0\\)"),
        ("a.jsonl", b'{"other": "x"}\n', "no column 'text'; it has other"),
        ("a.jsonl", b'{"text": 7}\n', "its column 'text' holds int, not text"),
        ("a.jsonl", b"{{{", "datasets cannot load it"),
        ("none/at-all", None, "no such file, and datasets cannot load it"),
    ],
)
def test_what_cannot_be_read_is_one_line(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
        name = str(tmp_path / name)
    with pytest.raises(InputError, match=said) as caught:
        list(packed(name, Letters(), 2))
    assert "\n" not in str(caught.value)


@given(count=st.integers(0, 40), size=st.integers(1, 50), seed=st.integers(0, 5))
def test_shuffled_is_a_permutation(count: int, size: int, seed: int) -> None:
    blocks = [torch.tensor([i]) for i in range(count)]
    found = [int(block) for block in shuffled(iter(blocks), random.Random(seed), size)]
    assert sorted(found) == list(range(count))
    assert found == [int(block) for block in shuffled(iter(blocks), random.Random(seed), size)]


@given(seed=st.integers(0, 3), held_out=st.integers(1, 4), skip=st.integers(0, 150))
def test_held_out_is_never_trained_on_and_a_restart_reads_on(
    seed: int, held_out: int, skip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = sources(tmp_path_factory.mktemp("text"))
    text = Text(names, Letters(), 8, held_out, seed)
    blocks = {name: list(packed(name, Letters(), 8)) for name in names}
    kept = text.held_out_blocks()
    assert torch.equal(kept, torch.stack([b for own in blocks.values() for b in own[:held_out]]))
    seen = list(islice(text.training_blocks(), 200))
    assert torch.equal(torch.stack(seen[skip:]), torch.stack(list(islice(text.training_blocks(skip), 200 - skip))))
    for own in blocks.values():
        allowed = [tuple(b.tolist()) for b in own[held_out:]]
        mine = [t for b in seen if (t := tuple(b.tolist())) in allowed]
        epoch = len(allowed)
        assert len(mine) > epoch  # it begins again, after every block once
        assert sorted(mine[:epoch]) == sorted(allowed)
        assert mine[:epoch] != allowed
    assert not {tuple(b.tolist()) for b in seen} & {tuple(b.tolist()) for b in kept}


def test_a_text_that_is_all_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of which 30 are held out"):
        Text(sources(tmp_path), Letters(), 8, held_out=30).held_out_blocks()


def test_text_from_python() -> None:
    """Rows and strings are documents; what can be read only once cannot be read again."""
    texts = [letter * 3 for letter in "abcdefgh"]
    wanted = [token for text in texts for token in (*Letters().ids(text), 0)]
    rows = [{"text": text} for text in texts]
    for source in (texts, rows, datasets.Dataset.from_list(rows)):
        assert joined(list(packed(source, Letters(), 4))) == wanted
    text = Text((rows,), Letters(), 4, held_out=2)
    assert text.identity()["text"] == ["list"]
    assert len(list(islice(text.training_blocks(), 20))) == 20
    with pytest.raises(InputError, match="training text generator: can be read only once"):
        list(packed((row for row in rows), Letters(), 4))
