"""What a rule calls things by: domains, and what is behind an event channel (its row, its device, its kind).

A modelled kernel is asked for the rows of its /proc/interrupts. Of a real one, Xen doesn't know them: they are derived
as Linux makes them, from what the port is bound to and from xenstore, where each frontend writes its ports.

    port                              row                          device
    device/vbd/D/[queue-Q/]           blkif                        vbd-D
    device/vif/D/[queue-Q/]           ethD, vifD-qQ-tx, -rx        vif-D
    device/KIND/D/                    KIND                         KIND-D
    store/port, console/port          xenbus, hvc_console          xenstore, console
    VIRQ_TIMER, _DEBUG, another       timerC, debugC, virqN
    IPI                               ipiC: of what kind, only the guest's kernel knows
    physical IRQ                      pirqN

D is the device's number, C the vCPU. Where both directions share a port, the row has the interface's own name, which
need not be after its number.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi import xen as abi
from pvirq.abi.errno import XenError
from pvirq.drivers.xenstore import Client
from pvirq.lab.faults.kinds import Spec
from pvirq.lab.faults.values import FaultError
from pvirq.linux.kernel import Kernel
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.evtchn_channels import (
    ECS_INTERDOMAIN,
    ECS_IPI,
    ECS_PIRQ,
    ECS_UNBOUND,
    ECS_VIRQ,
    Channel,
)

if TYPE_CHECKING:
    from pvirq.guest import Guest
    from pvirq.host import Host
    from pvirq.modelled import ModelledGuest

STATES: Final = {"interdomain": ECS_INTERDOMAIN, "ipi": ECS_IPI, "pirq": ECS_PIRQ, "virq": ECS_VIRQ}
VIRQS: Final = {
    name.removeprefix("VIRQ_").lower(): number
    for name, number in vars(abi).items()
    if name.startswith("VIRQ_") and isinstance(number, int) and not name.startswith("VIRQ_ARCH_")
}
PORT_NODE: Final = re.compile(r"event-channel(?:-(tx|rx|ctrl))?", re.ASCII)

Found = tuple[str, str]
"""A row's name, and the device's."""


class Names:
    """The names of one host's domains and channels.

    What xenstore says of a channel is remembered for as long as both its ends stay what they are.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[Channel, tuple[tuple[object, ...], Found]] = {}
        self._client: Client | None = None

    # -- domains -------------------------------------------------------------------------------------------------------

    def domain_name(self, domid: int) -> str:
        """What the toolstack calls a domain; "" for one that it doesn't know."""
        host = self._host
        guests: list[Guest | ModelledGuest] = [*host.guests, *host.modelled]
        for guest in guests:
            if guest.domain.domid == domid:
                return guest.name
        return "Domain-0" if domid == 0 else ""

    def is_domain(self, domid: int, wanted: int | str | None) -> bool:
        """Does a rule's `domain` mean this one? None means any."""
        if wanted is None or domid == wanted:
            return True
        return isinstance(wanted, str) and self.domain_name(domid) == wanted

    def domains(self, wanted: int | str | None) -> list[Domain]:
        """The domains that there are now and that it means."""
        everyone = self._host.hypervisor.domains
        return [domain for domid, domain in sorted(everyone.items()) if self.is_domain(domid, wanted)]

    def kernel(self, domid: int) -> Kernel[Any] | None:
        """A modelled domain's kernel."""
        host = self._host
        if domid == 0:
            return host.dom0 if host.has_dom0 else None
        return next((guest.kernel for guest in host.modelled if guest.domain.domid == domid), None)

    # -- channels ------------------------------------------------------------------------------------------------------

    def rows(self, domain: Domain, channel: Channel) -> list[str]:
        """The rows of /proc/interrupts that its events may count in: several where a line is shared."""
        kernel = self.kernel(domain.domid)
        if kernel is not None:
            irq: int = kernel.events.irq_from_evtchn(channel.port)
            desc = kernel.irq.descs.get(irq)
            return [] if desc is None else [action.name for action in desc.actions]
        if channel.state == ECS_VIRQ:
            named = {abi.VIRQ_TIMER: "timer", abi.VIRQ_DEBUG: "debug"}.get(channel.virq)
            return [f"{named}{channel.notify_vcpu}" if named else f"virq{channel.virq}"]
        if channel.state == ECS_IPI:
            return [f"ipi{channel.notify_vcpu}"]
        if channel.state == ECS_PIRQ:
            return [f"pirq{channel.pirq}"]
        found = self._in_xenstore(domain, channel)
        return [found[0]] if found else []

    def device(self, domain: Domain, channel: Channel) -> str:
        """The frontend in `domain` whose end it is; "" for none."""
        found = self._in_xenstore(domain, channel)
        return found[1] if found else ""

    def _in_xenstore(self, domain: Domain, channel: Channel) -> Found | None:
        if not self._host.has_dom0 or channel.state not in (ECS_INTERDOMAIN, ECS_UNBOUND):
            return None
        remote = channel.remote_domain
        # The other end's generation too: the port stays when the device behind it is another.
        other = None if remote is None else remote.evtchn.channels[channel.remote_port].generation
        identity = (domain, channel.generation, channel.state, remote, channel.remote_port, other)
        known = self._known.get(channel)
        if known is not None and known[0] == identity:
            return known[1]
        found = self._search(domain.domid, channel.port)
        if found is not None:  # else the node may still be to come
            self._known[channel] = identity, found
        return found

    def _search(self, domid: int, port: int) -> Found | None:
        base = f"/local/domain/{domid}"
        for node, row, device in (("store", "xenbus", "xenstore"), ("console", "hvc_console", "console")):
            if self._read(f"{base}/{node}/port") == str(port):
                return row, device
        for kind in self._list(f"{base}/device"):
            for number in self._list(f"{base}/device/{kind}"):
                where = f"{base}/device/{kind}/{number}"
                for queue in ("", *(name for name in self._list(where) if name.startswith("queue-"))):
                    for key in self._list(f"{where}/{queue}" if queue else where):
                        match = PORT_NODE.fullmatch(key)
                        if match and self._read(f"{where}/{queue}/{key}" if queue else f"{where}/{key}") == str(port):
                            return _row(kind, number, queue, match[1]), f"{kind}-{number}"
        return None

    # Not by the store's own `read` and `ls`: those go on to deliver its events, and an event may be what asks.

    def _connection(self) -> Client:
        if self._client is None:
            self._client = self._host.xenstored.client()
        return self._client

    def _read(self, path: str) -> str:
        connection = self._connection()
        try:
            return connection.store.read(connection, path).decode("ascii", "replace")
        except XenError:
            return ""

    def _list(self, path: str) -> list[str]:
        connection = self._connection()
        try:
            return list(connection.store.directory(connection, path).children)
        except XenError:
            return []


