"""The kernel's number lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import number_list


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", {0}), ("0-3,7", {0, 1, 2, 3, 7}), ("5,1-1,5", {1, 5}), ("8191", {8191})]
)
def test_what_is_a_list(text: str, numbers: set[int]) -> None:
    assert number_list.parse(text) == numbers


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *((text, "not a list") for text in ("", " ", "a", "0-", "-1", "0,,1", "0-3:1/2", "0x1", "0\n", "٣", "9" * 40)),
        ("3-1", "3-1 goes backwards"),
        ("0-8192", "8192 is more"),
        ("0-999999999", "999999999 is more"),
    ],
)
def test_what_is_none(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        number_list.parse(text)


@given(st.sets(st.integers(0, number_list.LIMIT - 1), min_size=1))
def test_spelt_and_read_again(numbers: set[int]) -> None:
    assert number_list.parse(number_list.spelt(numbers)) == numbers


def test_the_shortest_spelling() -> None:
    assert number_list.spelt([3, 1, 2, 2, 7, 9, 8, 20]) == "1-3,7-9,20"
    assert number_list.spelt([]) == ""
