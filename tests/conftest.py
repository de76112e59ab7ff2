"""Hypothesis profiles, shared fixtures, what `make test` leaves to CI, and where real text may be found."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before it is imported: what is not here is not looked for, minutes long
# Tiny models lose more to thread hand-over than they gain, above all when two suites share a machine.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, Phase, settings

from support.cover import cover
from support.paths import ROOT

# `make test` and CI take `fast`, which draws the same examples every time; `make test-all` takes `deep`.
settings.register_profile(
    "fast", max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", parent=settings.get_profile("fast"), max_examples=100, derandomize=False)
settings.register_profile(  # deliberate faults (tests/mutants): a failure is not shrunk
    "mutants", parent=settings.get_profile("fast"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

DATA = Path(os.environ.get("SSPRUNER_DATA", ROOT.parent / "shared" / "data"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Give the slow tests one more worker than there are cores: most of them wait for other processes."""
    return (os.cpu_count() or 1) + 1 if config.option.markexpr.startswith("slow") else None


def pytest_collection_finish() -> None:
    """Take what collecting made from the garbage collector, which would walk through it again and again."""
    gc.collect()
    gc.freeze()


MANY, SOME, FEW = 10, {"families": 5}, {"families": 3}  # a test over more families runs on some; a slow one on few


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `cover`, `make test` runs a few cases; of one marked `ci_cover`, CI runs as many as it says. The
    others are for `make test-all`. A test over all families without such a mark runs on some of them: other ones in
    every test.
    """
    tests = groupby(items, key=lambda item: item.nodeid.partition("[")[0])
    for name, same in [(name, list(group)) for name, group in tests]:
        fast, ci = (same[0].get_closest_marker(marker) for marker in ("cover", "ci_cover"))
        many = (
            len({case.get("family", case.get("variant", "")) for case in _cases(same)}) > MANY
            if hasattr(same[0], "callspec")
            else False
        )
        some = FEW if same[0].get_closest_marker("slow") else SOME
        if fast or many:
            _leave_out(same, name, fast.kwargs if fast else some, ["slow"])
        if ci or fast or many:
            _leave_out(same, name, (ci or fast).kwargs if ci or fast else some, ["slow", "exhaustive"])


def _leave_out(items: list[pytest.Item], name: str, size: dict[str, int], markers: list[str]) -> None:
    """Mark the cases of a test that a cover of that size does without."""
    kept = cover(_cases(items), name, **size)
    for item in (item for index, item in enumerate(items) if index not in kept):
        for marker in markers:
            item.add_marker(marker)


def _cases(items: list[pytest.Item]) -> list[dict[str, str]]:
    """The parameters of each case, as text: the same in every process, also for values that have no text."""
    numbers: dict[str, int] = {}
    cases = []
    for item in items:
        params = item.callspec.params.items()  # type: ignore[attr-defined]
        cases.append({
            name: value if isinstance(value, str) else str(numbers.setdefault(repr(value), len(numbers)))
            for name, value in params
        })  # fmt: skip
    return cases


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
