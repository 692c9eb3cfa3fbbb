"""A vCPU goes off and on while it has work: disk requests, timers, IPIs.

When a CPU goes, Linux moves its interrupts to those that stay (fixup_irqs), and an event that is pending on it just
then mustn't get lost. Here it goes and comes ten times while both vCPUs read from the disk, under several schedules:
futures of one booted guest.
"""

from __future__ import annotations

from guest import irq_count, linux_guest

import pvirq

SCHEDULES = range(1, 7)
WORK = """
for reader in 1 2; do
	(dd if=/dev/xvda of=/dev/null bs=4k count=400 iflag=direct 2>/dev/null && echo done > /tmp/reader$reader) &
done
for round in 1 2 3 4 5 6 7 8 9 10; do
	echo 0 > /sys/devices/system/cpu/cpu1/online || exit 1
	echo 1 > /sys/devices/system/cpu/cpu1/online || exit 1
done
wait
[ -e /tmp/reader1 ] && [ -e /tmp/reader2 ]
"""


def stress(host: pvirq.Host) -> tuple[int, int, int]:
    """The status of the work, how many disk interrupts there were, and how long it took in ns of the guest's."""
    (guest,) = host.guests
    before, began = irq_count(guest.proc_interrupts(), "blkif"), host.clock.now()
    status = guest.run(WORK, timeout=120).status
    took = host.clock.now() - began
    return status, irq_count(guest.proc_interrupts(), "blkif") - before, took


def main() -> None:
    with linux_guest() as (host, _guest):
        futures = {seed: host.fork(stress, seed=seed) for seed in SCHEDULES}
        for seed, future in futures.items():
            status, interrupts, ns = future.result(300)
            print(f"schedule {seed}: status {status}, {interrupts} disk interrupts in {ns / 1e6:.0f} ms")
            assert status == 0
        print(f"{len(futures)} schedules, no event lost")


if __name__ == "__main__":
    main()
