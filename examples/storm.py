"""An event storm, both ways, and what lateeoi makes of it.

Since XSA-332 Linux delays the EOI of a channel whose events were spurious, so that who is at the other end can't keep
it busy: each spurious event in a row doubles the delay. A backend shows it per device in sysfs (xenbus/spurious_events,
jiffies_eoi_delayed), here in domain 0. The guest's front ends delay in the same way; they keep no counters, but their
interrupts are fewer than the events were.
"""

from __future__ import annotations

from guest import irq_count, linux_guest

from pvirq.lab.faults import Faults
from pvirq.lab.trace import Trace
from pvirq.xen.timer import NS_PER_S

EVENTS = 5000
ATTRIBUTES = ("events", "spurious_events", "jiffies_eoi_delayed")


def main() -> None:
    with linux_guest() as (host, guest), Faults(host) as faults, Trace(host, kinds=("raise", "irq")) as trace:
        domid = guest.domain.domid

        def counter(attribute: str) -> int:
            """A file under xenbus/ in the backend's directory in domain 0's sysfs, over all of the disk's queues."""
            lines = host.dom0.irq.descs.values()
            queues = [line.chip_data for line in lines if [a.name for a in line.actions] == ["blkif-backend"]]
            return sum(int(queue.dev.show(attribute)) for queue in queues)

        print(
            f"{EVENTS} events that nobody sent, 10 us apart, from each of the guest's two queues to its disk's backend:"
        )
        before = irq_count(host.dom0.proc_interrupts(), "blkif-backend")
        faults.storm(EVENTS, interval=10_000, domain=guest, device="vbd-51712", direction="out")
        host.run(lambda: False, 2 * NS_PER_S)
        after = irq_count(host.dom0.proc_interrupts(), "blkif-backend")
        for attribute in ATTRIBUTES:
            print(f"  xenbus/{attribute:20} {counter(attribute)}")
        print(f"  interrupts in domain 0: {after - before}")
        assert 0 < after - before < EVENTS / 10
        assert counter("spurious_events")
        assert counter("jiffies_eoi_delayed")

        print(f"{EVENTS} from the backend to each queue of the guest's disk:")
        before = irq_count(guest.proc_interrupts(), "blkif")
        faults.clear()
        faults.storm(EVENTS, interval=10_000, domain=guest, device="vbd-51712")
        host.run(lambda: False, 2 * NS_PER_S)
        after = irq_count(guest.proc_interrupts(), "blkif")
        print(f"  interrupts in the guest: {after - before}")
        assert 0 < after - before < EVENTS / 10

        raised = [event for event in trace.where(k="raise") if event.get("d") == domid]
        kinds = {out: sum(event["out"] == out for event in raised) for out in ("pending", "coalesced", "masked")}
        print(f"  of all events raised in the guest: {kinds}")

        guest.run("dd if=/dev/xvda of=/dev/null bs=64k count=16 iflag=direct", timeout=30)
        print("the disk works")


if __name__ == "__main__":
    main()
