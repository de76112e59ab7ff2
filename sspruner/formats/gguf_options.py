"""Options of the export gguf, without torch: element types, the pre-tokenizer's name, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from sspruner.errors import InputError
from sspruner.recipes.flags import TARGET, text

FILE = "model.gguf"
BLOCK = 32  # elements that share a scale in the quantised types
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # the formats that the package gguf writes


@Parameter(name="*", group=TARGET)
@dataclass(frozen=True)
class GGUF:
    """The export format gguf with its options. Raises InputError for an unknown type."""

    type: Annotated[str | None, text("TYPE", name="--gguf-type", default="the model's")] = None
    """Element type of matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."""

    pre: Annotated[str | None, text("NAME", name="--pre")] = None
    """llama.cpp's name of the pre-tokenizer, if it is not recognised."""

    padded: Annotated[bool, Parameter(parse=False)] = False
    """Pad layers of different sizes with zeros: the format gguf-padded."""

    def __post_init__(self) -> None:
        if self.type is not None and self.type not in TYPES:
            raise InputError(f"--gguf-type {self.type}: unknown type; known: {', '.join(TYPES)}")

    @property
    def format(self) -> str:
        """Return the name of the export format."""
        return "gguf-padded" if self.padded else "gguf"
