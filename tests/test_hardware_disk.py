"""Disks: data, timing, splitting, queueing, errors and lost interrupts, on every controller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardwarelib import COUNTS_DISABLED, FORGETS_DISABLED, KERNELS, Rig
from pvirq.abi.errno import Errno
from pvirq.hardware.ata import AtaDriver
from pvirq.hardware.device import Board
from pvirq.hardware.disk import SECTOR, TIMEOUT_NS, BlockDriver, Medium, Timing
from pvirq.linux.irq import IRQ_NONE
from pvirq.xen.timer import NS_PER_S

FIXED = {"size_mib": 8, "command_ns": 1000, "seek_ns": 0, "bytes_per_s": 512_000_000}  # 1 us a sector
CONTROLLERS: dict[str, dict[str, object]] = {
    "legacy": {"type": "ata_piix", "gsi": 15},
    "native": {"type": "ata_piix", "gsi": 18, "native": True},
    "ahci-msi": {"type": "ahci"},
    "ahci-line": {"type": "ahci", "gsi": 19},
    "virtio": {"type": "virtio-blk", "queues": 1},
}
Result = tuple[bytes | None, Errno | None, int]


class DiskRig(Rig):
    def __init__(self, controller: str, kernel: str = "pvops", **parameters: object) -> None:
        super().__init__([{**CONTROLLERS[controller], "name": "disk", **FIXED, **parameters}], kernel)
        self.disk = self.platform.device("disk", BlockDriver)  # type: ignore[type-abstract]
        self.results: list[Result] = []
        self.irq = self.disk._irqs[-1][0]
        self.sleep(1_000_000)
        self.at_start = self.count(self.irq)

    def submit(self, sector: int, count: int, data: bytes | None = None) -> None:
        self.disk.submit(sector, count, data, self._done)

    def _done(self, data: bytes | None, error: Errno | None) -> None:
        self.results.append((data, error, self.clock.now()))

    def wait(self, ns: int = NS_PER_S) -> list[Result]:
        self.sleep(ns)
        results, self.results = self.results, []
        return results

    @property
    def interrupts(self) -> int:
        return self.count(self.irq) - self.at_start


@pytest.fixture(params=[(controller, kernel) for controller in CONTROLLERS for kernel in KERNELS], ids="-".join)
def rig(request: pytest.FixtureRequest) -> Iterator[DiskRig]:
    rig = DiskRig(*request.param)
    yield rig
    rig.close()


def test_what_is_written_is_read(rig: DiskRig) -> None:
    data = Random(1).randbytes(8 * SECTOR)
    rig.submit(100, 8, data)
    assert [result[:2] for result in rig.wait()] == [(None, None)]
    rig.submit(99, 10)
    ((got, error, _),) = rig.wait()
    assert (got, error) == (bytes(SECTOR) + data + bytes(SECTOR), None)
    assert rig.interrupts == 2


def test_latency_is_exact(rig: DiskRig) -> None:
    start = rig.clock.now()
    rig.submit(0, 8)
    ((_, _, when),) = rig.wait()
    assert when - start == 1000 + 8 * 1000


def test_requests_are_done_in_order(rig: DiskRig) -> None:
    """Two requests take one command's time after the other, whether driver or disk has the queue."""
    start = rig.clock.now()
    for i in range(5):
        rig.submit(8 * i, 8)
    assert [when - start for _, _, when in rig.wait()] == [9000 * (i + 1) for i in range(5)]
    assert rig.interrupts == 5


def test_a_long_request_is_several_commands(rig: DiskRig) -> None:
    """An interrupt each."""
    most = rig.disk.max_sectors
    data = Random(2).randbytes((2 * most + 1) * SECTOR)
    rig.submit(7, 2 * most + 1, data)
    assert [result[:2] for result in rig.wait()] == [(None, None)]
    assert rig.interrupts == 3
    rig.submit(7, 2 * most + 1)
    ((got, _, _),) = rig.wait()
    assert got == data


def test_a_bad_sector(rig: DiskRig) -> None:
    rig.disk.medium.bad.add(1500)
    rig.submit(0, 2048)
    rig.submit(0, 8)
    assert [(data is None, error) for data, error, _ in rig.wait()] == [(True, Errno.EIO), (False, None)]
    rig.submit(1500, 1, bytes(SECTOR))
    assert [result[:2] for result in rig.wait()] == [(None, Errno.EIO)]


