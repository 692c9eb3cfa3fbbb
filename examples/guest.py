"""What the examples share: a repeatable host with a Linux guest that has a disk and a network interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pvirq
from pvirq.drivers.blockstore import MemoryStore
from pvirq.toolstack import initrd, kernels, modules

SECTORS = 16 << 11  # 16 MiB


@contextmanager
def linux_guest(seed: int = 1, vcpus: int = 2) -> Iterator[tuple[pvirq.Host, pvirq.Guest]]:
    """Boot the distribution's cloud kernel, from the cache or fetched, and let it find its devices."""
    report = partial(print, flush=True)
    kernel = kernels.fetch_kernel("cloud", report)
    archive = initrd.default_initrd(kernels.find_busybox(report), modules=drivers(kernel.modules_dir))
    with pvirq.Host(seed=seed) as host:
        host.add_bridge("xenbr0")
        guest = host.boot(kernel.path, initrd=archive, append="console=hvc0 quiet pvirq=agent", vcpus=vcpus)
        host.attach_disk(guest, "xvda", host.backends.devices.add_free("ram", MemoryStore(SECTORS)))
        host.attach_nic(guest)
        guest.run("until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
        yield host, guest


def drivers(modules_dir: Path | None) -> list[tuple[str, bytes]]:
    """The front ends that a kernel has as modules."""
    return modules.read_modules(modules_dir, ["xen-blkfront", "xen-netfront"]) if modules_dir else []


def irq_count(table: str, name: str) -> int:
    """How often the interrupts of that name came, on all CPUs: of /proc/interrupts."""
    total = 0
    for line in table.splitlines():
        number, _, rest = line.partition(":")
        if number.strip().isdigit() and rest.split()[-1:] == [name]:
            total += sum(int(word) for word in rest.split() if word.isdigit())
    return total
