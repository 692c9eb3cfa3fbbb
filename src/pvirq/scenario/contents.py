"""What is on a scenario's disks, as far as the workload knows, so that each read can be compared."""

from __future__ import annotations

from pvirq.drivers.blkfront import BlkFront
from pvirq.linux.kthread import Body

SECTOR = 512


class Contents:
    """What was written to the disks of all guests. `wrong` counts sectors that came back as something else."""

    def __init__(self) -> None:
        self._sectors: dict[tuple[BlkFront, int], bytes] = {}
        self.wrong = 0

    @property
    def known(self) -> int:
        """How many sectors' contents are known."""
        return len(self._sectors)

    def write(self, disk: BlkFront, sector: int, data: bytes) -> Body[None]:
        """Write to a disk and remember what."""
        yield from disk.write(sector, data)
        for i in range(len(data) // SECTOR):
            self._sectors[disk, sector + i] = data[i * SECTOR : (i + 1) * SECTOR]

    def read(self, disk: BlkFront, sector: int, count: int) -> Body[None]:
        """Read from a disk and compare with what was written there."""
        data = yield from disk.read(sector, count)
        for i in range(count):
            known = self._sectors.get((disk, sector + i))
            if known is not None and known != data[i * SECTOR : (i + 1) * SECTOR]:
                self.wrong += 1