def test_beyond_the_end(rig: DiskRig) -> None:
    """The block layer refuses; the disk isn't asked. Never in the caller's own turn."""
    for sector, count in ((rig.disk.sectors, 1), (rig.disk.sectors - 1, 2), (-1, 1), (0, 0)):
        rig.submit(sector, count)
    assert not rig.results
    assert [result[:2] for result in rig.wait()] == [(None, Errno.EIO)] * 4
    assert rig.interrupts == 0
    with pytest.raises(ValueError, match="100 bytes for 1 sectors"):
        rig.submit(0, 1, bytes(100))


def test_flush(rig: DiskRig) -> None:
    rig.submit(0, 1, b"x" * SECTOR)
    rig.disk.flush(rig._done)
    assert [result[:2] for result in rig.wait()] == [(None, None)] * 2
    assert rig.interrupts == 2


def test_a_driver_that_goes(rig: DiskRig) -> None:
    """What it had still to do ends, with an error; and without a driver there is no disk."""
    for i in range(40):
        rig.submit(i, 1)
    rig.disk.remove()
    assert [result[:2] for result in rig.wait()] == [(None, Errno.ENXIO)] * 40
    rig.submit(0, 1)
    rig.disk.flush(rig._done)
    assert [result[:2] for result in rig.wait()] == [(None, Errno.ENXIO)] * 2
    rig.disk.bind()
    rig.submit(0, 1)
    assert [result[:2] for result in rig.wait()] == [(bytes(SECTOR), None)]


