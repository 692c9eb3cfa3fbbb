"""/dev/xen/evtchn: event channels for the daemons of a modelled domain (drivers/xen/evtchn.c, Linux 6.1).

An interrupt puts its port in the process's ring and leaves the port masked; the process reads it, reacts, and
writes it back, which is the port's late EOI. So a port interrupts once per reaction, however often it is
notified.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF
from pvirq.linux.irq import IRQ_HANDLED, IrqError, IrqReturn
from pvirq.xen import evtchn

if TYPE_CHECKING:
    from pvirq.linux.events_base import EventsBase

UserHandler = Callable[[int], object]
"""A daemon's reaction to a port; unless it returns False, the port is unmasked afterwards."""


@dataclass(eq=False, slots=True)
class _UserPort:
    port: int
    irq: int
    handler: UserHandler | None
    enabled: bool = True


class EvtchnUser:
    """One open /dev/xen/evtchn. A port that isn't this user's: XenError(ENOTCONN).

    A handler runs in process context, after the interrupt, on `cpu` or, where that is None, on the CPU that
    took the interrupt. A daemon that limits rates returns False from its handler and calls `unmask` when it
    wants more.
    """

    def __init__(self, events: EventsBase, name: str) -> None:
        self.name = name
        self.cpu: int | None = None
        self._events = events
        self._kernel = events.kernel
        self._domain = events.kernel.domain
        self._ports: dict[int, _UserPort] = {}
        self._ring: deque[int] = deque()

    @property
    def ports(self) -> list[int]:
        return sorted(self._ports)

    def bind_interdomain(self, remote_domid: int, remote_port: int, handler: UserHandler | None = None) -> int:
        """IOCTL_EVTCHN_BIND_INTERDOMAIN; XenError as EVTCHNOP_bind_interdomain."""
        return self._bind(evtchn.bind_interdomain(self._domain, remote_domid, remote_port), handler)

    def bind_unbound(self, remote_domid: int, handler: UserHandler | None = None) -> int:
        """IOCTL_EVTCHN_BIND_UNBOUND_PORT; XenError as EVTCHNOP_alloc_unbound."""
        return self._bind(evtchn.alloc_unbound(self._domain, DOMID_SELF, remote_domid), handler)

    def bind_virq(self, virq: int, handler: UserHandler | None = None) -> int:
        """IOCTL_EVTCHN_BIND_VIRQ, which is always vCPU 0's; XenError as EVTCHNOP_bind_virq."""
        return self._bind(evtchn.bind_virq(self._domain, virq, 0), handler)

    def _bind(self, port: int, handler: UserHandler | None) -> int:
        # Known before the line opens: the first interrupt may be pending already.
        user_port = self._ports[port] = _UserPort(port, -1, handler)
        try:
            user_port.irq = self._events.bind_evtchn_to_irqhandler_lateeoi(
                port, self._interrupt, 0, f"evtchn:{self.name}", dev_id=user_port
            )
        except (XenError, IrqError):
            del self._ports[port]
            with contextlib.suppress(XenError):  # mostly closed already
                evtchn.close(self._domain, port)
            raise
        return port

    def irq_of(self, port: int) -> int:
        """The port's IRQ number."""
        return self._port(port).irq

    def _port(self, port: int) -> _UserPort:
        try:
            return self._ports[port]
        except KeyError:
            raise XenError(Errno.ENOTCONN, f"port {port} is not of evtchn:{self.name}") from None

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        assert isinstance(dev_id, _UserPort)
        if not dev_id.enabled:
            self._kernel.printk(f"Interrupt for port {dev_id.port}, but apparently not enabled; per-user {self.name}")
        dev_id.enabled = False
        self._ring.append(dev_id.port)
        if len(self._ring) == 1:
            self._kernel.queue_work(self._read, self.cpu)
        return IRQ_HANDLED

    def _read(self) -> None:
        """The daemon wakes up: read(), react, write(), until the ring is empty."""
        ring, ports = self._ring, self._ports
        while ring:
            port = ring.popleft()
            user_port = ports.get(port)
            if user_port is None or user_port.enabled:
                continue  # unbound since, or bound anew
            if user_port.handler is None or user_port.handler(port) is not False:
                self._write(user_port)

    def _write(self, user_port: _UserPort) -> None:
        if not user_port.enabled and self._ports.get(user_port.port) is user_port:
            user_port.enabled = True
            self._events.xen_irq_lateeoi(user_port.irq)

    def notify(self, port: int) -> None:
        """IOCTL_EVTCHN_NOTIFY. A send that Xen refuses is lost, as the driver loses it."""
        self._port(port)
        self._events.notify_remote_via_evtchn(port)

    def unmask(self, port: int) -> None:
        """xenevtchn_unmask: ready for the port's next interrupt. Nothing happens where it is unmasked."""
        self._write(self._port(port))

    def unbind(self, port: int) -> None:
        """IOCTL_EVTCHN_UNBIND: the port is closed, its IRQ gone."""
        user_port = self._port(port)
        self._events.unbind_from_irqhandler(user_port.irq, user_port)
        del self._ports[port]

    def close(self) -> None:
        """The process ends: all its ports are closed."""
        for port in self.ports:
            self.unbind(port)
        self._ring.clear()
