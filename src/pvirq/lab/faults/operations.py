"""Faults of operations: one fails with an errno that it might have given, and ports or IRQ numbers are at an end.

Event channel operations are refused at the door of `pvirq.xen.probes`, a modelled kernel's as a real one's. Everything
else is refused in a real guest's hypercall table, but for the mappings of a modelled domain 0's backends: those are
refused in its grant table driver. Modelled kernels make no other hypercalls.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi import event_channel, grant_table, memory, physdev, sched, vcpu, xen
from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.grants import Gnttab
from pvirq.lab.faults.rule import Rule, ScheduledRule
from pvirq.lab.faults.values import GRANT_ERRORS, FaultError
from pvirq.linux.irq import IrqError
from pvirq.linux.xenlinux import XenLinux
from pvirq.pv.guest import PvGuest
from pvirq.pv.hypercalls import HYPERCALLS, Hypercall
from pvirq.pv.hypercalls.grant import COMMAND_MASK, PREEMPT_AFTER
from pvirq.pv.hypercalls.protocol import Preempted
from pvirq.pv.vcpu import PvVcpu
from pvirq.xen.domain import Domain
from pvirq.xen.evtchn_channels import ECS_FREE, EventChannels
from pvirq.xen.grant import GrantError
from pvirq.xen.probes import put

if TYPE_CHECKING:
    from pvirq.host import Host
    from pvirq.lab.faults.names import Names

M64: Final = (1 << 64) - 1
U32: Final = 0xFFFFFFFF
ALLOCATING: Final = frozenset(("alloc_unbound", "bind_interdomain", "bind_virq", "bind_ipi", "bind_pirq"))


def _commands(module: object, prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): value for name, value in vars(module).items() if name.startswith(prefix)}


EVTCHN: Final = _commands(event_channel, "EVTCHNOP_")
# Of a hypercall with commands: their numbers, and how the first argument says which it is.
FAMILIES: Final[dict[str, tuple[dict[str, int], int]]] = {
    "grant_table_op": (_commands(grant_table, "GNTTABOP_"), COMMAND_MASK),
    "memory_op": (_commands(memory, "XENMEM_"), memory.MEMOP_CMD_MASK),
    "physdev_op": (_commands(physdev, "PHYSDEVOP_"), U32),
    "sched_op": (_commands(sched, "SCHEDOP_"), U32),
    "vcpu_op": (_commands(vcpu, "VCPUOP_"), U32),
}
HYPERCALL_NUMBERS: Final = {
    name: number
    for name, number in _commands(xen, "HYPERVISOR_").items()
    if name not in ("event_channel_op", "event_channel_op_compat", "iret", "multicall") and number < xen.NR_hypercalls
}
# Grant operations whose result is a status in each of their structures: its size, and where in it.
STATUS_AT: Final = {
    "map_grant_ref": (32, 18),
    "unmap_grant_ref": (24, 20),
    "unmap_and_replace": (24, 20),
    "transfer": (24, 16),
    "copy": (40, 36),
    "swap_grant_ref": (12, 8),
    "setup_table": (24, 8),
    "query_size": (16, 12),
}


def operations() -> list[str]:
    """The names of all operations that can be made to fail."""
    names = [f"evtchn.{name}" for name in EVTCHN]
    for family, (commands, _mask) in FAMILIES.items():
        names += [f"{family}.{command}" for command in commands]
    return names + list(HYPERCALL_NUMBERS)


class Fail(Rule):
    """An operation is refused."""

    def __init__(self, *args: Any) -> None:
        """FaultError for an operation that there isn't, or an error that it can't have."""
        super().__init__(*args)
        self.operation, self.error = str(self.spec["operation"]), str(self.spec["error"])
        known = operations()
        if self.operation not in known:
            near = difflib.get_close_matches(self.operation, known, 1)
            raise FaultError(f"{self}: no operation {self.operation!r}" + (f", but {near[0]!r}" if near else ""))
        self.family, _, self.command = self.operation.partition(".")
        self.errno = Errno.__members__.get(self.error)
        if self.errno is None and (self.family != "grant_table_op" or self.command not in STATUS_AT):
            raise FaultError(f"{self}: only grant operations have a status such as {self.error}")
        self._wanted = self.spec.get("domain")

    @property
    def hypercall(self) -> int | None:
        """The number of the hypercall that it is in; None for event channel operations."""
        return None if self.family == "evtchn" else HYPERCALL_NUMBERS[self.family]

    def _is_domid(self, domid: int) -> bool:
        return self.names.is_domain(domid, self._wanted if isinstance(self._wanted, (int, str)) else None)

    def check(self, domain: Domain, operation: str) -> None:
        """An event channel operation begins."""
        if operation == self.command and self._is_domid(domain.domid) and self.due():
            self.note("refused", d=domain.domid, operation=self.operation, error=self.error)
            assert self.errno is not None
            raise XenError(self.errno, f"{self}")

    def map_granted(self) -> None:
        """Domain 0's backends are about to map, or use in place, what a frontend grants: GrantError, XenError."""
        if self.due():
            self.note("refused", d=0, operation=self.operation, error=self.error)
            if self.errno is not None:
                raise XenError(self.errno, f"{self}")
            raise GrantError(GRANT_ERRORS[self.error], f"{self}")

    @property
    def is_for_backends(self) -> bool:
        """Does it mean their mappings?"""
        return self.family == "grant_table_op" and self.command in ("", "map_grant_ref") and self._is_domid(0)

    def is_for(self, cpu: PvVcpu, arguments: tuple[int, ...]) -> bool:
        """Is the hypercall the one that is to fail?"""
        if self.command:
            commands, mask = FAMILIES[self.family]
            if arguments[0] & mask != commands[self.command]:
                return False
        return self._is_domid(cpu.domain.domid)

    def refuse(self, cpu: PvVcpu, arguments: tuple[int, ...]) -> int:
        """What the hypercall answers instead of doing it."""
        self.note(
            "refused", d=cpu.domain.domid, v=cpu.vcpu.vcpu_id, operation=self.operation, error=self.error
        )  # fmt: skip
        if self.errno is not None:
            raise XenError(self.errno, f"{self}")
        command, at, count = arguments
        size, status_at = STATUS_AT[self.command]
        count &= U32
        done = min(count, PREEMPT_AFTER)
        status = struct.pack("<h", GRANT_ERRORS[self.error])
        for i in range(done):
            cpu.write((at + i * size + status_at) & M64, status)
        if done < count:
            raise Preempted(command, at + done * size, count - done)
        return 0


