"""Numbers as text: sizes in decimal units, and values with the digits that their intervals leave certain."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspruner.units import as_bytes, interval_text, number_text

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


def read(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(text.replace("+", ""))]


def test_sizes_have_three_digits_and_decimal_units() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 999_499: "999 kB", 999_500: "1.00 MB", 393_216: "393 kB"}
    sizes |= {1_572_864: "1.57 MB", 10**9: "1.00 GB", 10**15: "1000 TB"}
    assert {size: as_bytes(size) for size in sizes} == sizes


@given(st.integers(0, 10**14))
def test_a_size_is_right_to_half_of_its_last_digit(size: int) -> None:
    number, unit = as_bytes(size).split(" ")
    power = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * power - size) <= 0.5001 * 10 ** -len(number.partition(".")[2]) * power * (size > 0)
    assert unit == "B" or len(number.replace(".", "")) == 3


def test_numbers_have_four_digits_and_small_ones_an_exponent() -> None:
    shown = {
        58.0364: "58.04",
        12345.6: "12,346",
        0: "0",
        0.0123456: "0.01235",
        9.7559e-05: "9.8e-5",
        -2e-12: "-2.0e-12",
    }
    assert {value: number_text(value) for value in shown} == shown
    assert (number_text(math.inf), number_text(math.nan)) == ("inf", "nan")


def test_an_interval_decides_how_many_digits_are_shown() -> None:
    assert interval_text((0.4512, 0.3, 0.6), unit=" %", sign="+") == "+0.45 % (+0.30 to +0.60)"
    assert interval_text((58.0364, 57.1, 59.2)) == "58.0 (57.1 to 59.2)"
    assert interval_text((9.7559e-05, 9.2264e-05, 0.00010303)) == "9.8e-5 (9.2e-5 to 1.0e-4)"
    assert interval_text((2310.4, 2200, 2500)) == "2,310 (2,200 to 2,500)"
    assert interval_text((58.0364, 58.0364, 58.0364)) == "58.04"
    assert interval_text((1.5, 1.5, 1.5), unit=" %", sign="+") == "+1.5 %"
    assert interval_text((math.inf, 1.0, math.inf)) == "inf"


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e5), st.floats(0, 1))
def test_rounding_is_small_beside_the_interval_and_keeps_its_order(value: float, width: float, part: float) -> None:
    interval = (value, value - part * width, value + (1 - part) * width)
    if not interval[1] < interval[2]:
        return
    found = read(interval_text(interval))
    assert len(found) == 3
    assert found[1] <= found[0] <= found[2]
    small = max(map(abs, interval[1:])) < 1e-3
    for shown, wanted in zip(found, interval, strict=True):  # to two digits of half the width, or five of the value
        allowed = 0.05 * abs(wanted) if small else max(width / 40, 5e-5 * abs(value), 5e-7)
        assert abs(shown - wanted) <= 1.001 * allowed


@pytest.mark.parametrize("sign", ["", "+"])
def test_a_sign_is_shown_where_it_is_wanted(sign: str) -> None:
    assert interval_text((1.0, -1.0, 2.0), sign=sign).startswith(f"{sign}1.0 (-1.0 to {sign}2.0")
