"""A raw image that keeps as it is, whatever a guest writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.filestore import FileStore
from pvirq.drivers.privatestore import PrivateStore


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"a" * 512 * 20 + b"tail")
    return path


def test_what_is_written_is_read_and_not_in_the_file(image: Path) -> None:
    before = image.read_bytes()
    one, other = PrivateStore(image), PrivateStore(image)
    assert one.sectors == 20
    assert one.writev(3, [memoryview(b"b" * 512)]) is None
    assert one.read(2, 3) == b"a" * 512 + b"b" * 512 + b"a" * 512
    assert other.read(3, 1) == b"a" * 512
    assert one.writev(20, [memoryview(b"b" * 512)]) is Errno.EIO
    assert image.read_bytes() == before


def test_discarded_sectors_are_zeros(image: Path) -> None:
    store = PrivateStore(image)
    ended: list[Errno | None] = []
    for sector, count in ((0, 17), (19, 2), (0, 1 << 30)):
        store.discard(sector, count, lambda _data, error: ended.append(error))
    assert ended == [None, Errno.EIO, Errno.EIO]
    assert store.read(0, 18) == bytes(17 * 512) + b"a" * 512


def test_writers_are_kept_out_until_it_is_closed(image: Path) -> None:
    store = PrivateStore(image)
    with pytest.raises(XenError):
        FileStore(image)
    store.close()
    FileStore(image).close()


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, errno in (("gone", Errno.ENOENT), ("empty", Errno.EINVAL), (".", Errno.EINVAL)):
        with pytest.raises(XenError) as error:
            PrivateStore(tmp_path / name)
        assert error.value.errno == errno, name
