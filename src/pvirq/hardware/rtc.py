"""The real-time clock's interrupts (MC146818) and its driver's (rtc-cmos, or drivers/char/rtc.c of old kernels).

The line is high from the first enabled flag on until register C is read, which clears all flags. Where nobody reads
it no further edge comes: the next alarm is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.abi.errno import XenError
from pvirq.hardware.device import Board, Declaration, Deferred, Driver
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IrqError, IrqReturn
from pvirq.xen.timer import NS_PER_S

# Bits of register B (enable) and C (flag).
PIE = PF = 0x40
AIE = AF = 0x20
UIE = UF = 0x10
IRQF: Final = 0x80
REASONS: Final = PF | AF | UF

RTC_CLASS: Final = (2, 6, 22)  # from here on distributions' kernels have rtc-cmos instead of the old driver


class Mc146818:
    """The chip, as far as interrupts go. Its time of day is virtual time; an alarm is a moment of that, in ns."""

    def __init__(self, board: Board, gsi: int) -> None:
        self._clock = board.clock
        self._pin = board.pin(gsi)
        self._enabled = 0
        self._flags = 0
        self._period_ns = 0
        self._alarm = Deferred(board, self._alarm_due)
        self._periodic = Deferred(board, self._period_over)
        self._update = Deferred(board, self._second_over)

    # Registers.

    def read_c(self) -> int:
        """Register C: why the line is high. Clears it."""
        flags, self._flags = self._flags, 0
        self._pin.lower()
        return flags

    def read_b(self) -> int:
        return self._enabled

    def write_b(self, enabled: int) -> None:
        """Register B: what may interrupt. A flag that is set already interrupts at once."""
        self._enabled = enabled & REASONS
        if enabled & UIE and not self._update.pending:
            self._update.after(NS_PER_S - self._clock.now() % NS_PER_S)
        if enabled & PIE and self._period_ns and not self._periodic.pending:
            self._periodic.after(self._period_ns)
        self._flag(0)

    def write_rate(self, hz: int) -> None:
        """Register A's rate: 2 to 8192 a second, a power of 2; 0 is off."""
        self._periodic.cancel()
        self._period_ns = NS_PER_S // hz if hz else 0
        if hz and self._enabled & PIE:
            self._periodic.after(self._period_ns)

    def write_alarm(self, when: int) -> None:
        """The alarm registers: at this moment the alarm flag is set; one in the past never comes."""
        self._alarm.cancel()
        if when >= self._clock.now():
            self._alarm.after(when - self._clock.now())

    # Inside.

    def _flag(self, flags: int) -> None:
        self._flags |= flags
        if self._flags & self._enabled:
            self._flags |= IRQF
            self._pin.raise_()

    def _alarm_due(self) -> None:
        self._flag(AF)

    def _period_over(self) -> None:
        self._flag(PF)
        if self._enabled & PIE:
            self._periodic.after(self._period_ns)

    def _second_over(self) -> None:
        self._flag(UF)
        if self._enabled & UIE:
            self._update.after(NS_PER_S)


class RtcDriver(Driver):
    """The driver. `on_interrupt` is told of each interrupt's reasons; `alarms`, `updates`, `periods` count them."""

    module = "rtc_cmos"
    uses = {"alarm": "set an alarm for a second from now"}

    def __init__(self, board: Board, name: str, chip: Mc146818, gsi: int, row: str) -> None:
        super().__init__(board, name)
        self.chip = chip
        self._gsi = gsi
        self._old = self.kernel.events.version < RTC_CLASS
        self._row = row or ("rtc" if self._old else "rtc0")
        if self._old:
            self.module = "rtc"
        self.alarms = self.updates = self.periods = 0
        self.on_interrupt: Callable[[int], None] = lambda reasons: None

    def probe(self) -> None:
        self.chip.write_b(0)
        self.chip.read_c()
        # The old driver knows its IRQ's number; a kernel that has no such line fails it there.
        irq = self._gsi
        if not self._old:
            irq = self.kernel.events.register_gsi(self._gsi, level=False, active_low=False)
        self.request_irq(irq, self._interrupt, 0, self._row)

    def _failure(self, error: IrqError | XenError) -> str:
        return f"rtc: IRQ {self._gsi} is not free." if self._old else super()._failure(error)

    def remove(self) -> None:
        self.chip.write_b(0)
        super().remove()

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """cmos_interrupt"""
        chip = self.chip
        flags = chip.read_c() & (chip.read_b() | IRQF)
        if not flags & REASONS:
            return IRQ_NONE
        if flags & AF:
            self.alarms += 1
            # An alarm is for once.
            chip.write_b(chip.read_b() & ~AIE)
            chip.read_c()
        self.updates += bool(flags & UF)
        self.periods += bool(flags & PF)
        self.on_interrupt(flags & REASONS)
        return IRQ_HANDLED

    def _use(self, action: str, rng: Random) -> None:
        self.set_alarm(self.kernel.now() + NS_PER_S)

    def set_alarm(self, when: int) -> None:
        """Interrupt at `when`, ns of virtual time, once."""
        self.chip.write_b(self.chip.read_b() & ~AIE)
        self.chip.read_c()
        self.chip.write_alarm(when)
        self.chip.write_b(self.chip.read_b() | AIE)

    def set_update(self, on: bool) -> None:
        """An interrupt each second."""
        self.chip.write_b(self.chip.read_b() | UIE if on else self.chip.read_b() & ~UIE)

    def set_periodic(self, hz: int) -> None:
        """`hz` interrupts a second, a power of 2 up to 8192; 0: none. ValueError for another rate."""
        if hz and (hz < 2 or hz > 8192 or hz & hz - 1):
            raise ValueError(f"rtc: {hz} interrupts a second: expected a power of 2 from 2 to 8192")
        self.chip.write_rate(hz)
        self.chip.write_b(self.chip.read_b() | PIE if hz else self.chip.read_b() & ~PIE)


@dataclass(frozen=True)
class RtcDeclaration(Declaration):
    """The real-time clock; its row is `row`, else as the kernel calls it: rtc0, or rtc in 2.6.18."""

    gsi: int = 8
    row: str = ""
    driver: ClassVar[type[Driver]] = RtcDriver

    def make(self, board: Board) -> RtcDriver:
        return RtcDriver(board, self.name, Mc146818(board, self.gsi), self.gsi, self.row)
