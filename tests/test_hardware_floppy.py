"""The floppy drive: its delays, its data, and an interrupt for each step of a command."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hardwarelib import KERNELS, Rig
from pvirq.abi.errno import Errno
from pvirq.hardware.floppy import (
    DISK_SECTORS,
    RESET_NS,
    SECTOR_NS,
    SETTLE_NS,
    SPIN_DOWN_NS,
    SPIN_UP_NS,
    STEP_NS,
    TURN_NS,
    FloppyDriver,
)
from pvirq.xen.timer import NS_PER_S


@pytest.fixture(params=KERNELS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig([{"type": "floppy", "opened": False}], request.param)
    rig.sleep(NS_PER_S)
    yield rig
    rig.close()


def driver(rig: Rig) -> FloppyDriver:
    return rig.platform.device("floppy", FloppyDriver)


def read(rig: Rig, sector: int, count: int) -> tuple[bytes | None, Errno | None, int]:
    """What was read, the error, and when it came."""
    got: list[tuple[bytes | None, Errno | None, int]] = []
    driver(rig).submit(sector, count, None, lambda data, error: got.append((data, error, rig.clock.now())))
    rig.sleep(20 * NS_PER_S)
    (result,) = got
    return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_idle_counts(kernel: str) -> None:
    """A reset, one more to let a controller out that was held in it, and where udev looks at once, a recalibrate and
    a step that finds no disk."""
    for held, opened, count in ((False, False, 1), (False, True, 3), (True, False, 2), (True, True, 4)):
        rig = Rig([{"type": "floppy", "held": held, "opened": opened}], kernel)
        rig.sleep(10 * NS_PER_S)
        assert rig.count(6) == count
        assert not driver(rig).fdc.motor
        rig.close()


def test_without_a_disk(rig: Rig) -> None:
    start = rig.clock.now()
    data, error, when = read(rig, 0, 1)
    assert (data, error) == (None, Errno.ENXIO)
    assert when - start == SPIN_UP_NS + SETTLE_NS + SETTLE_NS + STEP_NS
    assert rig.count(6) == 3


def test_data_and_time(rig: Rig) -> None:
    image = bytes(i * 7 % 251 for i in range(DISK_SECTORS * 512))
    driver(rig).insert(image)
    start = rig.clock.now()
    data, error, when = read(rig, 40, 5)
    assert (data, error) == (image[40 * 512 : 45 * 512], None)
    # Motor; recalibrate, where the heads are already; a step to see the disk, which is on the right track then;
    # half a turn to the sector, and the rest of the track, 14 sectors from the fifth on.
    assert when - start == SPIN_UP_NS + SETTLE_NS + (SETTLE_NS + STEP_NS) + TURN_NS // 2 + 14 * SECTOR_NS
    assert rig.count(6) == 1 + 3
    # Again, now that all is in place but the motor has stopped.
    start = rig.clock.now()
    data, error, when = read(rig, 40, 5)
    assert when - start == SPIN_UP_NS + TURN_NS // 2 + 14 * SECTOR_NS
    assert rig.count(6) == 1 + 4


def test_over_tracks(rig: Rig) -> None:
    image = bytes(i // 512 % 256 for i in range(DISK_SECTORS * 512))
    driver(rig).insert(image)
    assert read(rig, 30, 50)[0] == image[30 * 512 : 80 * 512]


def test_writing(rig: Rig) -> None:
    floppy = driver(rig)
    floppy.insert(b"old")
    done: list[tuple[bytes | None, Errno | None]] = []
    floppy.submit(17, 2, b"n" * 1024, lambda data, error: done.append((data, error)))
    rig.sleep(5 * NS_PER_S)
    assert done == [(None, None)]
    assert read(rig, 16, 4)[0] == bytes(512) + b"n" * 1024 + bytes(512)


def test_the_motor_stops(rig: Rig) -> None:
    floppy = driver(rig)
    floppy.insert(b"")
    floppy.submit(0, 1, None, lambda data, error: None)
    rig.sleep(NS_PER_S)
    assert floppy.fdc.motor
    rig.sleep(SPIN_DOWN_NS)
    assert not floppy.fdc.motor


def test_beyond_the_end(rig: Rig) -> None:
    driver(rig).insert(b"")
    assert read(rig, DISK_SECTORS - 1, 2)[1] == Errno.EIO
    with pytest.raises(ValueError, match="don't fit"):
        driver(rig).insert(bytes(DISK_SECTORS * 512 + 1))


def test_a_disk_pulled_in_the_middle(rig: Rig) -> None:
    """No sector comes by any more: the command never ends, and the driver gives up after three seconds."""
    floppy = driver(rig)
    floppy.insert(b"")
    assert read(rig, 0, 1)[1] is None
    floppy.submit(500, 1, None, lambda data, error: done.append(error))
    done: list[Errno | None] = []
    rig.sleep(SPIN_UP_NS + RESET_NS)
    floppy.fdc.disk = None
    rig.sleep(10 * NS_PER_S)
    assert done == [Errno.EIO]
    assert "floppy0: timeout at sector 500" in rig.log()
