"""Read documents: the texts in files, in folders of them, in datasets, and in rows from Python.

Tables (JSON lines, JSON, CSV, TSV, Parquet, Arrow) and datasets are read by `datasets`, row by row; a row's text is in
one column, or it is a conversation that the tokenizer's template writes as text. Nothing here unpickles or runs code.
"""

from __future__ import annotations

import codecs
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sspruner.calibrate.hostile import PACKED, UNREADABLE, check_nesting, check_unpacked
from sspruner.errors import InputError, Remark

#: Suffix of a table -> its loader in `datasets`, and the loader's options.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {"batch_size": 1024}),  # rows in memory at once, however large the file's row groups
    ".arrow": ("arrow", {}),
}
PLAIN = (".txt", ".text")  # plain text among the files of a folder; a single file is plain unless it is a table
NO_TEXT = (
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".zst", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz"),
    *(".safetensors", ".gguf", ".pdf", ".doc", ".docx", ".xlsx", ".h5", ".png", ".jpg"),
)
READABLE = f"plain text, {', '.join(TABLES)}, each also as .gz, .bz2 or .xz, a folder of these, or a dataset"
COLUMNS = ("text", "messages")  # where a row's text is, if nobody says so: the first of them
MOST_NAMES = 20  # of columns in an error
CHARACTERS = 2**16  # of plain text read at once, up to the last white space
MOST_CHARACTERS = 2**26  # of a text that is read whole, some 20 million tokens; what follows is left unread


@dataclass(frozen=True)
class Reading:
    """How to read documents.

    what       what they are for, the first word of errors
    column     column of a row's text; "" takes the first of COLUMNS that it has
    tokenizer  its template writes conversations as text
    split      split of a dataset that names none
    stream     read a dataset of the hub while it is downloaded; otherwise it is downloaded first, and kept
    """

    what: str = "calibration"
    column: str = ""
    tokenizer: Any = None
    split: str = "train"
    stream: bool = False


def read_text(name: str, reading: Reading) -> str:
    """Return all documents of a file, a folder or a dataset as one text.

    Warns if it is longer than about MOST_CHARACTERS, after which nothing is read.
    Raises InputError if it is missing, empty, or not text.
    """
    parts: list[str] = []
    size = 0
    for piece, last in pieces(name, reading):
        parts += [piece, "\n\n" if last else ""]
        size += len(piece)
        if size >= MOST_CHARACTERS:
            said = f"{reading.what} {name}: the first {size:,} characters are read; what follows is left out"
            warnings.warn(said, Remark, stacklevel=2)
            break
    text = "".join(parts[:-1])
    if not text.strip():
        raise InputError(f"{reading.what} {name}: empty")
    return text


def pieces(name: str, reading: Reading) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends with it). Plain text comes in parts that end with white space.

    name: a file, a folder, or a dataset as NAME[:CONFIG[:SPLIT]].
    """
    if not name.strip():
        raise InputError(f"{reading.what}: the name is empty; give self, a text file or a dataset")
    path = Path(name).expanduser()
    if path.is_file():
        yield from _file(path, name, reading)
    elif not path.exists() and kind(path) in (*TABLES, *PLAIN, ".md", *NO_TEXT):
        raise InputError(f"{reading.what} file {name}: no such file")
    else:
        yield from ((text, True) for text in texts_of(_rows(name, reading), name, reading))


def texts_of(rows: Iterable[Any], name: str, reading: Reading) -> Iterator[str]:
    """Yield the text of each row. A row is a mapping from columns, a text, or the turns of a conversation.

    Rows without a value are left out. Raises InputError for any other row, with its number.
    """
    place = f"{reading.what} {name}"
    for number, row in enumerate(rows):
        value = row
        if isinstance(row, Mapping):
            column = reading.column or next((column for column in COLUMNS if column in row), COLUMNS[0])
            if column not in row:
                names = [*map(str, row)]
                more = f" and {len(names) - MOST_NAMES:,} others" if len(names) > MOST_NAMES else ""
                listed = ", ".join(names[:MOST_NAMES]) + more
                raise InputError(
                    f"{place}: no column {column!r}; it has {listed}: name the one of the text (--text-column)"
                )
            value = row[column]
        if value is None:
            continue
        if is_conversation(value):
            yield _written(value, f"{place}: row {number}", reading.tokenizer)
        elif isinstance(value, str):
            yield value
        else:
            held = f"its column {column!r}" if isinstance(row, Mapping) else f"row {number}"
            raise InputError(f"{place}: {held} holds {type(value).__name__}, not text")


def is_conversation(value: Any) -> bool:
    """Check whether a value is a list of turns, mappings with a role."""
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping) and "role" in value[0]


def _written(turns: Any, place: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{place} is a conversation, and the tokenizer has no chat template to write it as text")
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False)
    except Exception as error:  # a template is a program
        raise InputError(f"{place}: the tokenizer's chat template cannot write it: {_brief(error)}") from error
    return text


def kind(path: Path) -> str:
    """Return the suffix that says what a file holds: that before .gz, .bz2 or .xz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def _file(path: Path, name: str, reading: Reading) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of one file."""
    found = kind(path)
    if found in NO_TEXT:
        raise InputError(f"{reading.what} file {name}: {found} is not read as text; give {READABLE}")
    check_unpacked(path, f"{reading.what} file {name}")
    if found in TABLES:
        yield from ((text, True) for text in texts_of(_table([path], name, reading), name, reading))
    else:
        yield from _plain(path, name, reading)


def _plain(path: Path, name: str, reading: Reading) -> Iterator[tuple[str, bool]]:
    """Yield a plain text in parts that end with white space."""
    unpacked, left = PACKED.get(path.suffix.lower(), open), ""
    try:
        with unpacked(path, "rt", encoding="utf-8-sig", newline="") as file:
            while more := file.read(CHARACTERS):
                if "\0" in more:
                    raise InputError(f"{reading.what} file {name}: holds NUL characters; convert it to UTF-8 text")
                text = left + more
                cut = max(text.rfind(" "), text.rfind("\n")) + 1 or len(text)
                yield text[:cut], False
                left = text[cut:]
    except UnicodeDecodeError as error:
        at = _first_bad_byte(unpacked, path)
        raise InputError(f"{reading.what} file {name}: not UTF-8 (byte {at}); convert it") from error
    except UNREADABLE as error:
        raise InputError(f"{reading.what} file {name}: cannot be read ({_brief(error)})") from error
    yield left, True


def _first_bad_byte(unpacked: Callable[..., Any], path: Path) -> int:
    """Return the place of the first byte that is not UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with unpacked(path, "rb") as file:
        while data := file.read(CHARACTERS):
            waiting = len(decoder.getstate()[0])  # the first bytes of a character that goes on
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                return done - waiting + error.start
            done += len(data)
    return done - len(decoder.getstate()[0])  # it ends within a character


