"""How long a saved host takes to be back: a real guest of 256 MiB, by what is in its memory.

    python -m benchmarks.restore

A Linux guest with one vCPU is saved after its boot, with 150 MiB of random data in it, and with its memory full of
them. Each file is restored in processes of their own, `mapped` and not: seconds of wall time until `restore_host`
returns, and until the guest has then answered a command; medians of five runs, by turns, and their CPU seconds. The
files have just been written, and so lie in the system's page cache.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import pvirq
from pvirq import Guest, Host
from pvirq.fork import fork
from pvirq.toolstack import kernels
from pvirq.toolstack.initrd import default_initrd

RUNS = 5
MIB = 1 << 20
MEMORY = 256 * MIB
# The kernel keeps what it needs to go on: 4 MiB, with what it has in its caches.
FILL = "dd if=/dev/urandom of=/m/{} bs=1M count={} 2>/dev/null"
FREE = "awk '/MemFree/ { print int($2 / 1024) - 4 }' /proc/meminfo"


def save(directory: Path) -> dict[str, Path]:
    """A file for each case."""
    initrd = default_initrd(kernels.find_busybox(print))
    files = {}
    with Host() as host:
        guest = host.boot(
            kernels.fetch_kernel("cloud", print).path, initrd=initrd, append="console=hvc0 quiet pvirq=agent",
            memory=MEMORY,
        )  # fmt: skip
        _done(guest, "mkdir /m; mount -t tmpfs -o size=100% none /m")
        for name in ("after its boot", "150 MiB of data", "all of its memory"):
            if name != "after its boot":
                _done(guest, FILL.format(name[0], 150 if name[0] == "1" else f"$({FREE})"))
            files[name] = directory / name[0]
            began = time.perf_counter(), time.process_time()
            pvirq.save_host(host, files[name], checkpoint=True)
            wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            print(f"saved {name:20} {wall:6.2f} s{cpu:8.2f} CPU s{os.path.getsize(files[name]) / MIB:8.0f} MiB")
    return files


def _done(guest: Guest, command: str) -> None:
    result = guest.run(command, 600)
    assert result.status == 0, result.text


def restore(file: Path, mapped: bool) -> list[float]:
    """Seconds until the host is there and until its guest has answered; of the wall and of the CPU."""
    clocks = time.perf_counter, time.process_time
    began = [clock() for clock in clocks]
    with pvirq.restore_host(file, mapped=mapped) as host:
        there = [clock() for clock in clocks]
        _done(host.guests[0], "true")
        answered = [clock() for clock in clocks]
    return [there[0] - began[0], answered[0] - began[0], there[1] - began[1], answered[1] - began[1]]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = save(Path(directory))
        restore(files["after its boot"], True)  # so that all modules are there
        results: dict[tuple[str, bool], list[list[float]]] = {}
        for _ in range(RUNS):
            for name, file in files.items():
                for mapped in (True, False):
                    results.setdefault((name, mapped), []).append(fork(partial(restore, file, mapped)).result())
    print(f"\n{'':28}{'restored':>10}{'answered':>10}{'CPU':>10}{'CPU':>10}")
    for (name, mapped), runs in results.items():
        row = "".join(f"{statistics.median(column):9.3f}s" for column in zip(*runs, strict=True))
        print(f"{name:20}{'mapped' if mapped else 'copied':8}{row}")


if __name__ == "__main__":
    main()
