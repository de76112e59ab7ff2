"""Hashes of the text that a calibration observed, so that no held-out text is among it.

A window of calibration text is kept as the hashes of its runs of RUN tokens, which lie end to end; the last run ends
with the window. Text to be measured is hashed at every offset, so that it is found wherever it lies in a calibration
window. A window was observed if it has a run of at least half a window that lies in observed runs: half of the shorter
window, its own or the calibration's. Of text that both have, up to RUN - 1 tokens at each end may be missed. Shorter
repetitions, such as headings, templates and common phrases, are no alarm. Windows of fewer than RUN tokens repeat each
other by chance, and are not compared. Of values, steps take the place of tokens.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sspruner.errors import InputError
from sspruner.files import strict_json
from sspruner.files.fields import integer, text, versioned
from sspruner.files.output import write_file

RUN = 16  # tokens in a run
BYTES = 6  # of SHA-256: of a million runs and a million offsets, one in 300 pairs of texts has a single run by chance
FILE = "calibrated.json"  # in the folder of a cut model
KEY = "calibrated"  # in the metadata of scores, and in `made_by` of plans
MARK = "_sspruner_calibrated"  # attribute of a cut model


@dataclass(frozen=True)
class Seen:
    """Runs of tokens that a calibration observed.

    half: half of the length of its windows, in tokens; of several calibrations the least.
    """

    hashes: frozenset[bytes] = frozenset()
    half: int = 0

    @classmethod
    def of(cls, tokens: torch.Tensor, mask: torch.Tensor) -> Seen:
        """Hash calibration windows. tokens int64 (S, T), mask bool (S, T): False where padding."""
        hashes: set[bytes] = set()
        for window, kept in zip(tokens, mask, strict=True):
            data, count = _bytes(window[kept])
            starts = [*range(0, count - RUN + 1, RUN), count - RUN]
            hashes |= {_hash(data, start) for start in starts if start >= 0}
        return cls(frozenset(hashes), tokens.shape[1] // 2)

    def __bool__(self) -> bool:
        return bool(self.hashes)

    def __or__(self, other: Seen) -> Seen:
        if not self or not other:
            return self or other
        return Seen(self.hashes | other.hashes, min(self.half, other.half))

    def has(self, window: torch.Tensor, length: int | None = None) -> bool:
        """Return whether a window was observed. window: int64 (T,), without padding.

        length: of the windows in which it is measured, for a text that has several; default T.
        """
        data, count = _bytes(window)
        enough = max(RUN, min(self.half, min(length or count, count) // 2))
        first = end = -1  # of the observed tokens up to here
        for start in range(count - RUN + 1):
            if _hash(data, start) in self.hashes:
                first = start if start > end else first
                end = start + RUN
                if end - first >= enough:
                    return True
        return False

    def among(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return which windows were observed, bool (S,). tokens int64 (S, T), mask bool (S, T)."""
        return torch.tensor([self.has(row[kept]) for row, kept in zip(tokens, mask, strict=True)], dtype=torch.bool)

    def to_json(self) -> str:
        """Return the content of calibrated.json."""
        packed = base64.b64encode(b"".join(sorted(self.hashes))).decode()
        return strict_json.dumps({"version": 1, "run": RUN, "half": self.half, "hashes": packed})

    @classmethod
    def from_json(cls, data: Any) -> Seen:
        """Parse what `to_json` writes. Raises KeyError, TypeError or ValueError for anything else."""
        fields = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        if integer(fields["run"]) != RUN:
            raise ValueError(f"its runs have {fields['run']} tokens, not {RUN}")
        try:
            packed = base64.b64decode(text(fields["hashes"]), validate=True)
        except binascii.Error as error:
            raise ValueError(f"its hashes are not base64 ({error})") from error
        if len(packed) % BYTES:
            raise ValueError("its last hash is cut off")
        parts = (packed[i : i + BYTES] for i in range(0, len(packed), BYTES))
        return cls(frozenset(parts), integer(fields["half"]))


def seen_by(record: dict[str, Any]) -> Seen:
    """Return what `made_by` of a plan, or the metadata of scores, say was observed; nothing if they are damaged."""
    try:
        return Seen.from_json(record[KEY])
    except strict_json.DAMAGE:
        return Seen()


def with_seen(record: dict[str, Any], more: Seen) -> dict[str, Any]:
    """Return `made_by` of a plan with more observed text."""
    return {**record, KEY: (seen_by(record) | more).to_json()} if more else record


def seen_of(model: Any) -> Seen:
    """Return the text that the cuts of a model were calibrated on; nothing for a dense model."""
    found: Seen = getattr(model, MARK, Seen())
    return found


def remember(model: Any, seen: Seen) -> None:
    """Note in a model that a cut of it was calibrated on some text, beside that of earlier cuts."""
    if seen:
        setattr(model, MARK, seen_of(model) | seen)


def write_seen(model: Any, folder: Path) -> None:
    """Write calibrated.json for a model whose cuts were calibrated."""
    if seen := seen_of(model):
        write_file(folder / FILE, seen.to_json() + "\n")


def read_seen(model: Any, folder: Path) -> None:
    """Note in a model what calibrated.json of its folder says, if there is one. Raises InputError for a damaged one."""
    if (folder / FILE).is_file():
        remember(model, strict_json.load("record of calibration", folder / FILE, Seen.from_json))


def refuse_seen(seen: Seen, windows: Iterable[torch.Tensor], what: str, length: int | None = None) -> None:
    """Raise InputError if text to be measured was calibrated on. windows: int64 (T,) each, without padding.

    what: names the text in the error. length: see `Seen.has`.
    """
    for number, window in enumerate(windows):
        if seen and seen.has(window, length):
            raise InputError(
                f"{what}: window {number + 1} was calibrated on, so that its numbers would be too good; measure on "
                "text that no cut was calibrated on"
            )


def _bytes(window: torch.Tensor) -> tuple[bytes, int]:
    """Return 8 bytes for each token, or for each step of values (T, ...) their hash; and how many there are."""
    window = window.detach().cpu().contiguous()
    if window.is_floating_point():
        steps = (hashlib.sha256(step.numpy().tobytes()).digest()[:8] for step in window.float())
        return b"".join(steps), len(window)
    return window.long().numpy().astype("<i8").tobytes(), len(window)


def _hash(data: bytes, start: int) -> bytes:
    return hashlib.sha256(data[8 * start : 8 * (start + RUN)]).digest()[:BYTES]