def _rows(name: str, reading: Reading) -> Iterator[Any]:
    """Yield the rows of a folder or a dataset, NAME[:CONFIG[:SPLIT]]; of plain text in a folder, whole files."""
    path, config, split = [*name.split(":"), "", ""][:3]
    folder = Path(path).expanduser()
    if not folder.is_dir():
        options: dict[str, Any] = {"split": split or reading.split, "streaming": reading.stream}
        return _loaded(name, reading, lambda load: load(path, config or None, **options))
    if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _saved_to_disk(folder, split, name, reading)
    files = _files(folder, split or reading.split, name, reading)
    if kind(files[0]) in PLAIN:
        return ("".join(part for part, _ in _file(file, str(file), reading)) for file in files)
    return _table(files, name, reading)


def _files(folder: Path, split: str, name: str, reading: Reading) -> list[Path]:
    """Return the files of a folder that hold a split, by the names that `datasets` knows.

    Raises InputError if none can be read, and for files of several kinds.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    place = f"{reading.what} {name}"
    try:
        patterns = {str(key): found for key, found in get_data_patterns(str(folder)).items()}
    except EmptyDatasetError:
        raise InputError(f"{place}: an empty folder; give {READABLE}") from None
    if split not in patterns:
        raise InputError(f"{place}: no split {split!r}; it has {', '.join(patterns)}: NAME::SPLIT names one")
    inside = {
        file for pattern in patterns[split] for file in folder.glob(f"{pattern}/*" if pattern == "**" else pattern)
    }
    files = sorted(f for f in inside if f.is_file() and kind(f) in (*TABLES, *PLAIN) and not _hidden(f, folder))
    kinds = sorted({kind(file) for file in files})
    if not files:
        raise InputError(f"{place}: none of its files is text; give {READABLE}")
    if len(kinds) > 1:
        raise InputError(f"{place}: holds {' and '.join(kinds)} files; name one of them")
    return files


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def _table(files: Sequence[Path], name: str, reading: Reading) -> Iterator[Any]:
    """Yield the rows of tables of one kind, as a stream."""
    loader, options = TABLES[kind(files[0])]
    for file in files:
        check_unpacked(file, f"{reading.what} file {file}")
        if loader == "json":
            check_nesting(file, f"{reading.what} file {file}")
    data = [str(file) for file in files]
    return _loaded(name, reading, lambda load: load(loader, data_files=data, split="train", streaming=True, **options))


def _saved_to_disk(folder: Path, split: str, name: str, reading: Reading) -> Iterator[Any]:
    """Yield the rows of a folder that `save_to_disk` wrote; of several splits, the one that is named."""
    import datasets

    place = f"{reading.what} {name}"
    for state in folder.rglob("state.json"):
        for file in _data_files(state, place):
            if Path(file).name != file:
                raise InputError(f"{place}: {state.name} names a file outside its folder: {file!r}")
    found = _tried(name, reading, lambda: datasets.load_from_disk(str(folder)))
    if isinstance(found, datasets.DatasetDict):
        wanted = split or (reading.split if reading.split in found or len(found) > 1 else next(iter(found), ""))
        if wanted not in found:
            raise InputError(f"{place}: no split {wanted!r}; it has {', '.join(found)}: NAME::SPLIT names one")
        found = found[wanted]
    return iter(found)


def _data_files(state: Path, place: str) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{place}: {state.name} is damaged ({_brief(error)})") from error


def _loaded(name: str, reading: Reading, load: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """Yield the rows that `load` gives, called with `datasets.load_dataset`. Raises InputError whatever goes wrong."""
    import datasets

    rows = iter(_tried(name, reading, lambda: load(datasets.load_dataset)))
    nothing = object()
    while (row := _tried(name, reading, lambda: next(rows, nothing))) is not nothing:
        yield row


def _tried(name: str, reading: Reading, step: Callable[[], Any]) -> Any:
    """Return what a step of `datasets` gives. The hub, a loader or a parser may fail in any way: then InputError."""
    try:
        with quiet():
            return step()
    except Exception as error:
        missing = "" if Path(name.partition(":")[0]).expanduser().exists() else "no such file, and "
        raise InputError(f"{reading.what} {name}: {missing}datasets cannot load it: {_brief(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences datasets' progress bars and log messages. Errors are raised."""
    import datasets

    silent, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not silent:
            datasets.enable_progress_bars()


def _brief(error: Exception) -> str:
    """Return the first line of what went wrong first."""
    return str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
