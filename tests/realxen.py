"""A real Xen 4.17 beside us: boots a small PV kernel as its domain 0, in QEMU's software emulation.

Needs qemu-system-x86_64 and a Xen binary (Debian: qemu-system-x86, xen-hypervisor-4.17-amd64), no privileges and no
virtualization hardware. `PVIRQ_XEN` names another binary than /boot/xen-4.17-amd64.gz.

The processor is QEMU's, without what its emulation and Xen do not agree on: SMAP, SMEP, LA57, XSAVE.
"""

from __future__ import annotations

import gzip
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

QEMU = "qemu-system-x86_64"
_MACHINE = ["-accel", "tcg", "-cpu", "max,-smap,-smep,-la57", "-smp", "1", "-m", "512"]
_MACHINE += ["-nographic", "-no-reboot", "-no-user-config"]
_ICOUNT = ("-icount", "shift=1,sleep=off", "-rtc", "base=2024-01-01,clock=vm")
# guest_loglvl: what Xen has to say of a guest's mistakes would come between the guest's own lines.
_XEN_ARGS = "com1=115200,8n1 console=com1 dom0_mem=64M xsave=0 guest_loglvl=none"


def default_binary() -> Path:
    return Path(os.environ.get("PVIRQ_XEN") or "/boot/xen-4.17-amd64.gz")


def missing(binary: Path | None = None) -> str | None:
    """What it takes and isn't here, in words; None where all is."""
    binary = binary or default_binary()
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed (Debian: qemu-system-x86)"
    if not binary.is_file():
        return f"there is no Xen at {binary} (Debian: xen-hypervisor-4.17-amd64; or set PVIRQ_XEN)"
    return None


class RealXen:
    """The hypervisor, unpacked; usable from several threads at once. Close it, or use it as a context manager."""

    def __init__(self, binary: Path | None = None) -> None:
        image = (binary or default_binary()).read_bytes()
        self._scratch = tempfile.TemporaryDirectory(prefix="pvirq-xen-")
        self._elf = Path(self._scratch.name) / "xen.elf"
        self._elf.write_bytes(gzip.decompress(image) if image[:2] == b"\x1f\x8b" else image)

    def boot(
        self, kernel: Path, cmdline: str = "", *, vcpus: int = 1, timeout: float = 60, icount: bool = False,
        options: Sequence[str] = (), xen_options: str = "",
    ) -> str:  # fmt: skip
        """Boot `kernel` as domain 0; all that came over the serial line, until Xen says how it ended.

        `options` are more of QEMU's, `xen_options` of Xen's. With `icount` time is counted in instructions, so that
        what hangs on time is the same at every run (and the boot takes 6 s). TimeoutError after `timeout` seconds,
        with the last of what came.
        """
        command = [QEMU, *_MACHINE, *options, *(_ICOUNT if icount else ()), "-kernel", str(self._elf)]
        command += ["-append", f"{_XEN_ARGS} dom0_max_vcpus={vcpus} {xen_options}".strip()]
        command += ["-initrd", f"{kernel} {cmdline}".strip()]
        deadline = time.monotonic() + timeout
        output = bytearray()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as qemu:
            assert qemu.stdout
            try:
                # "Hardware Dom0 halted", "crashed" or "shutdown" is the last line; after it Xen only waits.
                while not (b"(XEN) Hardware Dom0 " in output[-200:] and output.endswith(b"\n")):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{cmdline}: {output[-2000:].decode(errors='replace')}")
                    if select.select([qemu.stdout], [], [], 1)[0]:
                        chunk = os.read(qemu.stdout.fileno(), 65536)
                        if not chunk:
                            break
                        output += chunk
            finally:
                qemu.kill()
        return output.decode(errors="replace")

    def close(self) -> None:
        self._scratch.cleanup()

    def __enter__(self) -> RealXen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
