"""A guest is suspended, saved, and goes on in another domain.

None of its event channels exists there. The kernel binds its own IRQs anew (xen_irq_resume): VIRQs and IPIs on each
vCPU, and the ports of xenstore and the console that start_info names; they keep their numbers. Devices have to connect
again, and their IRQs are new ones. What was in its memory is there, and what it had written.
"""

from __future__ import annotations

import io

from guest import linux_guest

from pvirq.lab.trace import Trace

WRITE = "dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null; dd if=/tmp/data of=/dev/xvda bs=64k conv=fsync"
CHECK = "dd if=/dev/xvda bs=64k count=8 iflag=direct 2>/dev/null | cmp - /tmp/data"


def rows(table: str) -> list[tuple[str, str]]:
    """Number and name of each interrupt."""
    return [(line.split(":")[0].strip(), line.split()[-1]) for line in table.splitlines() if line.strip()[:1].isdigit()]


def main() -> None:
    with linux_guest() as (host, guest):
        assert guest.run(f"{WRITE} 2>/dev/null").status == 0
        before, domid = rows(guest.proc_interrupts()), guest.domain.domid
        file = io.BytesIO()
        with Trace(host, kinds=("bind", "domain", "raise", "irq")) as trace:
            host.save(guest, file)
            print(f"domain {domid} is saved: {len(file.getvalue()) >> 20} MiB")
            file.seek(0)
            guest = host.restore(file)
            assert guest.run(CHECK, timeout=60).status == 0
        bound = [event for event in trace.where(k="bind", d=guest.domain.domid) if event["type"] != "unbound"]
        print(f"domain {guest.domain.domid} goes on: it has bound {len(bound)} ports, and reads what it wrote")
        after = rows(guest.proc_interrupts())
        own = [row for row in before if not row[1].startswith(("blkif", "vif"))]
        assert [row for row in after if row in before] == own
        assert sorted(name for _, name in after) == sorted(name for _, name in before)
        print(f"the {len(own)} interrupts of its own have the numbers that they had, those of devices have new ones")


if __name__ == "__main__":
    main()
