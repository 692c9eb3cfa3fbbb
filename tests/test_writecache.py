"""A volatile write cache: what a crash takes, and what it doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.errno import Errno
from pvirq.drivers.filestore import FileStore
from pvirq.drivers.writecache import WriteCache
from storelib import ask, new_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return new_image(tmp_path)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "write", "read", "flush", "discard", "crash"]),
            st.integers(0, 31),
            st.integers(1, 9),
        ),
        max_size=40,
    )
)
def test_a_crash_loses_what_was_not_flushed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("cache") / "image"
    path.write_bytes(bytes(40 * 512))
    store = WriteCache(FileStore(path))
    seen, safe = bytearray(40 * 512), bytearray(40 * 512)
    for i, (step, sector, count) in enumerate(steps):
        where = slice(sector * 512, (sector + count) * 512)
        if step == "write":
            data = bytes([i + 1]) * count * 512
            assert store.writev(sector, [memoryview(data)[:512], memoryview(data)[512:]]) is None
            seen[where] = data
        elif step == "read":
            assert store.read(sector, count) == seen[where]
        elif step == "flush":
            assert ask(store.flush) is None
            safe[:] = seen
            assert path.read_bytes() == safe
            assert not store.dirty
        elif step == "discard":
            assert ask(store.discard, sector, count) is None
            seen[where] = safe[where] = bytes(count * 512)
        else:
            store.crash()
            seen[:] = safe
    assert store.read(0, 40) == seen
    assert path.read_bytes() == safe
    store.close()
    assert path.read_bytes() == seen


def test_a_full_cache_writes_what_it_has(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvirq.drivers.writecache.MOST_SECTORS", 4)
    store = WriteCache(FileStore(image))
    for sector in range(4):
        assert store.writev(sector, [memoryview(b"w" * 512)]) is None
    assert store.dirty == 4
    assert store.writev(9, [memoryview(b"w" * 512)]) is None
    assert not store.dirty
    assert image.read_bytes()[: 4 * 512] == b"w" * 2048


def test_what_could_not_be_flushed_stays(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FileStore(image)
    store = WriteCache(file)
    store.writev(1, [memoryview(b"w" * 512)])
    with monkeypatch.context() as patch:
        patch.setattr(file, "writev", lambda sector, buffers: Errno.ENOSPC)
        assert ask(store.flush) is Errno.ENOSPC
    assert store.dirty == 1
    assert ask(store.flush) is None
    assert image.read_bytes()[512:1024] == b"w" * 512
