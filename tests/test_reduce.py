"""The fewest choices with which a run still fails (pvirq.lab.reduce)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from pvirq.lab.reduce import reduce

Choices = Mapping[int, int]
Test = Callable[[Choices], bool]

CHOICES = st.dictionaries(st.integers(0, 1000), st.integers(1, 4), max_size=12)


def counted(fails: Test) -> tuple[Test, list[Choices]]:
    tried: list[Choices] = []

    def test(choices: Choices) -> bool:
        tried.append(dict(choices))
        return fails(choices)

    return test, tried


def anything(start: Choices, salt: int) -> Test:
    """Fails for what it was given, and for about a third of all else."""

    def fails(choices: Choices) -> bool:
        return choices == start or zlib.crc32(repr((salt, sorted(choices.items()))).encode()) % 3 == 0

    return fails


def test_two_of_many() -> None:
    fails, tried = counted(lambda choices: choices.get(17, 0) >= 2 and 401 in choices)
    assert reduce(fails, {number: 1 + number % 4 for number in range(1, 500)}) == {17: 2, 401: 1}
    assert len(tried) < 100


def test_one_that_fails_anyhow_needs_none() -> None:
    fails, tried = counted(lambda choices: True)
    assert reduce(fails, {1: 1, 2: 2}) == {}
    assert tried == [{}]


def test_none_are_none() -> None:
    fails, tried = counted(lambda choices: True)
    assert reduce(fails, {}) == reduce(fails, {3: 0}) == {}
    assert tried == []


@given(CHOICES, st.integers())
def test_what_is_left_fails_and_needs_all_of_it(start: Choices, salt: int) -> None:
    fails = anything(start, salt)
    left = reduce(fails, start, tries=100_000)
    assert fails(left)
    assert all(0 < choice <= start.get(number, 0) for number, choice in left.items())
    for number in left:
        assert not fails({other: choice for other, choice in left.items() if other != number})
        assert not any(fails({**left, number: smaller}) for smaller in range(1, left[number]))


@given(CHOICES, st.sets(st.integers(0, 11), max_size=4))
def test_what_is_needed_together_is_found(start: Choices, picks: set[int]) -> None:
    numbers = sorted(start)
    needed = {numbers[pick]: start[numbers[pick]] for pick in picks if pick < len(numbers)}
    assert reduce(lambda choices: needed.items() <= choices.items(), start, tries=100_000) == needed


@given(CHOICES, st.integers(), st.integers(0, 20))
def test_tries_are_an_end_and_the_best_until_then_counts(start: Choices, salt: int, tries: int) -> None:
    fails, tried = counted(anything(start, salt))
    left = reduce(fails, start, tries=tries)
    assert len(tried) <= tries
    assert anything(start, salt)(left)
    assert reduce(anything(start, salt), start, tries=tries) == left
    assert len({repr(choices) for choices in tried}) == len(tried)  # none twice


def test_it_goes_on_only_while_it_may() -> None:
    fails, tried = counted(lambda choices: 7 in choices)
    left = reduce(fails, dict.fromkeys(range(16), 1), go_on=lambda: len(tried) < 3)
    assert len(tried) == 3
    assert 7 in left
