"""How an engine will serve the model: what decides the memory of its caches, apart from the model."""

# No `from __future__ import annotations`: classes of other modules inherit these fields, and annotations that are text
# would be looked up there.
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sspruner.errors import InputError
from sspruner.recipes.flags import TARGET, FromText, read_texts, text, whole
from sspruner.recipes.texts import tokens_of

if TYPE_CHECKING:
    Tokens = int
else:  # a text such as 4k is read when the part is built: after that it is a number
    Tokens = int | str

#: Engines whose memory is counted by their own formulas (sspruner/benchmarking/engine_memory.py).
ENGINES = ("vllm", "sglang", "llama.cpp")


def engine_of(target: str | None) -> str:
    """Return the engine of a target whose memory is counted, without its backend: `vllm` of `vllm:cpu`; "" if none."""
    name = (target or "").partition(":")[0]
    return name if name in ENGINES else ""


#: Bytes of one number in a cache.
CACHE_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}


@Parameter(name="*", group=TARGET)
@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine that decide the memory of its caches. `None` is the engine's own default."""

    state_dtype: Annotated[str | None, text("NAME", default="the engine's")] = None
    """Dtype of the recurrent state in the engine: float32, bfloat16 or float16."""

    kv_dtype: Annotated[str | None, text("NAME", default="the engine's")] = None
    """Dtype of keys and values in the engine: float32, bfloat16, float16 or fp8."""

    prefix_caching: bool = False
    """The engine keeps states at prefixes, too: more slots for each sequence. In vLLM on by default for hybrids."""

    spec: Annotated[int, whole()] = 0
    """Tokens that a draft proposes in each step of speculative decoding."""

    replayssm: bool = False
    """The engine keeps a ring of the last inputs and writes states rarely (ReplaySSM)."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown dtype, and for fewer than no drafts."""
        for option, value in (("state-dtype", self.state_dtype), ("kv-dtype", self.kv_dtype)):
            known = [name for name in CACHE_DTYPES if option == "kv-dtype" or name != "fp8"]
            if value is not None and value not in known:
                raise InputError(f"{option} {value!r}: must be one of {', '.join(known)}")
        if self.spec < 0:
            raise InputError(f"spec {self.spec}: must be at least 0")

    @property
    def given(self) -> list[str]:
        """Return the names of the options that are set."""
        named = {
            "state-dtype": self.state_dtype,
            "kv-dtype": self.kv_dtype,
            "prefix-caching": self.prefix_caching,
            "spec": self.spec,
            "replayssm": self.replayssm,
        }
        return [name for name, value in named.items() if value]


DEFAULTS = EngineOptions()


@Parameter(name="*", group=TARGET)
@dataclass(frozen=True)
class Serving(EngineOptions):
    """How the target serves the sequences of --max-batch."""

    context: Annotated[Tokens, text("TOKENS"), FromText(tokens_of, "--context")] = 4096
    """Tokens of each sequence of --max-batch, where --target vllm or llama.cpp counts its memory; 32k is 32768."""

    def __post_init__(self) -> None:
        """Read a text such as 4k as a number. Raises InputError as `EngineOptions`, and below one token."""
        read_texts(self)
        super().__post_init__()
        if self.context < 1:
            raise InputError(f"context {self.context}: must be at least 1")
