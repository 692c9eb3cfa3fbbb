"""What repeatability costs: the same work on hosts with and without a seed.

    python -m benchmarks.repeatable

A Linux guest with two vCPUs and a disk boots, reads 4 KiB a thousand times, forks a process a hundred times and counts
in its shell, on a host without a seed ("none"), with a seed whose choices are first come, first served ("fifo"), and
with seed 1. CPU seconds of this process, which other jobs on the machine disturb less than wall time; medians of five
runs, and the ratio to "none".
"""

from __future__ import annotations

import statistics
import time
from functools import partial

from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.fork import fork
from pvirq.schedule import Schedule
from pvirq.toolstack import kernels, modules
from pvirq.toolstack.initrd import default_initrd

RUNS = 5
READ = "dd if=/dev/xvda of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null"
FORK = "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i + 1)); done"
COUNT = "i=0; while [ $i -lt 50000 ]; do i=$((i + 1)); done"
WORK = {"read": READ, "fork": FORK, "count": COUNT, "both vCPUs": f"({COUNT}) & ({COUNT}); wait"}


def run(kernel: str, initrd: bytes, seed: int | Schedule | None) -> dict[str, float]:
    """CPU seconds of each part."""
    times = {}
    began = time.process_time()
    with Host(seed=seed) as host:
        guest = host.boot(kernel, initrd=initrd, append="console=hvc0 quiet pvirq=agent", vcpus=2)
        host.attach_disk(guest, "xvda", MemoryStore(8 << 11))
        guest.run("until [ -b /dev/xvda ]; do sleep 0.1; done")
        times["boot"] = time.process_time() - began
        for name, command in WORK.items():
            began = time.process_time()
            assert guest.run(command, 600).status == 0
            times[name] = time.process_time() - began
    return times


def main() -> None:
    choice = kernels.fetch_kernel("cloud", print)
    assert choice.modules_dir is not None
    initrd = default_initrd(
        kernels.find_busybox(print), modules=modules.read_modules(choice.modules_dir, ["xen-blkfront"])
    )
    seeds = {"none": None, "fifo": Schedule.fifo(), "seed 1": 1}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in seeds}
    for _ in range(RUNS):
        for name, seed in seeds.items():  # by turns, so that what else the machine does meets all alike
            results[name].append(fork(partial(run, str(choice.path), initrd, seed)).result())
    print(f"{'':12}" + "".join(f"{name:>10}" for name in seeds) + f"{'fifo/none':>12}{'seed/none':>12}")
    for part in ("boot", *WORK):
        medians = [statistics.median(times[part] for times in results[name]) for name in seeds]
        row = "".join(f"{median:9.2f}s" for median in medians)
        print(f"{part:12}{row}{medians[1] / medians[0]:12.2f}{medians[2] / medians[0]:12.2f}")


if __name__ == "__main__":
    main()
