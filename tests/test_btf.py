"""Layouts of structures out of BTF: what is in a section made here, and what becomes of damaged ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.pv.btf import btf_of, layouts
from pvirq.pv.image import load_image
from pvirq.toolstack.kernels import KernelChoice

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, FUNC_PROTO, VAR, DATASEC, ENUM64 = 1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 19


class Maker:
    """Writes a BTF section."""

    def __init__(self) -> None:
        self.strings = bytearray(b"\0")
        self.places = {"": 0}
        self.types = b""

    def text(self, text: str) -> int:
        if text not in self.places:  # each is there once
            self.places[text] = len(self.strings)
            self.strings += text.encode() + b"\0"
        return self.places[text]

    def add(self, kind: int, name: str, tail: bytes = b"", count: int = 0, flag: int = 0) -> None:
        self.types += struct.pack("<III", self.text(name), flag << 31 | kind << 24 | count, 8) + tail

    def struct(self, name: str, members: dict[str, int], *, flag: int = 0) -> None:
        """Members by their offsets in bits."""
        tail = b"".join(struct.pack("<III", self.text(member), 1, bits) for member, bits in members.items())
        self.add(STRUCT, name, tail, len(members), flag)

    def section(self, magic: int = 0xEB9F) -> memoryview:
        size = len(self.types)
        header = struct.pack("<HBBIIIII", magic, 1, 0, 24, 0, size, size, len(self.strings))
        return memoryview(header + self.types + bytes(self.strings))


def every_kind() -> Maker:
    """A type of each kind that has a tail, so that what follows is only found by skipping it rightly."""
    maker = Maker()
    maker.add(INT, "int", bytes(4))
    maker.add(PTR, "")
    maker.add(ARRAY, "", bytes(12))
    maker.add(UNION, "u", bytes(24), 2)
    maker.add(ENUM, "e", bytes(24), 3)
    maker.add(FWD, "line")
    maker.add(FUNC_PROTO, "", bytes(8), 1)
    maker.add(VAR, "v", bytes(4))
    maker.add(DATASEC, ".data", bytes(12), 1)
    maker.add(ENUM64, "e64", bytes(12), 1)
    maker.struct("line", {"irq": 32, "": 64, "action": 128, "half": 4})
    maker.struct("line", {"other": 0})
    maker.struct("flags", {"whole": 0, "bits": 3 << 24 | 8, "last": 64}, flag=1)
    return maker


def test_members_by_their_bytes() -> None:
    found = layouts(every_kind().section(), ("line", "flags", "absent"))
    assert found == {
        "line": [{"irq": 4, "action": 16}, {"other": 0}],
        "flags": [{"whole": 0, "last": 8}],
        "absent": [],
    }


def test_a_name_is_a_whole_string() -> None:
    maker = Maker()
    maker.struct("irq_desc_more", {"a": 0})
    maker.struct("my_irq_desc", {"a": 0})
    assert layouts(maker.section(), ("irq_desc",)) == {"irq_desc": []}


def test_what_is_no_btf() -> None:
    assert layouts(memoryview(b""), ("line",)) == {"line": []}
    assert layouts(every_kind().section(magic=0x9FEB), ("line",)) == {"line": []}


@given(st.data())
def test_damage_raises_nothing(data: st.DataObject) -> None:
    section = bytearray(every_kind().section())
    for at in data.draw(st.lists(st.integers(0, len(section) - 1), max_size=8)):
        section[at] = data.draw(st.integers(0, 255))
    layouts(memoryview(section)[: data.draw(st.integers(0, len(section)))], ("line", "flags"))


@pytest.mark.boot
def test_a_real_kernels(kernel_cloud: KernelChoice) -> None:
    image = load_image(kernel_cloud.path)
    btf = btf_of(image.elf)
    assert btf is not None
    found = layouts(btf, ("irq_desc", "irqaction", "list_head"))
    assert found["list_head"] == [{"next": 0, "prev": 8}]
    assert {"irq_data", "irq_common_data", "action", "depth"} <= found["irq_desc"][0].keys()
    assert found["irqaction"][0]["handler"] == 0
