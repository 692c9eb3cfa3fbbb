"""A slow disk's latency, seen from both ends: by the guest's clock, and in the trace.

The backend answers each request 20 ms late. What a reader in the guest waits is that and the way there and back, which
the trace has by its flows: from the guest's event to domain 0's handler, and from domain 0's to the guest's.
"""

from __future__ import annotations

import itertools
import re
import statistics

from guest import linux_guest

import pvirq
from pvirq.lab.faults import Faults
from pvirq.lab.trace import Trace

READ = "time dd if=/dev/xvda of=/dev/null bs=4k count={} iflag=direct"


def read_ms(guest: pvirq.Guest, reads: int) -> float:
    """What one of so many reads takes by the guest's own clock."""
    text = guest.run(READ.format(reads), timeout=60).text
    found = re.search(r"real\s+(\d+)m\s*([\d.]+)s", text)
    assert found, text
    return (int(found[1]) * 60 + float(found[2])) * 1000 / reads


def main() -> None:
    with linux_guest(vcpus=1) as (host, guest), Faults(host) as faults:
        fast = read_ms(guest, 1000)
        with Trace(host, kinds=("raise", "irq")) as trace:
            faults.slow(20_000_000, device="vbd-51712")
            slow = read_ms(guest, 20)
        print(f"a read takes {fast:.2f} ms, and with a slow backend {slow:.2f} ms, by the guest's clock")
        assert slow - fast > 19

        domid = guest.domain.domid
        there = latencies(trace, 0, "blkif-backend")
        back = latencies(trace, domid, "blkif")
        for name, values in (("guest -> domain 0", there), ("domain 0 -> guest", back)):
            print(f"{name}: {len(values)} events, median {statistics.median(values) / 1000:.1f} us to the handler")
        sent = [event["t"] for event in trace.where(k="irq", ph="B", d=0) if event["name"].startswith("blkif-backend")]
        gaps = [later - earlier for earlier, later in itertools.pairwise(sent)]
        print(f"between two requests: median {statistics.median(gaps) / 1e6:.2f} ms")
        assert statistics.median(gaps) > 19e6


def latencies(trace: Trace, domid: int, name: str) -> list[int]:
    """ns from raising each event of a domain to its handler, for those whose row begins so."""
    raised = {event["flow"]: event["t"] for event in trace.where(k="raise", d=domid) if event["out"] == "pending"}
    return [
        event["t"] - raised[flow]
        for event in trace.where(k="irq", ph="B", d=domid)
        if event.get("name", "").startswith(name)
        for flow in event.get("flow", ())
        if flow in raised
    ]


if __name__ == "__main__":
    main()
