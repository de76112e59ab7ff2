"""Choose a few of a parametrized test's cases so that every value of every parameter still occurs."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

Case = dict[str, str]  # parameter -> value, as text


def cover(cases: Sequence[Case], salt: str, families: int = 2, least: int = 1, most: int | None = None) -> set[int]:
    """Return the indices of a small set of cases.

    - Every value of every parameter but `family` occurs in it, where a test has several parameters.
    - At least `families` of the families do; or, for a test with a single parameter, so many of its values.
    - There are at least `least` cases, where there are so many.
    - With `most`, there are no more than so many: for tests whose every case has values of its own.

    `salt` (the test's name) turns the order of the cases, so that other tests choose other families.
    """
    most = len(cases) if most is None else most
    alone = all(len(case) == 1 for case in cases)
    order = sorted(range(len(cases)), key=lambda i: crc32(f"{salt} {i}".encode()))
    wanted = {pair for case in cases for pair in case.items() if pair[0] != "family" and not alone}
    limited = "family" if any("family" in case for case in cases) else next(iter(cases[0]), "")
    enough = min(families, len({case.get(limited) for case in cases})) if alone or limited == "family" else 0
    chosen: set[int] = set()
    seen: set[tuple[str, str]] = set()

    def gain(index: int) -> tuple[int, bool]:
        new = set(cases[index].items()) - seen
        return len(new & wanted), any(name == limited for name, _ in new)

    while (wanted - seen) or len({value for name, value in seen if name == limited}) < enough:
        if len(chosen) == most:
            break
        best = max((i for i in order if i not in chosen), key=gain)
        chosen.add(best)
        seen |= set(cases[best].items())
    chosen |= set([i for i in order if i not in chosen][: max(0, least - len(chosen))])
    return chosen
