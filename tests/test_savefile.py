"""Files of saved domains: what is written is read again, and whatever is damaged says so in one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi import migration as abi
from pvirq.abi.xen import PAGE_SIZE
from pvirq.pv import context
from pvirq.pv.save import SavedDomain, SavedVcpu
from pvirq.pv.saved_pages import ENTRIES, MemoryPages
from pvirq.toolstack import savefile
from pvirq.toolstack.config import Action, DiskConfig, DomainConfig, VifConfig
from pvirq.toolstack.savefile import SaveFileError
from pvirq.xen.memory import LEAST_MAPPED, Machine

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
    return SavedDomain(pages + 9, frames, pfns, types, rows, [MemoryPages(data)], vcpus, rng.bytes(PAGE_SIZE))


def written(saved: SavedDomain | None = None, *, aligned: bool = False) -> bytes:
    file = io.BytesIO()
    savefile.write(file, CONFIG, saved or domain(), aligned=aligned)
    return file.getvalue()


def pages(saved: SavedDomain) -> dict[int, tuple[int, bytes]]:
    data = np.concatenate([some.array() for some in saved.data])
    content = {int(row): data[at].tobytes() for at, row in enumerate(saved.rows)}
    return {int(pfn): (int(saved.types[row]), content.get(row, bytes(PAGE_SIZE))) for row, pfn in enumerate(saved.pfns)}


@pytest.fixture(params=["memory", "file"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], BinaryIO]:
    """Bytes as a file of the system's, where pages stay in it until they are asked for, and as one that is none."""

    def in_file(data: bytes) -> BinaryIO:
        (tmp_path / "saved").write_bytes(data)
        return open(tmp_path / "saved", "rb")

    return in_file if request.param == "file" else io.BytesIO


@pytest.mark.parametrize("aligned", [False, True])
def test_what_is_written_is_read(opened: Callable[[bytes], BinaryIO], aligned: bool) -> None:
    saved = domain()
    with opened(written(saved, aligned=aligned)) as file:
        config, again = savefile.read(file)
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
def test_a_file_cut_short(opened: Callable[[bytes], BinaryIO], size: int) -> None:
    with (
        opened(written()[:size]) as file,
        pytest.raises(SaveFileError, match=r"ends within|doesn't begin|become shorter"),
    ):
        savefile.read(file)


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


def test_aligned_pages() -> None:
    """Pages begin at pages' boundaries, in long pieces; in front of them are records that need not be known."""
    data, plain = written(aligned=True), written()
    assert not at_boundary(plain)
    where = at_boundary(data)
    assert [count for _, count in where] == [len(domain().rows) + 1]  # the empty table has to have contents
    contents = np.frombuffer(data, "<u8", where[0][1] * ENTRIES, where[0][0]).reshape(-1, ENTRIES)
    assert np.array_equal(contents[:-1], domain().data[0].array())
    assert not contents[-1].any()


