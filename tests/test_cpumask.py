"""CPU masks as text: what Linux prints, what it takes, what it says to the rest (as recorded from a real one)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.errno import Errno
from pvirq.linux.cpumask import list_text, mask_text, parse_list, parse_mask
from pvirq.linux.irqdesc import IrqError


@pytest.mark.parametrize(
    ("mask", "bits", "text"),
    [
        (3, 2, "3"),
        (0, 2, "0"),
        (1, 4, "1"),
        (1, 5, "01"),
        (0xF, 32, "0000000f"),
        (1, 33, "0,00000001"),
        (0x12_89ABCDEF, 40, "12,89abcdef"),
        (1 << 64, 65, "1,00000000,00000000"),
        (1, 128, "00000000,00000000,00000000,00000001"),
    ],
)
def test_masks(mask: int, bits: int, text: str) -> None:
    assert mask_text(mask, bits) == text
    assert parse_mask(text + "\n", bits) == mask


@pytest.mark.parametrize(
    ("mask", "text"), [(0, ""), (1, "0"), (3, "0-1"), (0b1011, "0-1,3"), (0xF0F0, "4-7,12-15"), (1 << 200, "200")]
)
def test_lists(mask: int, text: str) -> None:
    assert list_text(mask) == text
    assert parse_list(text + "\n", 256) == mask


@given(st.integers(0, (1 << 300) - 1), st.integers(300, 400))
def test_what_is_printed_can_be_read(mask: int, bits: int) -> None:
    assert parse_mask(mask_text(mask, bits), bits) == mask
    assert parse_list(list_text(mask), bits) == mask


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # On a machine with two CPUs.
        ("0x3", Errno.EINVAL),
        ("fffffffff", Errno.EOVERFLOW),
        ("123456789", Errno.EOVERFLOW),
        ("4", Errno.EOVERFLOW),
        ("g", Errno.EINVAL),
        ("1,0", Errno.EOVERFLOW),
        ("0,1", Errno.EOVERFLOW),
        ("x12345678", Errno.EINVAL),
        ("", 0),
        (" 1 ", 1),
        ("3\n", 3),
        ("00000001", 1),
    ],
)
def test_masks_from_userland(text: str, answer: int) -> None:
    if isinstance(answer, Errno):
        with pytest.raises(IrqError) as error:
            parse_mask(text, 2)
        assert error.value.errno == answer
    else:
        assert parse_mask(text, 2) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2", Errno.ERANGE),
        ("0-1", 3),
        ("1-0", Errno.EINVAL),
        ("N", 2),
        ("0-N", 3),
        ("all", 3),
        ("0-3", Errno.ERANGE),
        ("4294967296", Errno.EOVERFLOW),
        ("x", Errno.EINVAL),
        ("0-1:1/2", 1),
        ("all:1/2", 1),
        ("0-1:2/1", Errno.EINVAL),
        ("0-1:1/0", Errno.EINVAL),
        ("0,1", 3),
        ("0 1", 3),
        ("-1", Errno.EINVAL),
        ("", 0),
    ],
)
def test_lists_from_userland(text: str, answer: int) -> None:
    if isinstance(answer, Errno):
        with pytest.raises(IrqError) as error:
            parse_list(text, 2)
        assert error.value.errno == answer
    else:
        assert parse_list(text, 2) == answer
