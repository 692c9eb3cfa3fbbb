"""Functions of modules by their names, in a guest's memory that is made here: whole, and broken in all ways."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.pv.module_symbols import SYM, ModuleLayout, find_in_modules, module_layout

LAYOUT = ModuleLayout(list=8, kallsyms=40, symtab=0, num_symtab=8, strtab=16)
BASE, HEAD = 0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_C000_0000
FUNCTION = 0xFFFF_FFFF_C020_32B0


class Memory:
    """Pages from BASE on; everything else isn't there."""

    def __init__(self, size: int = 0x4000) -> None:
        self.data = bytearray(size)
        self.reads = 0

    def read(self, va: int, size: int) -> bytes:
        at = va - BASE
        if at < 0 or at + size > len(self.data):
            raise XenError(Errno.EFAULT, f"{va:#x}")
        self.reads += 1
        return bytes(self.data[at : at + size])

    def put(self, at: int, form: str, *values: int) -> None:
        struct.pack_into(form, self.data, at, *values)


def two_modules() -> Memory:
    """The list's head at 0, modules at 0x100 and 0x200; the second has the function, its name over a page's end."""
    memory = Memory()
    first, second = 0x100, 0x200
    memory.put(0, "<Q", BASE + first + LAYOUT.list)
    memory.put(first + LAYOUT.list, "<Q", BASE + second + LAYOUT.list)
    memory.put(second + LAYOUT.list, "<Q", HEAD)
    for module, symtab, count in ((first, 0x400, 1), (second, 0x500, 3)):
        memory.put(module + LAYOUT.kallsyms, "<Q", BASE + module + 0x80)
        memory.put(module + 0x80, "<QIxxxxQ", BASE + symtab, count, BASE + 0xFF8)
    SYM.pack_into(memory.data, 0x400, 1, 0, 0, 1, FUNCTION + 8, 0)
    SYM.pack_into(memory.data, 0x500, 1, 0, 0, 0, FUNCTION, 0)  # of no section: undefined
    SYM.pack_into(memory.data, 0x500 + SYM.size, 1, 0, 0, 1, FUNCTION - 8, 0)
    SYM.pack_into(memory.data, 0x500 + 2 * SYM.size, 1, 0, 0, 1, FUNCTION, 0)
    memory.data[0xFF8:0x1008] = b"\0blkif_interrupt"
    return memory


def test_a_function_of_the_second_module() -> None:
    assert find_in_modules(two_modules().read, HEAD, LAYOUT, FUNCTION) == "blkif_interrupt"


@pytest.mark.parametrize("address", [FUNCTION + 1, 0])
def test_an_address_of_none(address: int) -> None:
    assert find_in_modules(two_modules().read, HEAD, LAYOUT, address) is None


def test_a_list_without_end() -> None:
    memory = two_modules()
    memory.put(0x200 + LAYOUT.list, "<Q", BASE + 0x100 + LAYOUT.list)
    assert find_in_modules(memory.read, HEAD, LAYOUT, 1) is None
    assert memory.reads < 10_000


def test_more_symbols_than_there_can_be() -> None:
    memory = two_modules()
    memory.put(0x180 + LAYOUT.num_symtab, "<I", 0xFFFFFFFF)  # of the first: what it says isn't there
    assert find_in_modules(memory.read, HEAD, LAYOUT, FUNCTION) == "blkif_interrupt"


@given(st.lists(st.tuples(st.integers(0, 0x600), st.integers(0, 255)), max_size=16))
def test_damage_raises_nothing(changes: list[tuple[int, int]]) -> None:
    memory = two_modules()
    for at, value in changes:
        memory.data[at] = value
    find_in_modules(memory.read, HEAD, LAYOUT, FUNCTION)
    assert memory.reads < 20_000


def test_layouts() -> None:
    module, kallsyms = {"list": 8, "kallsyms": 40}, {"symtab": 0, "num_symtab": 8, "strtab": 16}
    assert module_layout(module, kallsyms) == LAYOUT
    assert module_layout(None, kallsyms) is None
    assert module_layout({"list": 8}, kallsyms) is None