def _row(kind: str, number: str, queue: str, side: str | None) -> str:
    """As xen-blkfront and xen-netfront of Linux 6.1 name their interrupts."""
    if kind == "vbd":
        return "blkif"
    if kind != "vif":
        return kind
    if side is None:
        return f"eth{number}"
    return f"vif{number}-control" if side == "ctrl" else f"vif{number}-q{queue.removeprefix('queue-') or 0}-{side}"


class Channels:
    """Which channels a rule is about."""

    def __init__(self, names: Names, spec: Spec) -> None:
        """FaultError for a kind that there isn't."""
        self._names = names
        self._domain = spec.get("domain")
        self._port, self._irq, self._device = spec.get("port"), spec.get("irq"), spec.get("device")
        self._vcpu = spec.get("vcpu")
        direction = spec.get("direction") or "in"
        self._in, self._out = direction != "out", direction != "in"
        kind = spec.get("kind")
        self._state = self._virq = None
        if isinstance(kind, str):
            self._state = STATES.get(kind)
            if self._state is None:
                self._state, self._virq = ECS_VIRQ, VIRQS.get(kind)
                if self._virq is None:
                    raise FaultError(f"{spec}: no kind {kind!r}; there are {', '.join((*STATES, *sorted(VIRQS)))}")

    def matches(self, domain: Domain, channel: Channel) -> bool:
        """Is an event that comes to this end of a channel meant?"""
        if self._in and self._is_end(domain, channel):
            return True
        if not self._out:
            return False
        if channel.state != ECS_INTERDOMAIN:
            return channel.state == ECS_IPI and self._is_end(domain, channel)  # which it sends itself
        remote = channel.remote_domain
        return remote is not None and self._is_end(remote, remote.evtchn.channels[channel.remote_port])

    def _is_end(self, domain: Domain, channel: Channel) -> bool:
        """Is it the end that the rule describes? What costs most is asked last."""
        if self._domain is not None and not self._names.is_domain(domain.domid, _domain(self._domain)):
            return False
        if self._port is not None and channel.port != self._port:
            return False
        if self._state is not None and channel.state != self._state:
            return False
        if self._virq is not None and channel.virq != self._virq:
            return False
        if self._vcpu is not None and channel.notify_vcpu != self._vcpu:
            return False
        if self._device is not None and self._names.device(domain, channel) != self._device:
            return False
        irq = self._irq
        return irq is None or any(fnmatchcase(row, str(irq)) for row in self._names.rows(domain, channel))

    def all(self) -> list[tuple[Domain, Channel]]:
        """All ends to which such an event can come now."""
        found = []
        for domain in self._names.domains(None):
            for channel in domain.evtchn:
                if channel.usable and channel.state != ECS_UNBOUND and self.matches(domain, channel):
                    found.append((domain, channel))
        return found


class Vcpus:
    """Which vCPUs a rule is about."""

    def __init__(self, names: Names, spec: Spec) -> None:
        self._names = names
        self._domain, self._vcpu = spec.get("domain"), spec.get("vcpu")

    def matches(self, vcpu: Vcpu) -> bool:
        if self._vcpu is not None and vcpu.vcpu_id != self._vcpu:
            return False
        return self._names.is_domain(vcpu.domain.domid, _domain(self._domain))

    def all(self) -> list[Vcpu]:
        """Those that are up now."""
        domains = self._names.domains(_domain(self._domain))
        return [vcpu for domain in domains for vcpu in domain.vcpus if vcpu.up and self.matches(vcpu)]


def _domain(value: object) -> int | str | None:
    return value if isinstance(value, (int, str)) else None
