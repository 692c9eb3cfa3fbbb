"""Machine memory: frames, who owns them, and that nothing of one owner is left for the next."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_INVALID, DOMID_XEN
from pvirq.xen.memory import FIRST_MFN, PGT_L1, PGT_NONE, PGT_WRITABLE, Machine


def test_a_machine_reserves_and_doesnt_use() -> None:
    gc.collect()  # what other tests left
    before = _resident()
    machine = Machine(16 << 30)
    assert machine.frames == 4 << 20
    assert _resident() - before < 16 << 20
    machine.mem[15 << 30] = 1
    machine.close()
    gc.collect()
    assert _resident() - before < 16 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_views_are_of_the_same_bytes() -> None:
    machine = Machine(4 << 20)
    mfn = machine.alloc(1, 1)
    machine.u64[mfn << 9] = 0x1122334455667788
    assert machine.u32[mfn << 10] == 0x55667788
    assert machine.mem[mfn << 12] == machine.page(mfn)[0] == 0x88
    assert machine.np_u64[mfn << 9] == 0x1122334455667788
    machine.np_owner[mfn] = 5
    assert machine.owner[mfn] == 5
    machine.close()


def test_low_frames_are_nobodys() -> None:
    machine = Machine(4 << 20)
    first = machine.alloc(1, 1)
    assert first >= FIRST_MFN
    assert set(machine.np_owner[:FIRST_MFN].tolist()) == {DOMID_INVALID}
    machine.close()


def test_alignment_and_exhaustion() -> None:
    machine = Machine(8 << 20)
    machine.alloc(3, 1)
    assert machine.alloc(64, 1, align=64) % 64 == 0
    with pytest.raises(XenError) as info:
        machine.alloc(machine.frames, 1)
    assert info.value.errno == Errno.ENOMEM
    machine.close()


def test_freed_frames_come_back_empty() -> None:
    machine = Machine(4 << 20)
    mfn = machine.alloc(4, 1)
    machine.mem[mfn << 12 : (mfn + 4) << 12] = b"secret!!" * 2048
    machine.type[mfn], machine.type_count[mfn], machine.refs[mfn], machine.pinned[mfn] = PGT_L1, 1, 2, 3
    machine.free(mfn, 4)
    again = machine.alloc(4, 2)
    assert again == mfn
    assert bytes(machine.page(mfn)) == bytes(4096)
    found = (machine.type[mfn], machine.type_count[mfn], machine.refs[mfn], machine.pinned[mfn])
    assert found == (PGT_NONE, 0, 0, 0)
    machine.close()


def test_shared_frames_can_be_nothing_else() -> None:
    machine = Machine(4 << 20)
    mfn = machine.alloc(1)
    assert machine.owner[mfn] == DOMID_XEN
    machine.share(mfn, 7)
    assert (machine.owner[mfn], machine.type[mfn], machine.type_count[mfn]) == (7, PGT_WRITABLE, 1)
    machine.close()


def test_the_machine_to_phys_table_is_for_large_pages() -> None:
    machine = Machine(4 << 30)
    assert machine.m2p_mfn % 512 == 0
    assert len(machine.m2p) == machine.frames
    machine.close()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_frames_are_neither_lost_nor_given_twice(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    machine = Machine(8 << 20)
    free_at_first = int(np.count_nonzero(machine.np_owner == DOMID_INVALID)) - FIRST_MFN
    held: list[tuple[int, int, int]] = []
    taken: set[int] = set()
    for _ in range(steps):
        if held and rng.random() < 0.45:
            mfn, count, owner = held.pop(rng.randrange(len(held)))
            if rng.random() < 0.3 and count > 1:  # a part of it: the rest stays
                part = rng.randrange(1, count)
                machine.free(mfn, part)
                taken -= set(range(mfn, mfn + part))
                held.append((mfn + part, count - part, owner))
            else:
                machine.free(mfn, count)
                taken -= set(range(mfn, mfn + count))
        else:
            count, align, owner = rng.randrange(1, 200), 1 << rng.randrange(6), rng.randrange(1, 4)
            try:
                mfn = machine.alloc(count, owner, align)
            except XenError:
                continue
            frames = set(range(mfn, mfn + count))
            assert mfn % align == 0
            assert not frames & taken
            assert set(machine.np_owner[mfn : mfn + count].tolist()) == {owner}
            taken |= frames
            held.append((mfn, count, owner))
    for owner in (1, 2, 3):
        machine.free_all_of(owner)
        assert not np.any(machine.np_owner == owner)
    # All in one piece again.
    assert machine.alloc(machine.frames - machine.m2p_mfn - len(machine.m2p) * 8 // 4096, 1)
    assert int(np.count_nonzero(machine.np_owner == DOMID_INVALID)) - FIRST_MFN < free_at_first
    machine.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "pages"
    path.write_bytes(b"".join(page.to_bytes(8, "little") * 512 for page in range(1, 2049)))
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def first_words(machine: Machine, mfn: int, count: int) -> list[int]:
    return machine.np_u64[mfn << 9 : (mfn + count) << 9 : 512].tolist()


def test_frames_from_a_file_are_copied_when_written(file: int) -> None:
    machine = Machine(64 << 20)
    mfn, other, copied = (machine.alloc(2048, owner) for owner in (1, 2, 3))
    machine.map_file(mfn, 2048, file, 0)
    machine.map_file(other, 1024, file, 1024 << 12)
    machine.read_file(copied, 2048, file, 0)
    assert machine.mapped_frames() == 3072
    assert first_words(machine, mfn, 2048) == first_words(machine, copied, 2048) == list(range(1, 2049))
    assert first_words(machine, other, 2048) == [*range(1025, 2049), *[0] * 1024]
    assert machine.digest(1)
    machine.mem[mfn + 1500 << 12] = 0xFF
    assert machine.u64[mfn + 1500 << 9] == 1501 & ~0xFF | 0xFF
    assert machine.u64[other + 1500 - 1024 << 9] == machine.u64[copied + 1500 << 9] == 1501
    assert os.pread(file, 8, 1500 << 12) == (1501).to_bytes(8, "little")
    machine.close()


def test_what_cannot_be_mapped_or_read(file: int) -> None:
    machine = Machine(64 << 20)
    mfn = machine.alloc(2048, 1)
    machine.u64[mfn << 9] = 5
    with pytest.raises(OSError, match="Invalid argument"):
        machine.map_file(mfn, 1, file, 100)
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="No such device"):
        machine.map_file(mfn, 512, reading, 0)
    os.close(reading), os.close(writing)
    with pytest.raises(OSError, match="become shorter"):
        machine.read_file(mfn + 1, 2, file, 2047 << 12)
    assert machine.u64[mfn << 9] == 5
    assert machine.mapped_frames() == 0
    machine.close()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2047), st.integers(1, 700)), max_size=12), st.randoms(use_true_random=False))
def test_freed_frames_of_a_file_come_back_empty(
    file: int, pieces: list[tuple[int, int]], random: random.Random
) -> None:
    """However they are given back: nothing of the file is left in them, and what stays is as it was."""
    machine = Machine(64 << 20)
    mfn = machine.alloc(2048, 1)
    machine.map_file(mfn, 2048, file, 0)
    expected = list(range(1, 2049))
    for first, count in pieces:
        first, end = mfn + first, mfn + min(first + count, 2048)
        while first < end:  # those that are still its own
            length = next((i for i in range(end - first) if machine.owner[first + i] != 1), end - first)
            if length:
                if random.random() < 0.5:
                    machine.mem[first << 12] = 0xFF
                machine.free(first, length)
                expected[first - mfn : first - mfn + length] = [0] * length
            first += length + 1
        assert first_words(machine, mfn, 2048) == expected
    machine.free_all_of(1)
    assert machine.mapped_frames() == 0
    assert machine.alloc(2048, 2) == mfn
    assert not machine.np_u64[mfn << 9 : (mfn + 2048) << 9].any()
    machine.close()


def test_frames_given_back_one_by_one_need_no_mappings(file: int) -> None:
    """As a guest's balloon does it, every other frame: a process can have only so many mappings."""
    machine = Machine(64 << 20)
    mfn = machine.alloc(2048, 1)
    machine.map_file(mfn, 2048, file, 0)
    before = mappings()
    for frame in range(mfn, mfn + 2048, 2):
        machine.free(frame)
    assert mappings() - before < 10
    assert first_words(machine, mfn, 4) == [0, 2, 0, 4]
    machine.free_all_of(1)
    assert machine.mapped_frames() == 0
    machine.close()


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_close_with_views_held_frees_the_memory_all_the_same() -> None:
    machine = Machine(256 << 20)
    view = machine.page(machine.alloc(1, 1))
    mfn = machine.alloc(32768, 1)
    machine.mem[mfn << 12 : (mfn + 32768) << 12] = b"x" * (32768 << 12)
    before = _resident()
    machine.close()
    assert before - _resident() > 100 << 20
    del view
