"""The processes that all these tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.together import Together, group


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    with group(tmp_path_factory.mktemp("meeting")) as call:
        yield call
