"""Records tests/data/guests: runs every kernel of guestlib.KERNELS on a real Xen in QEMU. Not a test.

Needs qemu-system-x86_64 and a Xen 4.17 binary (Debian: qemu-system-x86, xen-hypervisor-4.17-amd64), no
privileges and no virtualization hardware. Each kernel is booted as dom0, as often as --runs says; all its
transcripts must be the same.

    python tests/record_guests.py [--xen /boot/xen-4.17-amd64.gz] [--runs 3] [--check] [NAME...]

--check compares with the recorded files instead of writing them.

The processor is QEMU's, without what its emulation and Xen do not agree on: SMAP, SMEP, LA57, XSAVE. What
QEMU itself gets wrong is not asked for (SIMD exceptions, int1) or made up for (`intbug=1`, see guests/softint.c).
"""

from __future__ import annotations

import argparse
import gzip
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import guestlib

_RECORDING_ARGS = {"softint": "intbug=1", "user": "intbug=1"}
_QEMU = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,-smap,-smep,-la57", "-smp", "1", "-m", "512"]
_QEMU += ["-nographic", "-no-reboot", "-no-user-config"]
_XEN_ARGS = "com1=115200,8n1 console=com1 dom0_mem=64M xsave=0"


def run(xen: Path, kernel: guestlib.Kernel, timeout: float = 60) -> list[str]:
    """One boot of `kernel` as dom0, until Xen says how it ended; the transcript. Raises TimeoutError."""
    cmdline = f"{kernel.cmdline} {_RECORDING_ARGS.get(kernel.name, '')}".strip()
    initrd = f"{guestlib.build(kernel.name)} {cmdline}".strip()
    command = [*_QEMU, "-kernel", str(xen), "-append", f"{_XEN_ARGS} dom0_max_vcpus={kernel.vcpus}", "-initrd", initrd]
    deadline = time.monotonic() + timeout
    output = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        assert qemu.stdout
        try:
            # "Hardware Dom0 halted", "crashed" or "shutdown" is the last line; after it Xen only waits.
            while not (b"(XEN) Hardware Dom0 " in output and output.endswith(b"\n")):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{kernel.id}: {output[-2000:].decode(errors='replace')}")
                if select.select([qemu.stdout], [], [], 1)[0]:
                    chunk = os.read(qemu.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    output += chunk
        finally:
            qemu.kill()
    return guestlib.transcript(output.decode(errors="replace"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Record the test kernels' transcripts from a real Xen.")
    parser.add_argument("--xen", type=Path, default=Path("/boot/xen-4.17-amd64.gz"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        xen = Path(scratch) / "xen.elf"
        image = options.xen.read_bytes()
        xen.write_bytes(gzip.decompress(image) if image[:2] == b"\x1f\x8b" else image)
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
