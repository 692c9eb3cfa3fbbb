"""States as numbers: there and back, field by field."""

from __future__ import annotations

import pytest

from pvirq.check.numbers import Full, Numbers

STATES = [("a", 0, ()), ("b", 0, ((1, 2),)), ("b", 7, ()), ("a", None, ((1, 2), (3, 4)))]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_a_number_stands_for_one_state(bits: int) -> None:
    numbers = Numbers(3, bits)
    found = [numbers.number(state) for state in STATES]
    assert len(set(found)) == len(STATES)
    assert [numbers.state(number) for number in found] == STATES
    assert [numbers.number(state) for state in STATES] == found


def test_a_change_of_some_fields_leaves_the_others() -> None:
    numbers = Numbers(3, 16)
    before = numbers.number(("a", 0, ()))
    keep = numbers.all ^ numbers.fields([0, 2])
    put = numbers.put(0, "b") | numbers.put(2, (1,))
    assert numbers.state(before & keep | put) == ("b", 0, (1,))
    # What hangs on the field between is found by what is there before and after.
    assert before & numbers.fields([1]) == (before & keep | put) & numbers.fields([1])


def test_a_field_has_so_many_values() -> None:
    numbers = Numbers(2, 8)
    for value in range(256):
        numbers.put(1, value)
    assert numbers.state(numbers.put(1, 255) | numbers.put(0, "a")) == ("a", 255)
    with pytest.raises(Full):
        numbers.put(1, 256)
