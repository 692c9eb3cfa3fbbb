"""Records tests/data/guests: runs every kernel of guestlib.KERNELS on a real Xen in QEMU. Not a test.

Needs what realxen.py says. Each kernel is booted as dom0, as often as --runs says; all its transcripts must be the
same.

    python tests/record_guests.py [--xen /boot/xen-4.17-amd64.gz] [--runs 3] [--check] [NAME...]

--check compares with the recorded files instead of writing them.

What QEMU itself gets wrong is not asked for (SIMD exceptions, int1) or made up for (`intbug=1`, see
guests/softint.c).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import guestlib
import realxen

_RECORDING_ARGS = {"softint": "intbug=1", "user": "intbug=1"}


def run(xen: realxen.RealXen, kernel: guestlib.Kernel) -> list[str]:
    """One boot of `kernel` as dom0, until Xen says how it ended; the transcript. Raises TimeoutError."""
    cmdline = f"{kernel.cmdline} {_RECORDING_ARGS.get(kernel.name, '')}".strip()
    return guestlib.transcript(xen.boot(guestlib.build(kernel.name), cmdline, vcpus=kernel.vcpus))


def main() -> int:
    parser = argparse.ArgumentParser(description="Record the test kernels' transcripts from a real Xen.")
    parser.add_argument("--xen", type=Path, default=realxen.default_binary())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    failed = 0
    if why := realxen.missing(options.xen):
        parser.error(why)
    with realxen.RealXen(options.xen) as xen:
        for kernel in guestlib.KERNELS:
            if options.names and kernel.name not in options.names and kernel.id not in options.names:
                continue
            first = run(xen, kernel)
            same = all(run(xen, kernel) == first for _ in range(options.runs - 1))
            if options.check:
                same = same and first == guestlib.expected(kernel, dom0=True)
            elif same and first:
                kernel.golden.parent.mkdir(parents=True, exist_ok=True)
                kernel.golden.write_text("\n".join(first) + "\n")
            failed += not (same and first)
            print(
                f"{kernel.id}: {len(first)} lines, {'the same' if same and first else 'DIFFERENT'}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