def test_done_may_submit(rig: DiskRig) -> None:
    """A request from the bottom half of another."""
    rig.disk.submit(0, 1, b"1" * SECTOR, lambda data, error: rig.submit(0, 1))
    assert [result[:2] for result in rig.wait()] == [(b"1" * SECTOR, None)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_probing(kernel: str) -> None:
    """ata_piix asks its disk without interrupts, ahci has one for each of libata's commands."""
    for controller, count, row in (
        ("legacy", 0, "ata_piix"),
        ("ahci-msi", 3, "ahci[0000:00:01.0]" if kernel.startswith("pvops") else "ahci"),
        ("virtio", 0, "disk-req.0"),
    ):
        rig = DiskRig(controller, kernel)
        assert (rig.at_start, rig.irq) == (count, rig.irq_of(row))
        rig.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_how_much_a_command_moves(kernel: str) -> None:
    new = kernel.startswith("pvops")
    for controller, sectors in (("legacy", 512 if new else 1024), ("virtio", 2560 if new else 1024)):
        rig = DiskRig(controller, kernel)
        assert rig.disk.max_sectors == sectors
        rig.submit(0, 2048)
        rig.wait()
        assert rig.interrupts == max(2048 // sectors, 1)
        rig.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_lost_interrupt_is_found_after_half_a_minute(kernel: str) -> None:
    """The completion's edge comes while somebody else answers for the line: libata looks at the disk in the end."""
    rig = DiskRig("legacy", kernel)
    disk = rig.disk
    assert isinstance(disk, AtaDriver)
    rig.kernel.irq.free_irq(15, disk)
    rig.kernel.irq.request_irq(15, lambda irq, dev_id: IRQ_NONE, 0, "thief", None)
    start = rig.clock.now()
    rig.submit(0, 1)
    assert not rig.wait(TIMEOUT_NS - NS_PER_S)
    ((data, error, when),) = rig.wait(2 * NS_PER_S)
    assert (data, error, when - start) == (bytes(SECTOR), None, TIMEOUT_NS)
    assert "disk: lost interrupt (Status 0x40)" in rig.log()
    rig.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_completions_while_the_line_is_off_are_one_interrupt(kernel: str) -> None:
    """AHCI notes each; the first look finds all. Where the kernel forgets the message, that is the timeout's."""
    for controller in ("ahci-msi", "ahci-line"):
        rig = DiskRig(controller, kernel)
        irq = rig.irq
        rig.kernel.irq.disable_irq(irq)
        for i in range(10):
            rig.submit(i, 1)
        assert not rig.wait()
        rig.kernel.irq.enable_irq(irq)
        forgets = controller == "ahci-msi" and kernel in FORGETS_DISABLED
        assert len(rig.wait()) == (0 if forgets else 10)
        assert len(rig.wait(TIMEOUT_NS)) == (10 if forgets else 0)
        assert rig.interrupts == 1 + (kernel in COUNTS_DISABLED and not forgets)
        rig.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_virtio_queue_for_each_cpu(kernel: str) -> None:
    rig = Rig([{"type": "virtio-blk", "name": "virtio0", **FIXED}], kernel)
    disk = rig.platform.device("virtio0", BlockDriver)  # type: ignore[type-abstract]
    ran: list[int] = []
    for cpu, times in ((0, 1), (1, 3)):
        for _ in range(times):
            rig.kernel.queue_work(lambda: disk.submit(0, 1, None, lambda data, error: ran.append(0)), cpu)
            rig.sleep(NS_PER_S)
    assert len(ran) == 4
    assert (rig.named("virtio0-req.0"), rig.named("virtio0-req.1"), rig.named("virtio0-config")) == (1, 3, 0)
    disk.use("config", Random(1))
    rig.run()
    assert rig.named("virtio0-config") == 1
    rig.close()


def test_an_empty_channel_holds_its_line() -> None:
    rig = Rig([{"type": "ata_piix", "size_mib": 0, "gsi": 15}])
    assert rig.rows()[15].endswith("ata_piix")
    assert rig.count(15) == 0
    rig.close()


# The medium.


@pytest.fixture
def board() -> Iterator[Board]:
    rig = Rig("none")
    yield Board(rig.kernel)
    rig.close()


def test_timing(board: Board) -> None:
    """A fixed part, the way of the heads over 1000 sectors in a millisecond, a sector in 5 us."""
    medium = Medium(board, 1000 * SECTOR, Timing(100, 1_000_000, 102_400_000))
    now = board.clock.now()
    assert medium.take_turn(0, 10) == now + 100 + 10 * 5000
    assert medium.take_turn(10, 1) == now + 50_100 + 100 + 5000  # the heads are there
    assert medium.take_turn(511, 1) == now + 55_200 + 100 + 500_000 + 5000
    assert medium.take_turn(0, 0) == now + 560_300 + 100
    board.clock.jump_to(now + 10_000_000)
    assert medium.take_turn(12, 1) == board.clock.now() + 100 + 500_000 + 5000


def test_a_disk_in_a_file(board: Board, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"boot" + bytes(508))
    medium = Medium(board, 4 * SECTOR, Timing(0, 0, 1_000_000), str(path))
    assert medium.read(0, 1)[:4] == b"boot"
    medium.write(3, b"!" * SECTOR)
    assert path.read_bytes() == b"boot" + bytes(508 + 2 * SECTOR) + b"!" * SECTOR


def test_the_size_of_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1000 * SECTOR + 17))
    table = [
        {"type": "ata_piix", "name": "a", "file": str(path)},
        {"type": "ata_piix", "name": "b", "gsi": 15},
        {"type": "ahci", "name": "c", "file": str(tmp_path / "new"), "size_mib": 2},
    ]
    rig = Rig(table)
    assert [disk.sectors for disk in rig.platform.all(BlockDriver)] == [1000, 8192 << 11, 2 << 11]  # type: ignore[type-abstract]
    assert path.stat().st_size == 1000 * SECTOR + 17
    assert (tmp_path / "new").stat().st_size == 2 << 20
    rig.close()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(CONTROLLERS)),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans(), st.integers(0, 30_000)), max_size=40),
)
def test_any_requests(controller: str, requests: list[tuple[int, int, bool, int]]) -> None:
    """Reads find what was last written before them, in the order in which requests were made; each request ends."""
    rig = DiskRig(controller)
    mirror = bytearray(80 * SECTOR)
    expected: list[bytes | None] = []
    rng = Random(3)
    for sector, count, write, pause in requests:
        span = slice(sector * SECTOR, (sector + count) * SECTOR)
        if write:
            mirror[span] = rng.randbytes(count * SECTOR)
            rig.submit(sector, count, bytes(mirror[span]))
            expected.append(None)
        else:
            rig.submit(sector, count)
            expected.append(bytes(mirror[span]))
        rig.sleep(pause)
    rig.sleep(NS_PER_S)
    assert [(data, error) for data, error, _ in rig.results] == [(data, None) for data in expected]
    assert 0 <= rig.interrupts <= len(requests)
    rig.close()
