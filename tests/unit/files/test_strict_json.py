"""Strict JSON: any parser reads it, finite data as `json` writes them, and what is not finite comes back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sspruner.files import fields, strict_json

keys = st.text(max_size=6) | st.sampled_from(["/", "~", "~1", "a/b", "", "0"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
objects = st.dictionaries(keys.filter(lambda key: key != strict_json.NOT_FINITE), values, max_size=4)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def not_finite(value: Any) -> int:
    if isinstance(value, float):
        return not math.isfinite(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(not_finite, parts))


@given(objects)
@example({"a": {"b/c": [1.0, math.inf, {"~": -math.inf}]}, "": math.nan, "0": [[math.nan]]})
def test_what_is_written_is_strict_and_comes_back(data: dict[str, Any]) -> None:
    text = strict_json.dumps(data)
    plain = json.loads(text, parse_constant=pytest.fail)
    assert len(plain.get(strict_json.NOT_FINITE, {})) == not_finite(data)
    assert set(plain.get(strict_json.NOT_FINITE, {}).values()) <= {"NaN", "Infinity", "-Infinity"}
    assert same(strict_json.loads(text), data)
    assert same(strict_json.loads(json.dumps(data)), data)  # as version 0.1.0 wrote it


@given(objects.filter(lambda data: not not_finite(data)), st.sampled_from([None, 2]), st.booleans(), st.booleans())
def test_finite_data_are_what_json_writes(data: dict[str, Any], indent: Any, ascii: bool, order: bool) -> None:
    how: dict[str, Any] = {"indent": indent, "ensure_ascii": ascii, "sort_keys": order}
    assert strict_json.dumps(data, **how) == json.dumps(data, **how)


def test_tuples_and_keys_that_are_no_text_become_what_json_makes_of_them() -> None:
    data: dict[Any, Any] = {"a": (1, (2.5,)), "b": {0.5: 1, 7: 2, True: 3, None: 4}}
    assert strict_json.dumps(data) == json.dumps(data)
    text = strict_json.dumps({"curves": {0.5: (math.nan, 1.0)}})
    assert json.loads(text) == {"curves": {"0.5": [None, 1.0]}, "not_finite": {"/curves/0.5/0": "NaN"}}


@pytest.mark.parametrize("reasons", [
    {"/b": "NaN"}, {"/a": "nan"}, {"/a": None}, {"/a/0": "NaN"}, {"a": "NaN"}, {"": "NaN"}, {"/c": "NaN"},
    {"/d/x": "NaN"}, {"/d/7": "NaN"}, [], "NaN", None,
])  # fmt: skip
def test_reasons_that_fit_nowhere_are_refused(reasons: Any) -> None:
    text = json.dumps({"a": None, "c": 1.0, "d": [None], "not_finite": reasons})
    with pytest.raises((ValueError, TypeError)):
        strict_json.loads(text)


def test_the_key_of_reasons_is_taken() -> None:
    with pytest.raises(ValueError, match="not_finite"):
        strict_json.dumps({"not_finite": 1})


@pytest.mark.parametrize("check", [fields.number, fields.integer, fields.text, fields.flag, fields.table, fields.items])
def test_a_field_is_of_its_kind_and_of_no_other(check: Any) -> None:
    """null is a number, which is none; nothing else is of two kinds but a whole number."""
    fits = {fields.number: (3, 3.5, None), fields.integer: (3,), fields.text: ("x",), fields.flag: (True,),
            fields.table: ({},), fields.items: ([],)}[check]  # fmt: skip
    for value in (3, 3.5, None, "x", True, {}, []):
        if any(value is fit or (type(value) is type(fit) and value == fit) for fit in fits):
            assert check(value) == value or (value is None and math.isnan(check(value)))
        else:
            with pytest.raises(TypeError):
                check(value)
