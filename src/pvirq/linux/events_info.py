"""What an IRQ is to Xen: struct irq_info and the split-driver device behind it (drivers/xen/events, Linux 6.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pvirq.abi.errno import Errno
from pvirq.abi.xen import DOMID_SELF
from pvirq.linux.irqdesc import IrqDesc, IrqError

XEN_EOI_FLAG_SPURIOUS: Final = 1

# Why a port is masked; it opens when no reason is left (EVT_MASK_REASON_*).
MASK_EXPLICIT: Final = 1
MASK_TEMPORARY: Final = 2
MASK_EOI_PENDING: Final = 4

# Of a physical IRQ.
PIRQ_NEEDS_EOI: Final = 1
PIRQ_SHAREABLE: Final = 2
PIRQ_MSI_GROUP: Final = 4  # not the first message of several that were mapped together


class IrqType(IntEnum):
    """enum xen_irq_type."""

    UNBOUND = 0
    PIRQ = 1
    VIRQ = 2
    IPI = 3
    EVTCHN = 4


@dataclass(eq=False)
class XenbusDevice:
    """What the event layer keeps for a split-driver device, shown under xenbus/ in its sysfs directory.

    `spurious_threshold`: so many spurious events in a row are free (0 is taken as 1).
    """

    otherend_id: int
    spurious_threshold: int = 1
    event_channels: int = 0
    events: int = 0
    spurious_events: int = 0
    jiffies_eoi_delayed: int = 0

    def show(self, attribute: str) -> str:
        """Read a file of xenbus/ (drivers/xen/xenbus/xenbus_probe.c). IrqError(ENOENT)."""
        if attribute not in _XENBUS_STATS and attribute != "spurious_threshold":
            raise IrqError(Errno.ENOENT, f"xenbus/{attribute}")
        return f"{getattr(self, attribute)}\n"

    def store(self, attribute: str, text: str) -> None:
        """Write xenbus/spurious_threshold, a number as C writes them.

        IrqError: ENOENT, EACCES for the others, EINVAL, ERANGE beyond 32 bits.
        """
        if attribute in _XENBUS_STATS:
            raise IrqError(Errno.EACCES, f"xenbus/{attribute} is read-only")
        if attribute != "spurious_threshold":
            raise IrqError(Errno.ENOENT, f"xenbus/{attribute}")
        self.spurious_threshold = kstrtouint(text)


_XENBUS_STATS: Final = ("event_channels", "events", "spurious_events", "jiffies_eoi_delayed")


def kstrtouint(text: str) -> int:
    """A number that userland wrote: decimal, 0x hexadecimal or 0 octal, with one newline at most (kstrtouint).

    IrqError: EINVAL, ERANGE beyond 32 bits.
    """
    digits = text.removesuffix("\n").removeprefix("+")
    base = 10
    if digits[:2].lower() == "0x" and len(digits) > 2:
        digits, base = digits[2:], 16
    elif digits.startswith("0"):
        base = 8
    try:
        if not digits.isascii() or not digits.isalnum():
            raise ValueError(digits)
        value = int(digits, base)
    except ValueError:
        raise IrqError(Errno.EINVAL, f"{text!r} is not a number") from None
    if value >> 32:
        raise IrqError(Errno.ERANGE, f"{text!r} is more than 32 bits")
    return value


@dataclass(eq=False, slots=True)
class IrqInfo:
    """struct irq_info: what an IRQ is to Xen. `index` is the VIRQ number, the IPI or the pirq.

    `gsi`, `flags` (PIRQ_*) and `domid` (who has the pirq) are those of a physical IRQ; a message's gsi is 0.
    """

    desc: IrqDesc
    type: IrqType = IrqType.UNBOUND
    evtchn: int = 0
    cpu: int = 0
    index: int = 0
    dev: XenbusDevice | None = None
    mask_reason: int = 0
    is_active: bool = False  # between the port's event and its EOI: a second CPU must not handle it too
    is_accounted: bool = False
    spurious_cnt: int = 0
    eoi_cpu: int = 0
    irq_epoch: int = 0
    eoi_time: int = 0  # jiffies; 0: not delayed
    delayed: bool = False  # in a CPU's list of delayed EOIs
    gsi: int = 0
    flags: int = 0
    domid: int = DOMID_SELF

    @property
    def irq(self) -> int:
        return self.desc.irq
