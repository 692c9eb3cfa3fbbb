"""A network card like Intel's e1000, the wire it hangs on, and the driver's interrupt side with NAPI.

The card's one interrupt is a level line, which is up while an unmasked cause is set, or an MSI, which is sent as one
becomes set; reading the cause register clears all. The driver's handler masks all causes and leaves the rings to its
poll, which unmasks them when it has found less than its budget: what comes meanwhile costs no interrupt of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.hardware.device import US, Board, Declaration, Deferred, Driver, Interrupt
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn
from pvirq.xen.msi import PciDevice
from pvirq.xen.timer import NS_PER_S

# Interrupt causes (ICR).
TXDW: Final = 0x01
LSC: Final = 0x04
RXDMT0: Final = 0x10
RXO: Final = 0x40
RXT0: Final = 0x80

CAUSES: Final = TXDW | LSC | RXDMT0 | RXO | RXT0  # what the driver unmasks

RING: Final = 256
BUDGET: Final = 64  # NAPI's
FRAME_MIN, FRAME_MAX = 60, 9018
FRAME_GAP: Final = 24  # preamble, checksum and gap: what a frame takes of the wire besides


class Wire:
    """What the card is connected to: a full-duplex cable, and its far end, which is yours.

    Frames that the card sends come to `on_frame`, and the last of them are in `frames`; `send` puts one on the wire.
    A frame takes its length at `bits_per_s`, one after the other in each direction, and then `latency_ns`.
    """

    def __init__(self, board: Board, latency_ns: int, bits_per_s: int) -> None:
        self.latency_ns = latency_ns
        self.bits_per_s = bits_per_s
        self.frames: deque[bytes] = deque(maxlen=4096)
        self.on_frame: Callable[[bytes], None] = lambda frame: None
        self.to_card: Callable[[bytes], None] = lambda frame: None
        self._clock = board.clock
        self._free = [0, 0]  # by direction, when the wire is free: from the card, to it

    def _take(self, direction: int, frame: bytes) -> int:
        """When the frame's last bit is on the wire."""
        took = (max(len(frame), FRAME_MIN) + FRAME_GAP) * 8 * NS_PER_S // self.bits_per_s
        self._free[direction] = max(self._free[direction], self._clock.now()) + took
        return self._free[direction]

    def from_card(self, frame: bytes) -> int:
        """The card sends; returns when it is done with that, in ns."""
        sent = self._take(0, frame)
        self._clock.at(sent + self.latency_ns, lambda: self._arrive(frame))
        return sent

    def _arrive(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.on_frame(frame)

    def send(self, frame: bytes) -> None:
        """The far end sends a frame to the card. ValueError for a size that no frame has."""
        check_frame(frame)
        self._clock.at(self._take(1, frame) + self.latency_ns, lambda: self.to_card(frame))


def check_frame(frame: bytes) -> None:
    """ValueError for a size that no frame has: a header and up to 9018 bytes in all."""
    if not 14 <= len(frame) <= FRAME_MAX:
        raise ValueError(f"a frame of {len(frame)} bytes: expected 14 to {FRAME_MAX}")


class E1000:
    """The card. Descriptor rings of 256: `tx` has frames to send, `rx` received ones, for `rx_free` buffers.

    `missed` counts frames that found no receive buffer. `itr_ns` is the least time between two interrupts.
    """

    def __init__(self, board: Board, interrupt: Interrupt, wire: Wire, itr_ns: int) -> None:
        self.wire = wire
        self.itr_ns = itr_ns
        self.rx: deque[bytes] = deque()
        self.rx_free = 0
        self.tx_sent = 0  # descriptors that are written back, and not yet taken
        self.missed = 0
        self._board = board
        self._interrupt = interrupt
        self._icr = 0
        self._ims = 0
        self._link = False
        self._next_interrupt = 0
        self._throttled = Deferred(board, self._assert)
        wire.to_card = self._receive

    # Registers.

    def read_icr(self) -> int:
        """Interrupt causes. Clears them and lowers the interrupt."""
        icr, self._icr = self._icr, 0
        self._throttled.cancel()
        self._interrupt.lower()
        return icr

    def write_ims(self, causes: int) -> None:
        """Unmask causes; one that is set interrupts."""
        fresh = causes & ~self._ims
        self._ims |= causes
        if self._icr & fresh:
            self._want()

    def write_imc(self, causes: int) -> None:
        """Mask causes."""
        self._ims &= ~causes
        if not self._icr & self._ims:
            self._throttled.cancel()
            self._interrupt.lower()

    def write_ics(self, causes: int) -> None:
        """Set causes by software."""
        self._cause(causes)

    def write_rdt(self, buffers: int) -> None:
        """So many more receive buffers are free."""
        self.rx_free += buffers

    def write_tdt(self, frame: bytes) -> None:
        """One more descriptor: send this."""
        clock = self._board.clock
        clock.at(self.wire.from_card(frame), self._sent)

    def set_link(self, up: bool) -> None:
        """Somebody plugs the cable, or pulls it."""
        self._link = up
        self._cause(LSC)

    def read_link(self) -> bool:
        return self._link

    def _sent(self) -> None:
        self.tx_sent += 1
        self._cause(TXDW)

    def _receive(self, frame: bytes) -> None:
        if not self._link:
            return
        if not self.rx_free:
            self.missed += 1
            self._cause(RXO)
            return
        self.rx_free -= 1
        self.rx.append(frame)
        self._cause(RXT0)

    def _cause(self, causes: int) -> None:
        fresh = causes & ~self._icr
        self._icr |= causes
        if fresh & self._ims:
            self._want()

    def _want(self) -> None:
        if not self._throttled.pending:
            wait = self._next_interrupt - self._board.clock.now()
            if wait > 0:
                self._throttled.after(wait)
            else:
                self._assert()

    def _assert(self) -> None:
        if self._icr & self._ims:
            self._next_interrupt = self._board.clock.now() + self.itr_ns
            self._interrupt.raise_()


class NicDriver(Driver):
    """The card's driver. `transmit` sends a frame; `on_receive` gets each that comes, in process context.

    `dropped` counts frames that found the transmit ring full; a bridge stops at `full` and goes on at `on_room`.
    """

    module = "e1000"
    uses = {"transmit": "the kernel sends a frame of 60 bytes", "receive": "such a frame comes from the wire",
            "pull": "somebody pulls the cable", "plug": "somebody plugs it in"}  # fmt: skip

    def __init__(
        self,
        board: Board,
        name: str,
        card: E1000,
        pci: PciDevice,
        gsi: int,
        row: str,
        bridge: str,
        watchdog_ns: int,
    ) -> None:
        super().__init__(board, name)
        self.bridge = bridge
        self.card = card
        self.wire = card.wire
        self.pci = pci
        self._gsi = gsi
        self._row = row
        self._watchdog = Deferred(board, self._watch)
        self._watchdog_ns = watchdog_ns
        self._in_ring = 0
        self._polling = False
        self.link = False
        self.tx_packets = self.rx_packets = self.dropped = 0
        self.on_receive: Callable[[bytes], None] = lambda frame: None
        self.on_room: Callable[[], None] = lambda: None

    def probe(self) -> None:
        """Probed and brought up (e1000_open): receive buffers, the interrupt, and one for the link's state."""
        irq = self.pci_irq(self.pci, self._gsi)
        self.card.write_imc(0xFFFFFFFF)
        self.card.read_icr()
        self.request_irq(irq, self._interrupt, 0 if self._gsi == -1 else IRQF_SHARED, self._row)
        self.card.write_rdt(RING - 1)
        self.card.write_ims(CAUSES)
        self.card.set_link(True)

    def _watch(self) -> None:
        """e1000_watchdog: make sure that the receive ring is looked at."""
        if self.bound and self.link:
            self.card.write_ics(RXDMT0)
            self._watchdog.after(self._watchdog_ns)

    def remove(self) -> None:
        self._watchdog.cancel()
        self.card.write_imc(0xFFFFFFFF)
        self.card.rx_free = 0
        self.card.rx.clear()
        super().remove()

    @property
    def full(self) -> bool:
        return self._in_ring >= RING - 1

    def transmit(self, frame: bytes) -> bool:
        """Send a frame; False, and it is dropped, where the ring is full or the driver not there.

        ValueError for a size that no frame has.
        """
        check_frame(frame)
        if self.full or not self.bound:
            self.dropped += 1
            return False
        self._in_ring += 1
        self.tx_packets += 1
        self.card.write_tdt(frame)
        return True

    def _use(self, action: str, rng: Random) -> None:
        frame = b"\xff" * 6 + bytes((2, 0, 0, 0, 0, 1)) + b"\x08\x06" + rng.randbytes(46)
        if action == "transmit":
            self.transmit(frame)
        elif action == "receive":
            self.wire.send(frame)
        else:
            self.card.set_link(action == "plug")

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """e1000_intr, e1000_intr_msi"""
        causes = self.card.read_icr()
        if not causes:
            return IRQ_NONE
        if causes & LSC:
            self.link = self.card.read_link()
            if self.link and self._watchdog_ns:
                self._watchdog.after(self._watchdog_ns)
        self.card.write_imc(0xFFFFFFFF)
        if not self._polling:
            self._polling = True
            self.kernel.queue_work(self._poll)
        return IRQ_HANDLED

    def _poll(self) -> None:
        """e1000_clean: transmitted descriptors, then up to 64 received frames."""
        if not self.bound:
            self._polling = False
            return
        card = self.card
        was_full = self.full
        self._in_ring -= card.tx_sent
        card.tx_sent = 0
        work = 0
        while card.rx and work < BUDGET:
            frame = card.rx.popleft()
            card.write_rdt(1)
            work += 1
            self.rx_packets += 1
            self.on_receive(frame)
        if was_full and not self.full:
            self.on_room()
        if work == BUDGET:
            self.kernel.queue_work(self._poll)
        else:
            self._polling = False
            card.write_ims(CAUSES)


@dataclass(frozen=True)
class NicDeclaration(Declaration):
    """A network card (e1000) on a wire, by MSI, or (gsi) on a shared level line; its row is `row`, else its name.

    `bridge` is the one of domain 0 whose port it is; whoever builds that reads it.
    """

    gsi: int = -1
    slot: str = ""
    row: str = ""
    latency_ns: int = 50 * US
    bits_per_s: int = 1_000_000_000
    itr_ns: int = 50 * US  # 20,000 interrupts a second at most
    watchdog_ns: int = 0  # e1000's has 2 s: an interrupt so often while the link is up
    bridge: str = "xenbr0"
    driver: ClassVar[type[Driver]] = NicDriver

    def make(self, board: Board) -> NicDriver:
        self.at_least(latency_ns=0, itr_ns=0, watchdog_ns=0, bits_per_s=1)
        pci = board.pci(self.name, self.slot)
        interrupt = board.interrupt(pci, self.gsi)
        card = E1000(board, interrupt, Wire(board, self.latency_ns, self.bits_per_s), self.itr_ns)
        return NicDriver(board, self.name, card, pci, self.gsi, self.row or self.name, self.bridge, self.watchdog_ns)
