"""An event channel that is removed while a CPU handles its last event."""

from __future__ import annotations

from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, shared_info
from pvirq.check.protocols.upcall import cpu_events, cpu_loop, xen_evtchn_do_upcall
from pvirq.check.race import Race
from pvirq.check.steps import Lock, Model, Thread, Var

PORTS = 2
NONE = -1  # evtchn_to_irq of a port without an IRQ
NULL = 0


def model(fault: bool) -> Model:
    model = Model()
    info = shared_info(model, ports=PORTS, vcpus=2, word_bits=PORTS, pending=(1 << PORTS) - 1)
    events = [cpu_events(model, info, cpu, ports=3 if cpu == 0 else 0) for cpu in range(2)]
    irqs = Irqs(model)
    rwlock = None if fault else model.lock("evtchn_rwlock")

    def upcall() -> Thread:
        if rwlock is not None:
            yield rwlock.read_acquire()
        yield from xen_evtchn_do_upcall(info, 0, events[0], handle)
        if rwlock is not None:
            yield rwlock.read_release()

    def handle(port: int) -> Thread:
        yield from irqs.handle(info, port)

    model.thread("CPU 0", cpu_loop, info, 0, upcall, may_wait=True)
    for port in range(PORTS):
        model.thread(f"remover {port}", irqs.remove, info, port, rwlock)
    return model


class Irqs:
    """evtchn_to_irq (an IRQ has the number of its port), each IRQ's pointer to its irq_info, and whether that lives."""

    def __init__(self, model: Model) -> None:
        self.of_port: list[Var] = [model.var(f"evtchn_to_irq[{port}]", port) for port in range(PORTS)]
        self.info = model.array("info_for_irq", PORTS, 1)
        self.alive = model.array("irq_info", PORTS, 1)

    def handle(self, info: SharedInfo, port: int) -> Thread:
        """handle_irq_for_port, and the acknowledgement of the chip, which looks for its port."""
        irq = yield self.of_port[port].read().saying(f"looks up the IRQ of port {port}")
        if irq == NONE:
            return
        found = yield self.info[irq].read().saying(f"looks up the irq_info of IRQ {irq}")
        assert found != NULL, "evtchn_from_irq() dereferences NULL"
        alive = yield self.alive[irq].read().saying(f"reads the irq_info of IRQ {irq}")
        assert alive, "an irq_info is used that was freed"
        yield from clear_evtchn(info, port)

    def remove(self, info: SharedInfo, port: int, rwlock: Lock | None) -> Thread:
        """__unbind_from_irq: the port is closed, and then the books about it."""
        yield from clear_evtchn(info, port)  # EVTCHNOP_close
        yield self.of_port[port].write(NONE).saying(f"port {port} has no IRQ any more")
        if rwlock is not None:
            yield rwlock.acquire()
        yield self.info[port].write(NULL).saying(f"IRQ {port} has no irq_info any more")
        if rwlock is not None:
            yield rwlock.release()
        yield self.alive[port].write(0).saying(f"frees the irq_info of IRQ {port}")


RACE = Race(
    name="remove-while-handling",
    title="the event loop uses what an unbind on another CPU has taken away",
    where="Linux 5.9, drivers/xen/events/events_base.c: __xen_evtchn_do_upcall(), xen_free_irq()",
    brought="",
    cured="073d0552ead5 (5.10, XSA-331)",
    story=(
        "The event loop goes from a pending port to its IRQ, and from there to its irq_info. An unbind on another CPU "
        "removes the second between the two, or frees it while it is in use: a NULL pointer, or a freed one. The cure "
        "takes a rwlock as a reader around the loop, and as a writer where the irq_info goes."
    ),
    model=model,
)
