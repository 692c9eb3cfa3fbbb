"""Local APICs, as far as interrupts from devices go through them: which vectors wait, which await their EOI.

A CPU takes a vector only if its class (the high four bits) is above that of the one in service that has not been EOI'd.
The hypervisor handles one interrupt at a time, on all CPUs together: whatever comes meanwhile waits in an IRR.
"""

from __future__ import annotations

from collections.abc import Callable


class LocalApic:
    """One CPU's: `irr` requested vectors, `isr` those in service, the highest last.

    `pending_eoi` is the hypervisor's stack of interrupts whose EOI a guest owes (struct pending_eoi of irq.c):
    [irq, vector, ready].
    """

    __slots__ = ("cpu", "irr", "isr", "pending_eoi")

    def __init__(self, cpu: int) -> None:
        self.cpu = cpu
        self.irr: set[int] = set()
        self.isr: list[int] = []
        self.pending_eoi: list[list[int]] = []


class LocalApics:
    """All CPUs' local APICs. `handler(apic, vector)` is called for each interrupt that a CPU takes.

    `on_eoi(vector)` is called for each EOI: the I/O APIC hears of them. `merged` counts requests of a vector that was
    requested already; they make one interrupt.
    """

    def __init__(self, cpus: int, handler: Callable[[LocalApic, int], None]) -> None:
        self.cpus = [LocalApic(cpu) for cpu in range(cpus)]
        self.on_eoi: Callable[[int], None] = lambda vector: None
        self.merged = 0
        self._handler = handler
        self._off = 0
        self._waiting = False  # there may be one in an IRR

    def request(self, destinations: int, vector: int) -> None:
        """Deliver `vector` to the first CPU of bitmap `destinations`."""
        apic = self.cpus[(destinations & -destinations).bit_length() - 1]
        irr, isr = apic.irr, apic.isr
        if self._off or irr or (isr and vector >> 4 <= isr[-1] >> 4):
            self.merged += vector in irr
            irr.add(vector)
            self._waiting = True
            if not self._off:
                self._take_all()
            return
        self._off = 1
        isr.append(vector)
        try:
            self._handler(apic, vector)
        finally:
            self._off = 0
        if self._waiting:
            self._take_all()

    def eoi(self, apic: LocalApic) -> None:
        """The end of the highest interrupt in service (ack_APIC_irq)."""
        self.on_eoi(apic.isr.pop())
        if self._waiting and not self._off:
            self._take_all()

    def disable(self) -> None:
        """No interrupt is taken until `enable`; nests."""
        self._off += 1

    def enable(self) -> None:
        self._off -= 1
        if self._waiting and not self._off:
            self._take_all()

    def _take_all(self) -> None:
        self._off += 1
        try:
            more = True
            while more:
                more = False
                for apic in self.cpus:
                    irr, isr = apic.irr, apic.isr
                    while irr:
                        vector = max(irr)
                        if isr and vector >> 4 <= isr[-1] >> 4:
                            break
                        irr.remove(vector)
                        isr.append(vector)
                        self._handler(apic, vector)
                        more = True
            self._waiting = any(apic.irr for apic in self.cpus)
        finally:
            self._off -= 1