class NoPorts(Rule):
    """A domain's highest permitted port is where it is out of them (d->max_evtchn_port)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._limits: dict[Domain, int] = {}  # what they were
        wanted = self.spec.get("domain")
        self._wanted = wanted if isinstance(wanted, (int, str)) else None

    def check(self, caller: Domain, operation: str) -> None:
        """An event channel operation begins: the limit is set by the first that wants a port."""
        if self.over:
            self.remove()
        elif operation in ALLOCATING and self.in_force:
            for domain in self.names.domains(self._wanted):
                if domain not in self._limits:
                    self._limits[domain] = domain.evtchn.max_port
                    domain.evtchn.max_port = min(
                        _free_port(domain.evtchn, self.spec.number("free")) - 1, domain.evtchn.max_port
                    )
            if caller in self._limits and _free_port(caller.evtchn, 0) > caller.evtchn.max_port:
                self.seen += 1
                self.note("refused", d=caller.domid, operation=f"evtchn.{operation}", error=Errno.ENOSPC.name)

    def lifted(self) -> None:
        for domain, limit in self._limits.items():
            domain.evtchn.max_port = limit
        self._limits.clear()


def _free_port(evtchn: EventChannels, index: int) -> int:
    """The `index`-th port that is free, from the lowest on."""
    for channel in evtchn.channels:
        if channel.state == ECS_FREE and channel.port and not evtchn.ops.is_busy(channel):
            if not index:
                return channel.port
            index -= 1
    return len(evtchn.channels) + index


class NoIrqs(ScheduledRule):
    """Modelled kernels find no dynamic IRQ any more: -ENOSPC, with the warning that theirs has for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._undo: list[Callable[[], None]] = []

    def act(self) -> None:
        wanted = self.spec.get("domain")
        for domain in self.names.domains(wanted if isinstance(wanted, (int, str)) else None):
            kernel = self.names.kernel(domain.domid)
            if kernel is None:
                continue
            if isinstance(kernel.events, XenLinux):
                self._empty_xenlinux(domain, kernel.events)
            else:
                self._empty(domain, kernel.irq, "alloc_desc", self._no_desc)

    def _empty(self, domain: Domain, owner: Any, name: str, refuse: Callable[[], int]) -> None:
        """Put a function of our own in front of the kernel's, in this one object."""
        found, free = getattr(owner, name), self.spec.number("free")

        def allocate(at: int | None = None) -> Any:
            nonlocal free
            if at is not None:  # a number that is wanted isn't a dynamic one
                return found(at)
            if not self.in_force:
                return found()
            if free:
                free -= 1
                return found()
            self.note("refused", d=domain.domid, operation=name, error=Errno.ENOSPC.name)
            return refuse()

        put(owner, name, allocate)
        self._undo.append(lambda: put(owner, name, None))

    @staticmethod
    def _no_desc() -> int:
        raise IrqError(Errno.ENOSPC, "no free IRQ number")

    def _empty_xenlinux(self, domain: Domain, events: XenLinux) -> None:
        """It looks through its table of bindings up to `nr_irqs`."""
        found = events.find_unbound_irq

        def refuse() -> int:
            limit, events.nr_irqs = events.nr_irqs, events.dynirq_base
            try:
                return found()
            finally:
                events.nr_irqs = limit

        self._empty(domain, events, "find_unbound_irq", refuse)

    def lifted(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


class HypercallFaults:
    """The rules that hypercalls of real guests pass, and the mappings of domain 0's backends.

    A guest's table is its own only while there is one.
    """

    def __init__(self, host: Host, names: Names) -> None:
        self._host = host
        self._rules: tuple[Fail, ...] = ()
        self._gnttab: Gnttab | None = None  # of domain 0's backends, while there are rules in front of it

    def add(self, rule: Fail) -> None:
        if not self._rules:
            self._host.on_machine.append(self._cover)
        self._rules = (*self._rules, rule)
        self._refresh()

    def remove(self, rule: Fail) -> None:
        if rule in self._rules:
            self._rules = tuple(other for other in self._rules if other is not rule)
            if not self._rules:
                self._host.on_machine.remove(self._cover)
            self._refresh()

    def _refresh(self) -> None:
        for guest in self._host.guests:
            self._cover(guest.machine)
        wanted = self._host.has_dom0 and any(rule.is_for_backends for rule in self._rules)
        if wanted and self._gnttab is None:
            gnttab = self._gnttab = self._host.backends.xenbus.gnttab
            for name in ("map", "access"):
                put(gnttab, name, partial(self._map, getattr(gnttab, name)))
        elif not wanted and self._gnttab is not None:
            for name in ("map", "access"):
                put(self._gnttab, name, None)
            self._gnttab = None

    def _map(self, found: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for rule in self._rules:
            if rule.is_for_backends:
                rule.map_granted()
        return found(*args, **kwargs)

    def _cover(self, machine: PvGuest) -> None:
        table = HYPERCALLS
        numbers = {rule.hypercall for rule in self._rules}
        if numbers:
            table = [self._refusing(i, *entry) if i in numbers else entry for i, entry in enumerate(HYPERCALLS)]
        machine.hypercalls = table
        for cpu in machine.cpus:
            cpu.hypercalls = table
        self._host.hypervisor.probes.refresh()  # instruments stand in front of that

    def _refusing(self, number: int, handler: Hypercall, arguments: int) -> tuple[Hypercall, int]:
        def hypercall(cpu: PvVcpu, *values: int) -> int:
            for rule in self._rules:
                if rule.hypercall == number and rule.is_for(cpu, values) and rule.due():
                    return rule.refuse(cpu, values)
            return handler(cpu, *values)

        return hypercall, arguments
