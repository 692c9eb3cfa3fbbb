"""Stores that are there at once: data in place, discards, and the devices of domain 0 by name and number."""

from __future__ import annotations

import pytest

from pvirq.abi.errno import Errno
from pvirq.drivers.blockstore import BlockDevices, Discards, Flushes, InPlace, MemoryStore


def outcome() -> tuple[list[tuple[bytes | None, Errno | None]], object]:
    results: list[tuple[bytes | None, Errno | None]] = []
    return results, lambda data, error: results.append((data, error))


def test_memory_moves_data_in_place() -> None:
    store = MemoryStore(16, b"abc")
    assert isinstance(store, InPlace)
    assert isinstance(store, Flushes)
    assert isinstance(store, Discards)
    memory = bytearray(b"x" * 2048)
    view = memoryview(memory)
    assert store.writev(1, [view[512:1024], view[:512]]) is None
    assert store.readv(0, [view[1024:1536], view[:512], view[512:1024]]) is None
    assert memory[1024:1027] == b"abc"
    assert memory[:1024] == b"x" * 1024
    assert store.read(0, 1)[:4] == b"abc\0"


@pytest.mark.parametrize("sector", [-1, 15, 16, 1 << 62])
def test_beyond_the_end_nothing_is_touched(sector: int) -> None:
    store = MemoryStore(16)
    buffer = bytearray(b"y" * 1024)
    assert store.readv(sector, [memoryview(buffer)]) is Errno.EIO
    assert store.writev(sector, [memoryview(buffer)]) is Errno.EIO
    assert buffer == b"y" * 1024
    assert store.data[:] == bytes(16 * 512)
    results, done = outcome()
    store.submit(sector, 1 << 40, None, done)  # type: ignore[arg-type]
    store.discard(sector, 2, done)  # type: ignore[arg-type]
    assert results == [(None, Errno.EIO)] * 2


@pytest.mark.parametrize(("sector", "count"), [(0, 1), (3, 2), (3, 30), (8, 8), (5, 11), (0, 64), (63, 1), (20, 0)])
def test_what_is_discarded_reads_as_zeros_and_nothing_else(sector: int, count: int) -> None:
    store = MemoryStore(64, bytes([255]) * 64 * 512)
    results, done = outcome()
    store.discard(sector, count, done)  # type: ignore[arg-type]
    assert results == [(None, None)]
    expected = bytearray(b"\xff" * 64 * 512)
    expected[sector * 512 : (sector + count) * 512] = bytes(count * 512)
    assert store.data[:] == expected


def test_devices_have_linuxs_numbers() -> None:
    devices = BlockDevices()
    store = MemoryStore(1)
    assert devices.add("/dev/loop10", store) == "7:a"
    assert devices.add("/dev/nbd0", store) == "2b:0"
    assert [devices.add_free(kind, store) for kind in ("loop", "loop", "ram")] == [
        "/dev/loop0",
        "/dev/loop1",
        "/dev/ram0",
    ]
    assert [devices.number(name) for name in ("/dev/loop1", "/dev/ram0")] == ["7:1", "1:0"]
    assert devices.add("/dev/ata1", store) == "f0:0"
    with pytest.raises(ValueError, match="exists"):
        devices.add("/dev/ata1", store)
    devices.remove("/dev/loop0")
    assert devices.number("/dev/loop0") is None
    assert devices.find("7:0") is None
    assert devices.add_free("loop", store) == "/dev/loop0"
    assert devices.find("7:0") is store
