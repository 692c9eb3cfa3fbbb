"""The same guests' work on pvirq and on real Xen in QEMU, on the same machine one after the other, with ratios.

    python -m benchmarks.xen.run [--runs N] [--output FILE]

The measurements are those of benchmarks/devices.py. On real Xen a guest's clock is the wall's, and booting is timed by
domain 0's. Exit status: 0 measured, 1 something failed, 3 QEMU or Xen is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import devices
from benchmarks.bench import TARGETS
from benchmarks.xen.machine import MIB, Config, RealHost, RealXenError, missing


class XenBench:
    """The guests of a real host, u0 and u1."""

    def __init__(self, host: RealHost) -> None:
        self.host = host

    def sh(self, guest: int, command: str) -> str:
        return self.host.guest(command, f"u{guest}", 600)

    def timed(self, guest: int, command: str) -> float:
        output = self.sh(guest, command)
        match = re.search(r"end (\d+)", output)
        if match is None:
            raise RealXenError(f"{command!r} printed no time: {output}")
        return int(match[1]) / 1e9

    def echo(self) -> str:
        port = self.host.run(
            "work echo $(xl domid u0) > /run/echo 2>&1 & until [ -s /run/echo ]; do sleep 0.1; done; cat /run/echo"
        )
        return f"0 {int(port)}"


def create(host: RealHost, number: int) -> dict[str, float]:
    """Create a guest, and time it from xl's start to its userspace and until its devices are usable."""
    config = Config(f"u{number}", devices.VCPUS, devices.MEMORY // MIB, disks=(f"phy:/dev/loop{number},xvda,w",))
    text = host.run(
        f"cat > /run/{config.name}.cfg <<'END'\n{config.text()}END\n"
        "cut -d' ' -f1 /proc/uptime\n"
        f"xl create /run/{config.name}.cfg > /run/xl.log 2>&1 || {{ cat /run/xl.log; exit 1; }}\n"
        f"/lab/guest {config.name} true && cut -d' ' -f1 /proc/uptime\n"
        f"/lab/guest {config.name} '{devices.USABLE}' && cut -d' ' -f1 /proc/uptime",
        300,
    )
    began, agent, usable = (float(word) for word in text.split())
    return {"boot_userspace.s": agent - began, "boot_usable.s": usable - began}


def run(runs: int, report: Callable[[str], None]) -> dict[str, list[float]]:
    """All measurements on real Xen, so many times, a host for each. RealXenError."""
    found: dict[str, list[float]] = {}
    kernel, initrd = devices.guest_parts()
    for _ in range(runs):
        began = time.monotonic()
        program = {"bin/work": devices.compile_work()}
        with RealHost(report, guest_kernel=kernel.path, guest_initrd=initrd, files=program) as host:
            host.start_tools(disks=2, megabytes=devices.DISK // MIB)
            values = create(host, 0)
            values["boot_with_host.s"] = time.monotonic() - began
            host.report("the first guest is usable")
            create(host, 1)
            host.report("and the second")
            bench = XenBench(host)
            values |= devices.work(bench)
            host.report("worked")
        for name, value in values.items():
            found.setdefault(devices.PREFIX + name, []).append(value)
    return found


def table(here: dict[str, list[float]], real: dict[str, list[float]]) -> list[str]:
    """Medians side by side, and how many times as fast pvirq is."""
    lines = [f"{'':32}{'pvirq':>12}{'real Xen':>12} {'':5}  pvirq is so many times as fast"]
    for name, target in TARGETS.items():
        if name not in here and name not in real:
            continue
        medians = [statistics.median(values[name]) if name in values else None for values in (here, real)]
        cells = "".join(f"{'-' if value is None else f'{value:.{target.digits}f}':>12}" for value in medians)
        ratio = ""
        if medians[0] and medians[1]:
            faster = medians[0] / medians[1] if name.endswith("per_s") else medians[1] / medians[0]
            ratio = f"{faster:.2f}"
        lines.append(f"{name:32}{cells} {target.unit:5}  {ratio}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xen.run", description="pvirq beside real Xen.")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("bench-xen.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed
    if why := missing():
        print(f"bench-xen: {why}", file=sys.stderr)
        return 3
    runs = max(options.runs, 1)
    try:
        here = devices.run(runs, lambda message: print(message, flush=True))
        real = run(runs, lambda message: print(f"real Xen: {message}", flush=True))
    except (RealXenError, RuntimeError) as error:
        print(f"bench-xen: {error}", file=sys.stderr)
        return 1
    print(*table(here, real), sep="\n")
    machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}
    options.output.write_text(json.dumps({"machine": machine, "pvirq": here, "xen": real}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