def at_boundary(data: bytes) -> list[tuple[int, int]]:
    """Where records of pages have their contents, and how many, if at a page's boundary; as libxc's format says."""
    at = data.index(b"XENF") + 32
    found = []
    while True:
        kind, length = struct.unpack_from("<II", data, at)
        if kind == 1:
            (count,) = struct.unpack_from("<I", data, at + 8)
            first = at + 16 + 8 * count
            if first % PAGE_SIZE == 0 and length > 8 + 8 * count:
                found.append((first, (length - 8 - 8 * count) // PAGE_SIZE))
        elif kind == 0:
            return found
        else:
            assert kind < 0x11 or kind & 1 << 31
        at += 8 + length + -length % 8


def test_pages_that_come_twice(opened: Callable[[bytes], BinaryIO]) -> None:
    """As when a running domain is moved: the later one counts, be it zeros or no page at all."""
    saved = domain(20)
    data = bytearray(written(saved))
    record = data.index(struct.pack("<II", 20, 0)) - 8  # of its one record of pages
    end = record + 8 + struct.unpack_from("<I", data, record + 4)[0]
    names = [saved.pfns[saved.rows[3]], int(saved.pfns[saved.rows[0]]) | 0xE << 60, int(saved.pfns[1]) | 0xF << 60]
    more = struct.pack("<IIII3Q", 1, 8 + 24 + PAGE_SIZE, 3, 0, *map(int, names)) + b"later..." * (PAGE_SIZE // 8)
    with opened(bytes(data[:end] + more + data[end:])) as file:
        _, again = savefile.read(file)
    expected = pages(saved)
    expected[int(names[0])] = (0, b"later..." * (PAGE_SIZE // 8))
    expected[int(saved.pfns[saved.rows[0]])] = (0, bytes(PAGE_SIZE))
    del expected[int(saved.pfns[1])]
    assert pages(again) == expected


def test_a_compressed_file_is_read_through_its_reader(tmp_path: Path) -> None:
    """It has a descriptor, but what that reads isn't what the file says."""
    saved = domain()
    with gzip.open(tmp_path / "saved.gz", "wb") as out:
        out.write(written(saved))
    with gzip.open(tmp_path / "saved.gz", "rb") as file:
        _, again = savefile.read(cast(BinaryIO, file))
    assert pages(again) == pages(saved)


@pytest.mark.parametrize("mapped", [False, True])
def test_pages_in_frames(tmp_path: Path, mapped: bool) -> None:
    """They are loaded when the file is closed and gone, and the file doesn't change by what is done to them."""
    saved = domain(3750)
    path = tmp_path / "saved"
    path.write_bytes(before := written(saved, aligned=True))
    expected = pages(saved)
    with open(path, "rb") as file:
        _, again = savefile.read(file, mapped=mapped)
        path.unlink()
        machine = Machine(64 << 20)
        mfn = at = machine.alloc(len(saved.pfns), 1)
        for some in again.data:
            some.load(machine, at)
            at += len(some)
        for index, row in enumerate(again.rows.tolist()):
            assert machine.page(mfn + index) == expected[int(again.pfns[row])][1]
        lengths = [len(some) for some in again.data]
        assert lengths[:2] == [1024, 1024]
        assert 0 < lengths[2] < LEAST_MAPPED
        assert machine.mapped_frames() == (2048 if mapped else 0)
        machine.np_u64[mfn * ENTRIES : at * ENTRIES] = 7
        file.seek(0)
        assert file.read() == before
    machine.close()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_becomes_shorter(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "saved"
    path.write_bytes(written(domain(3000), aligned=True))
    with open(path, "rb") as file:
        _, saved = savefile.read(file, mapped=mapped)
    os.truncate(path, path.stat().st_size // 4)
    machine = Machine(64 << 20)
    for some in saved.data[1:]:
        with pytest.raises(OSError, match="become shorter"):
            some.load(machine, machine.alloc(len(some), 1))
        with pytest.raises(OSError, match="become shorter"):
            some.array()
    machine.close()


SMALL = written(domain(20))


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_damaged_bytes_raise_nothing_else(changes: list[tuple[int, int]], cut: bool) -> None:
    data = bytearray(SMALL)
    for at, value in changes:
        data[at] = value
    if cut:
        del data[changes[0][0] :]
    with tempfile.TemporaryFile() as in_file:
        in_file.write(data)
        in_file.seek(0)
        files: list[BinaryIO] = [io.BytesIO(bytes(data)), cast(BinaryIO, in_file)]
        errors = []
        for file in files:
            try:
                savefile.read(file, mapped=True)
            except SaveFileError as error:
                errors.append(str(error))
    assert len(errors) in (0, 2)
    assert len(set(errors)) <= 1
    assert not any("\n" in error for error in errors)


def test_actions_are_kept() -> None:
    config = DomainConfig(on=DomainConfig().on | {"crash": Action.RENAME_RESTART, "poweroff": Action.PRESERVE})
    again = DomainConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again.on == config.on
