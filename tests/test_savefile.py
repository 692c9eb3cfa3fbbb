"""Files of saved domains: what is written is read again, and whatever is damaged says so in one line."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi import migration as abi
from pvirq.abi.xen import PAGE_SIZE
from pvirq.pv import context
from pvirq.pv.save import ENTRIES, SavedDomain, SavedVcpu
from pvirq.toolstack import savefile
from pvirq.toolstack.config import Action, DiskConfig, DomainConfig, VifConfig
from pvirq.toolstack.savefile import SaveFileError

CONFIG = DomainConfig(
    name="u2", kernel="/boot/vmlinuz", cmdline="console=hvc0", memory=64 << 20, maxmem=64 << 20, vcpus=2, maxvcpus=4,
    uuid="6c18616b-2828-4f0b-a87b-7e13229c43a4", disks=[DiskConfig("/dev/loop0", "xvda", "raw", readonly=True)],
    vifs=[VifConfig("00:16:3e:00:00:01", "xenbr0", 0)],
)  # fmt: skip


def domain(pages: int = 1500) -> SavedDomain:
    """One with a hole, pages of zeros, and page tables of which one is all zeros."""
    rng = np.random.default_rng(1)
    hole = range(pages // 2, pages // 2 + 10)
    pfns = np.array([pfn for pfn in range(pages + 10) if pfn not in hole], dtype=np.uint64)
    types = np.zeros(pages, dtype=np.uint8)
    types[5], types[6], types[7] = 4 | abi.PFINFO_LPINTAB, 1, 1
    rows = np.array([row for row in range(pages) if row % 3 or row == 6], dtype=np.int64)
    rows = rows[rows != 7]
    data = rng.integers(0, 1 << 63, (len(rows), ENTRIES), dtype=np.uint64)
    vcpus = {
        0: SavedVcpu(rng.bytes(context.SIZE), bytes(abi.EXT_VCPUCONTEXT_SIZE)),
        1: SavedVcpu(rng.bytes(context.SIZE)),
    }
    frames = [2 + page for page in range((pages + 9) // ENTRIES + 1)]
    return SavedDomain(pages + 9, frames, pfns, types, rows, data, vcpus, rng.bytes(PAGE_SIZE))


def written(saved: SavedDomain | None = None) -> bytes:
    file = io.BytesIO()
    savefile.write(file, CONFIG, saved or domain())
    return file.getvalue()


def pages(saved: SavedDomain) -> dict[int, tuple[int, bytes]]:
    content = {int(row): saved.data[at].tobytes() for at, row in enumerate(saved.rows)}
    return {int(pfn): (int(saved.types[row]), content.get(row, bytes(PAGE_SIZE))) for row, pfn in enumerate(saved.pfns)}


def test_what_is_written_is_read() -> None:
    saved = domain()
    config, again = savefile.read(io.BytesIO(written(saved)))
    assert config == CONFIG
    assert pages(again) == pages(saved)
    assert (again.max_pfn, again.p2m_frames, again.vcpus) == (saved.max_pfn, saved.p2m_frames, saved.vcpus)
    assert again.shared_info == saved.shared_info


def test_pages_of_zeros_take_no_room() -> None:
    saved = domain()
    assert len(written(saved)) < (len(saved.rows) + 10) * (PAGE_SIZE + 16)


def test_the_layout_is_the_documented_one() -> None:
    """Offsets and values of the headers, from the documents; records are aligned and end with END."""
    data = written()
    assert data[:32] == b"Xen saved domain, xl format\n \0 \r"
    order, mandatory, optional, length = struct.unpack_from("<4I", data, 32)
    assert (order, mandatory, optional) == (0x01020304, 3, 0)
    (size,) = struct.unpack_from("<I", data, 48)
    assert size == length - 4
    config = json.loads(data[52 : 52 + size].rstrip(b"\0"))
    assert config["c_info"] == {"type": "pv", "name": "u2", "uuid": CONFIG.uuid}
    assert config["b_info"]["avail_vcpus"] == [0, 1]
    at = 48 + length
    assert data[at : at + 16] == b"LibxlFmt" + bytes.fromhex("00000002 00000000")
    assert struct.unpack_from("<II", data, at + 16) == (1, 0)  # LIBXC_CONTEXT
    at += 24
    assert data[at : at + 24] == b"\xff" * 8 + b"XENF" + bytes.fromhex("00000003") + bytes(8)
    assert struct.unpack_from("<IHHII", data, at + 24) == (1, 12, 0, 4, 17)
    at += 40
    kinds = []
    while True:
        kind, length = struct.unpack_from("<II", data, at)
        kinds.append(kind)
        at += 8 + length + -length % 8
        if kind == 0:
            break
    assert kinds == [2, 0x10, 3, 1, 1, 7, 4, 5, 4, 0]
    assert data[at:] == bytes(8)  # libxl's END


@pytest.mark.parametrize("size", [0, 10, 47, 52, 300, -1, -8, -9, -5000])
def test_a_file_cut_short(size: int) -> None:
    data = written()
    with pytest.raises(SaveFileError, match=r"ends within|doesn't begin"):
        savefile.read(io.BytesIO(data[:size]))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"Xen saved", b"Xen.saved", "doesn't begin"),
        (b"LibxlFmt", b"LibxlFm_", "ident"),
        (b"XENF", b"XENG", "version"),
        (b"XENF\0\0\0\3", b"XENF\0\0\0\4", "version 4"),
        (b'"type": "pv"', b'"type": "xx"', "only PV"),
        (b'"c_info"', b'"c_inf\xff"', "can't be read"),
        (struct.pack("<IHH", 1, 12, 0), struct.pack("<IHH", 2, 12, 0), "no x86 PV"),
        (struct.pack("<IIBB", 2, 8, 8, 4), struct.pack("<IIBB", 2, 8, 4, 3), "64-bit"),
        (struct.pack("<II", 7, 4096), struct.pack("<II", 0x33, 4096), "isn't known"),
    ],
)
def test_what_is_wrong_is_named(old: bytes, new: bytes, why: str) -> None:
    data = written()
    assert old in data
    with pytest.raises(SaveFileError, match=why):
        savefile.read(io.BytesIO(data.replace(old, new, 1)))


SMALL = written(domain(20))


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_damaged_bytes_raise_nothing_else(changes: list[tuple[int, int]], cut: bool) -> None:
    data = bytearray(SMALL)
    for at, value in changes:
        data[at] = value
    if cut:
        del data[changes[0][0] :]
    try:
        savefile.read(io.BytesIO(bytes(data)))
    except SaveFileError as error:
        lines = str(error).count("\n")
    else:
        lines = 0
    assert not lines


def test_actions_are_kept() -> None:
    config = DomainConfig(on=DomainConfig().on | {"crash": Action.RENAME_RESTART, "poweroff": Action.PRESERVE})
    again = DomainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again.on == config.on
