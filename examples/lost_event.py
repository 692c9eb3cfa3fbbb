"""A blkif event is lost. What does the guest do?

The backend has answered, the answer lies on the ring, and the event that says so never comes. Linux' blkfront has no
timer of its own, so the request hangs, and with it whoever reads. Nor does the next request cure it: a backend sends an
event only when its answers pass `rsp_event`, and the guest moves that on when it has taken the answers before. One lost
event, and the queue is dead for good, though requests go out and answers come back.

Any event on that port, even one that nobody meant, brings it all back.
"""

from __future__ import annotations

from guest import irq_count, linux_guest

from pvirq.lab.faults import Faults
from pvirq.lab.trace import Trace

READ = "dd if=/dev/xvda of=/dev/null bs=4k count=1 skip=%d iflag=direct 2>/dev/null"


def main() -> None:
    # One vCPU, so one queue.
    with linux_guest(vcpus=1) as (host, guest), Trace(host, kinds=("raise", "irq")) as trace, Faults(host) as faults:
        guest.run(READ % 0)
        before = irq_count(guest.proc_interrupts(), "blkif")

        lost = faults.lose(domain=guest, device="vbd-51712", count=1)
        trace.mark("the next event of the disk is lost")
        guest.run(f"({READ % 1}; echo done > /tmp/first) &")
        hangs = guest.run("sleep 10; [ -e /tmp/first ]").status != 0
        print(f"events lost: {lost.fired}; after 10 s the read {'still hangs' if hangs else 'has come back'}")
        assert hangs
        assert lost.fired == 1
        assert irq_count(guest.proc_interrupts(), "blkif") == before

        trace.mark("somebody else reads")
        guest.run(f"({READ % 2}; echo done > /tmp/second) &")
        hangs = guest.run("sleep 10; [ -e /tmp/first ] || [ -e /tmp/second ]").status != 0
        print(f"another read: {'both hang' if hangs else 'it is cured'}")
        assert hangs
        assert irq_count(guest.proc_interrupts(), "blkif") == before

        trace.mark("an event that nobody sent")
        faults.spurious(domain=guest, device="vbd-51712", count=1)
        guest.run("until [ -e /tmp/first ] && [ -e /tmp/second ]; do sleep 0.1; done", timeout=5)
        after = irq_count(guest.proc_interrupts(), "blkif")
        print(f"an event that nobody sent: both are done, by {after - before} interrupt(s)")
        assert after == before + 1

        for event in trace.where(k="fault"):
            print(f"  {event['t'] / 1e9:.6f} s  {event['rule']}: {event['action']}")
        print(f"trace {trace.hash()[:16]}, the same each time")


if __name__ == "__main__":
    main()
