"""A domain has a global VIRQ bound, and another one gets it."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.abi.xen import VIRQ_CONSOLE
from pvirq.check.protocols.channels import evtchn_close
from pvirq.check.protocols.ports import Code, Domain, Xen
from pvirq.check.protocols.virqs import GlobalVirqs, evtchn_bind_virq, send_global_virq, set_global_virq_handler
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(checks_bound=not fault))
    d0, d1 = (xen.domain(domid, ports=2, virqs=VIRQ_CONSOLE + 1) for domid in (0, 1))
    handlers = GlobalVirqs(xen, VIRQ_CONSOLE + 1)

    def binder(d: Domain, closes: bool) -> Thread:
        port = yield from evtchn_bind_virq(d, VIRQ_CONSOLE, 0, None if fault else handlers)
        assert port in (1, -Errno.EBUSY, -Errno.EEXIST)
        if closes and port == 1:
            rc = yield from evtchn_close(d, 1)
            assert rc == 0

    def toolstack() -> Thread:
        rc = yield from set_global_virq_handler(d1, handlers, VIRQ_CONSOLE)
        assert rc in (0, -Errno.EBUSY)

    def console() -> Thread:
        yield from send_global_virq(handlers, VIRQ_CONSOLE)

    m.thread("d0 vCPU 0, EVTCHNOP_bind_virq and close", binder, d0, True)
    m.thread("d0 vCPU 1, EVTCHNOP_bind_virq", binder, d0, False)
    m.thread("d1, EVTCHNOP_bind_virq", binder, d1, False)
    m.thread("XEN_DOMCTL_set_virq_handler", toolstack)
    m.thread("VIRQ_CONSOLE", console)

    def judge(end: End) -> str | None:
        handler = max(end[handlers.domids[VIRQ_CONSOLE]], 0)
        for d in (d0, d1):
            if end[d.vcpus[0].virq_to_evtchn[VIRQ_CONSOLE]] and d.domid != handler:
                return f"d{d.domid} has VIRQ_CONSOLE bound, and d{handler} gets it"
        return None

    m.at_end(judge)
    return m


RACE = Race(
    name="virq-handler-bound",
    title="a domain has a global VIRQ bound, and another domain gets it",
    where="Xen 4.2-4.20, xen/common/event_channel.c: set_global_virq_handler(), evtchn_bind_virq()",
    brought="87521589aa (4.2)",
    cured="980822c5ed (4.21), with eba922abdb before it",
    story=(
        "Any domain could bind a global VIRQ, and XEN_DOMCTL_set_virq_handler could give one to another domain at any "
        "time: who had bound it heard no more of it, and wasn't told. Since then only the domain that handles a VIRQ "
        "can bind it, and it can be given to another only while that one hasn't. Either looks at what the other "
        "changes, so both do so under the event lock of the domain that handles it."
    ),
    model=model,
)
