"""Hypothesis profiles, shared fixtures, and where real text may be found."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before it is imported: what is not here is not looked for, minutes long

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), max_examples=60, derandomize=True)
settings.register_profile(  # deliberate faults (tests/mutants): the same draws every time, and a failure is not shrunk
    "mutants", parent=settings.get_profile("dev"), derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Tiny models lose more to thread hand-over than they gain, above all when two suites share a machine.
torch.set_num_threads(1)

DATA = Path(os.environ.get("SSPRUNER_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where caches of scores are while tests run: never the user's own."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSPRUNER_CACHE", str(folder / "session"))
        yield folder


@pytest.fixture(autouse=True)
def own_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, so that none is given what another has scored."""
    folder = caches / uuid.uuid4().hex
    monkeypatch.setenv("SSPRUNER_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real text beside the checkout; tests that want it skip without it."""
    if not (DATA / "books-val.txt").is_file():
        pytest.skip(f"needs books-val.txt and books-test.txt in {DATA} (or set SSPRUNER_DATA)")
    return DATA


@pytest.fixture(scope="session")
def reference():
    """(model, tokenizer): the reference model in fp32, shared by tests that leave it as it was."""
    import sspruner

    return sspruner.load(dtype="float32")
