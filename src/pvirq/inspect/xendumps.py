"""The hypervisor's debug keys: 'e' (event channels), 'i' (interrupts) and 'q' (domains), line by line.

Each function looks at one message without the "(XEN)" and returns what it says, or None. Which domain a line belongs
to is the reader's to know. (xen/common/event_channel.c, xen/arch/x86/irq.c and io_apic.c, xen/common/keyhandler.c of
4.0 to 4.20.)
"""

from __future__ import annotations

import re
from typing import Final

from pvirq.inspect.model import Channel, DirectVector, IoapicPin, IrqGuest, Kind, VcpuInfo, XenIrq
from pvirq.inspect.source import Where

# -- 'e' ---------------------------------------------------------------------------------------------------------------

E_DOMAIN: Final = re.compile(r"\s*Event channel information for domain (\d{1,5}):\s*$")
E_POLLING: Final = re.compile(r"\s*Polling vCPUs: \{([\d,-]*)\}")
E_KNOWN: Final = re.compile(r"\s*(?:port \[p/m(?:/s)?\]|'e' pressed -> .*)\s*$")
E_FLUX: Final = re.compile(r"\s*(\d{1,7}) in flux\s*$")
E_PORT: Final = re.compile(
    r"\s*(\d{1,7}) \[([01])/([01])(?:/\s*([^\]\s]{0,12})\s*)?\]: s=(\d) n=(\d{1,6}) x=(\d{1,3})"
    r"((?: [a-zA-Z]=\S{1,64}){0,6})\s*$"
)
STATES: Final = {
    1: Kind.RESERVED, 2: Kind.UNBOUND, 3: Kind.INTERDOMAIN, 4: Kind.PIRQ, 5: Kind.VIRQ, 6: Kind.IPI,
}  # fmt: skip


def debug_e_port(where: Where, text: str) -> Channel | None:
    """A port of the 'e' key's; "in flux" (someone held its lock) is a port of which nothing is known."""
    match = E_PORT.match(text)
    if match is None:
        flux = E_FLUX.match(text)
        return Channel(where, int(flux[1]), 0, Kind.UNKNOWN, state="in flux") if flux else None
    port, pending, masked, state, kind, vcpu, consumer = match.groups()[:7]
    more: dict[str, int] = {}
    for name, value in (pair.split("=", 1) for pair in match[8].split()):
        if value.isascii() and value.isdecimal() and len(value) < 10:
            more[name] = int(value)
    what = STATES.get(int(kind), Kind.UNKNOWN)
    return Channel(
        where, int(port), int(vcpu), what,
        remote=more.get("d"),
        remote_port=more.get("p") if what is Kind.INTERDOMAIN else None,
        pirq=more.get("p") if what is Kind.PIRQ else None,
        virq=more.get("v") if what is Kind.VIRQ else None,
        irq=more.get("i") if what is Kind.PIRQ else None,
        pending=pending == "1", masked=masked == "1", state=state or "", consumer=int(consumer),
    )  # fmt: skip


