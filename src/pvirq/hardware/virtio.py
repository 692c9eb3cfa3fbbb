"""virtio-blk over PCI with MSI-X: a message for configuration changes and one for each queue.

As far as interrupts go: a queue's used ring, the message that tells of it, and its suppression while the driver takes
what is there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.hardware.device import Board, Driver, HardwareError
from pvirq.hardware.disk import BlockDriver, Command, DiskDeclaration, Medium
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IrqReturn
from pvirq.xen.msi import PciDevice
from pvirq.xen.timer import Timer

CONFIG_VECTOR: Final = 0
QUEUE_SIZE: Final = 256


class VirtQueue:
    """One queue: what the device has used and the driver not yet taken."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.used: deque[tuple[Command, Errno | None]] = deque()
        self.interrupts = True  # not VRING_AVAIL_F_NO_INTERRUPT


class VirtioBlk:
    """The device, and its host behind it."""

    def __init__(self, board: Board, pci: PciDevice, medium: Medium, queues: int) -> None:
        self.medium = medium
        self.pci = pci
        self._clock = board.clock
        self.queues = [VirtQueue(i) for i in range(queues)]
        self.config_generation = 0
        self._work: set[Timer] = set()

    def reset(self) -> None:
        """A write of 0 to the device's status: it forgets its requests."""
        for timer in self._work:
            timer.cancel()
        self._work.clear()
        self.medium.stop()
        for queue in self.queues:
            queue.used.clear()

    def kick(self, queue: VirtQueue, command: Command) -> None:
        """The driver has put a request in the queue."""
        when = self.medium.take_turn(command.sector, command.count)
        timer = self._clock.at(when, lambda: self._finish(timer, queue, command))
        self._work.add(timer)

    def _finish(self, timer: Timer, queue: VirtQueue, command: Command) -> None:
        self._work.discard(timer)
        error = None
        if not self.medium.fits(command.sector, command.count):
            error = Errno.EIO
        elif command.data is None:
            command.data = self.medium.read(command.sector, command.count)
        else:
            self.medium.write(command.sector, command.data)
        queue.used.append((command, error))
        if queue.interrupts:
            self.pci.raise_msi(1 + queue.index)

    def change_config(self) -> None:
        """The host has changed something, as the disk's size."""
        self.config_generation += 1
        self.pci.raise_msi(CONFIG_VECTOR)


class VirtioBlkDriver(BlockDriver):
    """The driver: a request goes into the queue of the CPU that makes it, whose message tells of its end."""

    module = "virtio_blk"
    max_sectors = 2560  # BLK_DEF_MAX_SECTORS of 6.1
    uses = {**BlockDriver.uses, "config": "the host changes the configuration"}

    def __init__(self, board: Board, name: str, device: VirtioBlk) -> None:
        super().__init__(board, name, device.medium, QUEUE_SIZE)
        self.device = device
        self.config_changes = 0
        self._seen = 0

    def probe(self) -> None:
        """vp_find_vqs_msix: all messages at once, then their handlers in order."""
        queues = self.device.queues
        irqs = self.enable_msi(self.device.pci, 1 + len(queues))
        self.request_irq(irqs[0], self._config_changed, 0, f"{self.name}-config")
        for queue, irq in zip(queues, irqs[1:], strict=True):
            self.request_irq(irq, self._vring_interrupt, 0, f"{self.name}-req.{queue.index}", queue)

    def _reset(self) -> None:
        self.device.reset()

    def _issue(self, command: Command) -> None:
        queues = self.device.queues
        self.device.kick(queues[self.kernel.cpu % len(queues)], command)

    def _vring_interrupt(self, irq: int, queue: object) -> IrqReturn:
        """vring_interrupt, virtblk_done: take until nothing is left with interrupts allowed again."""
        assert isinstance(queue, VirtQueue)
        if not queue.used:
            return IRQ_NONE
        queue.interrupts = False
        while queue.used:
            command, error = queue.used.popleft()
            self._complete(command, error)
        queue.interrupts = True
        return IRQ_HANDLED

    def _config_changed(self, irq: int, dev_id: object) -> IrqReturn:
        """vp_config_changed"""
        self._seen = self.device.config_generation
        self.config_changes += 1
        return IRQ_HANDLED

    def _use(self, action: str, rng: Random) -> None:
        if action == "config":
            self.device.change_config()
        else:
            super()._use(action, rng)

    def _timed_out(self, command: Command) -> None:
        """virtio-blk waits on; its host is to be trusted."""


@dataclass(frozen=True)
class VirtioBlkDeclaration(DiskDeclaration):
    """A virtio disk by MSI-X, NAME-config and NAME-req.N; `queues` 0: one for each CPU."""

    queues: int = 0
    slot: str = ""
    command_ns: int = 50_000
    seek_ns: int = 0
    bytes_per_s: int = 1_000_000_000
    driver: ClassVar[type[Driver]] = VirtioBlkDriver

    def make(self, board: Board) -> VirtioBlkDriver:
        if not 0 <= self.queues <= 64:
            raise HardwareError(f"queues {self.queues}: expected 0 to 64", "queues")
        queues = self.queues or len(board.kernel.domain.vcpus)
        pci = board.pci(self.name, self.slot, vectors=1 + queues, msix=True)
        return VirtioBlkDriver(board, self.name, VirtioBlk(board, pci, self.medium(board), queues))