def cpu_list(text: str) -> tuple[int, ...]:
    """A list such as "0-2,5" as numbers; at most 4,096 of them, nothing where it is no such list."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdecimal() and (not last or (last.isascii() and last.isdecimal()))):
            return ()
        if len(first) > 6 or len(last) > 6:
            return ()
        numbers += range(int(first), min(int(last or first), int(first) + 4096) + 1)
        if len(numbers) > 4096:
            return ()
    return tuple(numbers)


# -- 'i' ---------------------------------------------------------------------------------------------------------------

I_KNOWN: Final = re.compile(
    r"\s*(?:(?:Guest i|I)nterrupt information|IRQ information|Direct vector information"
    r"|IO-APIC interrupt information):\s*$"
)
I_IRQ: Final = re.compile(
    r"\s*IRQ:\s{0,8}(\d{1,6}) vec:([0-9a-fA-F]{2}) (\S{1,32})\s{1,20}status=([0-9a-fA-F]{1,8})"
    r" aff:\{([^}]{0,2000})\}/\{([^}]{0,2000})\}(.*)$"
)
# Up to Xen 4.12.
I_IRQ_OLD: Final = re.compile(
    r"\s*IRQ:\s{0,8}(\d{1,6}) affinity:(\S{1,2000}) vec:([0-9a-fA-F]{2}) type=(\S{1,32})\s{1,20}"
    r"status=([0-9a-fA-F]{1,8})(.*)$"
)
I_FLIGHT: Final = re.compile(r"\s*in-flight=(-?\d{1,6})(?:\s+(?:domain-list=)?(.*))?$")
I_GUEST: Final = re.compile(r"d?(\d{1,5}):\s{0,8}(\d{1,6})\(([A-Z?-]{1,8})\)")
I_DIRECT: Final = re.compile(r"\s*0x([0-9a-fA-F]{1,3}) -> (\S{1,100})\(\)\s*$")
I_PIN_OF: Final = re.compile(r"\s*IRQ\s{0,8}(\d{1,6}) Vec\s{0,8}(\d{1,4}):\s*$")
I_PIN: Final = re.compile(r"\s*Apic 0x([0-9a-fA-F]{1,4}), Pin\s{1,4}(\d{1,4}): (.*)$")
PAIR: Final = re.compile(r"([a-z_]{1,16})[=:](\S{1,16})")


def debug_i_irq(where: Where, text: str) -> XenIrq | None:
    """An interrupt of the 'i' key's."""
    if match := I_IRQ.match(text):
        irq, vector, kind, status, affinity, effective, rest = match.groups()
    elif match := I_IRQ_OLD.match(text):
        irq, affinity, vector, kind, status, rest = match.groups()
        effective = ""
    else:
        return None
    flight = I_FLIGHT.match(rest)
    guests = tuple(IrqGuest(int(a), int(b), c) for a, b, c in I_GUEST.findall(flight[2] or "")) if flight else ()
    return XenIrq(
        where, int(irq), int(vector, 16), kind, int(status, 16), affinity, effective,
        int(flight[1]) if flight else None, guests, "" if flight else rest.strip().removesuffix("()"),
    )  # fmt: skip


def debug_i_direct(where: Where, text: str) -> DirectVector | None:
    """A vector of Xen's own."""
    match = I_DIRECT.match(text)
    return DirectVector(where, int(match[1], 16), match[2]) if match else None


def debug_i_pin(where: Where, text: str, irq: int, vector: int) -> IoapicPin | None:
    """A pin of the I/O APIC; the line before it says of which IRQ and vector."""
    match = I_PIN.match(text)
    if match is None:
        return None
    return IoapicPin(where, irq, vector, int(match[1], 16), int(match[2]), tuple(PAIR.findall(match[3])))


# -- 'q' ---------------------------------------------------------------------------------------------------------------

Q_BEGIN: Final = re.compile(r"\s*'q' pressed -> ")
Q_DOMAIN: Final = re.compile(r"\s*General information for domain (\d{1,5}):\s*$")
Q_STATE: Final = re.compile(r"\s*refcnt=-?\d{1,10} dying=(-?\d{1,4}) pause_count=(-?\d{1,9})\s*$")
Q_HANDLE: Final = re.compile(r"\s*handle=([0-9a-fA-F-]{36}) vm_assist=")
Q_VCPUS: Final = re.compile(r"\s*VCPU information and callbacks for domain (\d{1,5}):\s*$")
Q_VCPU: Final = re.compile(
    r"\s*VCPU(\d{1,6}): CPU(\d{1,6}) \[has=([TF])\](?: flags=[0-9a-f]{1,16})? poll=(-?\d{1,9})"
    r" upcall_pend\s?=\s?([0-9a-f]{1,2}),? upcall_mask\s?=\s?([0-9a-f]{1,2})"
)
Q_PAUSE: Final = re.compile(r"\s*pause_count=(-?\d{1,9}) pause_flags=([0-9a-fA-F]{1,16})\s*$")
# What else such a dump has: read as belonging to it, and kept.
Q_OTHER: Final = re.compile(
    r"\s*(?:nr_pages=|NODE affinity for domain|UNIT\d+ affinities|No periodic timer|\d+ Hz periodic timer|"
    r"Rangesets belonging to domain|Memory pages belonging to domain|DomPage|XenPage|ExtraPage|PoD entries|"
    r"cpu_hard_affinity|cpu_soft_affinity|paging assistance|shadow_|watchdog \d|"
    r"(?:Interrupts|I/O Memory|I/O Ports|log-dirty)\s*\{|"
    r"Notifying guest \d+:\d+ )"
)


def debug_q_vcpu(where: Where, text: str) -> VcpuInfo | None:
    """A vCPU of the 'q' key's."""
    match = Q_VCPU.match(text)
    if match is None:
        return None
    vcpu, cpu, has, poll, pending, masked = match.groups()
    return VcpuInfo(where, int(vcpu), int(cpu), has == "T", int(poll), int(pending, 16), int(masked, 16))
