"""The real Xen in QEMU, with its Linux domain 0 under control of this process.

with RealHost(report) as host:
    host.start_tools()
    host.create(Config(vcpus=2), initrd)
    print(host.guest("cat /proc/interrupts"))

Needs qemu-system-x86_64 and a Xen binary (Debian: qemu-system-x86, xen-hypervisor-4.17-amd64), no privileges and no
virtualization hardware; `PVIRQ_XEN` names another binary than /boot/xen-4.17-amd64.gz.
"""

from __future__ import annotations

import base64
import ctypes
import gzip
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.xen import dom0
from pvirq.toolstack import kernels

QEMU = "qemu-system-x86_64"
# The processor is QEMU's, without what its emulation and Xen do not agree on: SMAP, SMEP, LA57, XSAVE.
MACHINE = ("-accel", "tcg", "-cpu", "max,-smap,-smep,-la57", "-nographic", "-no-reboot", "-no-user-config")
# guest_loglvl: what Xen has to say of a guest's mistakes would come between domain 0's own lines.
XEN_ARGS = "com1=115200,8n1 console=com1 dom0_mem=1024M,max:1024M dom0_max_vcpus=2 noreboot xsave=0 guest_loglvl=none"
DOM0_ARGS = "console=hvc0 earlyprintk=xen quiet"
PIECE = 90  # characters of a command at a time (agent.sh)
MIB = 1 << 20
PR_SET_PDEATHSIG = 1  # prctl(2)


class RealXenError(Exception):
    """What was asked of the real host failed, or took too long. One line, then what it printed last."""


def default_binary() -> Path:
    return Path(os.environ.get("PVIRQ_XEN") or "/boot/xen-4.17-amd64.gz")


def missing() -> str | None:
    """What it takes and isn't here, in words; None where all is."""
    if not shutil.which(QEMU):
        return f"{QEMU} is not installed (Debian: qemu-system-x86)"
    if not default_binary().is_file():
        return f"there is no Xen at {default_binary()} (Debian: xen-hypervisor-4.17-amd64; or set PVIRQ_XEN)"
    return None


def _end_with_parent() -> None:
    """However this process ends, QEMU is killed with it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Config:
    """A guest to create. `memory` in MiB, `append` more of its kernel's command line; one vif on xenbr0."""

    name: str = "u"
    vcpus: int = 2
    memory: int = 128
    append: str = ""
    disks: tuple[str, ...] = ("phy:/dev/loop0,xvda,w",)

    def text(self) -> str:
        """As a file for xl create (xl.cfg(5))."""
        return (
            f'name = "{self.name}"\nkernel = "/lab/vmlinuz"\nramdisk = "/lab/initrd"\n'
            f'extra = "{self.cmdline}"\nmemory = {self.memory}\nvcpus = {self.vcpus}\n'
            f"disk = {list(self.disks)}\nvif = ['bridge=xenbr0']\n"
            'on_poweroff = "destroy"\non_reboot = "destroy"\non_crash = "destroy"\n'
        )

    @property
    def cmdline(self) -> str:
        return f"console=hvc0 quiet pvirq=agent {self.append}".strip()


class RealHost:
    """QEMU with Xen and domain 0. `report` gets a line now and then. Close it, or use it as a context manager."""

    def __init__(
        self, report: Callable[[str], None], *, guest_kernel: Path, guest_initrd: bytes,
        files: Mapping[str, bytes] | None = None, memory: int = 2048, cpus: int = 2, timeout: float = 300,
    ) -> None:  # fmt: skip
        """Boot it, with the guests' kernel and initrd and `files` in domain 0's initrd. RealXenError."""
        self._report = report
        self._began = time.monotonic()
        self._commands = 0
        self._received = bytearray()
        self._scratch = tempfile.TemporaryDirectory(prefix="pvirq-xen-")
        self._qemu: subprocess.Popen[bytes] | None = None
        try:
            self._start(guest_kernel, guest_initrd, files or {}, memory, cpus)
            self._await(b"\x1eready\n", timeout, "domain 0")
        except BaseException:
            self.close()
            raise
        self.report("domain 0 takes commands")

    def _start(self, kernel: Path, initrd: bytes, files: Mapping[str, bytes], memory: int, cpus: int) -> None:
        parts = dom0.prepare(self._report)
        scratch = Path(self._scratch.name)
        image = default_binary().read_bytes()
        (scratch / "xen").write_bytes(gzip.decompress(image) if image[:2] == b"\x1f\x8b" else image)
        lab: dict[str, bytes | Path] = {"lab/vmlinuz": kernel, "lab/initrd": initrd}
        busybox = kernels.find_busybox(self._report)
        (scratch / "initrd").write_bytes(parts.initrd(busybox, {**lab, **files}))
        command = [QEMU, *MACHINE, "-smp", str(cpus), "-m", str(memory), "-kernel", str(scratch / "xen")]
        command += ["-append", XEN_ARGS, "-initrd", f"{parts.kernel} {DOM0_ARGS},{scratch / 'initrd'}"]
        self._qemu = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - there are no threads
        )  # fmt: skip
        self.report("started QEMU")

    def report(self, message: str) -> None:
        self._report(f"[{time.monotonic() - self._began:6.1f} s] {message}")

    # -- domain 0 ------------------------------------------------------------------------------------------------------

    def run(self, command: str, timeout: float = 300, check: bool = True) -> str:
        """What a shell command prints in domain 0. RealXenError where it doesn't end, or (`check`) fails."""
        text = base64.b64encode(command.encode()).decode()
        for start in range(0, len(text), PIECE):
            self._send(f"+ {text[start : start + PIECE]}\n")
            self._await(b"\x1e+\n", timeout, "an answer to a piece of a command")
        self._commands += 1
        nonce = f"c{self._commands}"
        self._send(f"! {nonce}\n")
        self._await(f"\x1e{nonce} begin\n".encode(), timeout, f"the begin of {command!r}")
        output = self._await(f"\x1e{nonce} end ".encode(), timeout, f"the end of {command!r}")
        status = int(self._await(b"\n", timeout, "a status"))
        lines = output.decode(errors="replace").split("\n")
        printed = "\n".join(line for line in lines if not line.startswith("(XEN) "))
        if check and status:
            raise RealXenError(f"{command!r} failed in domain 0 ({status}): {printed[-2000:]}")
        return printed

    def debug_key(self, key: str) -> str:
        """What xl debug-keys makes Xen print, by xl dmesg."""
        # Xen's lines also come over the serial line, which must be quiet meanwhile, and are dropped there (`run`).
        self.run(f"xl dmesg -c > /dev/null; xl debug-keys {key}; sleep 1")
        return self.run("xl dmesg | sed 's/^/:/'").replace("\n:", "\n").removeprefix(":")

    def _send(self, text: str) -> None:
        assert self._qemu
        assert self._qemu.stdin
        try:
            self._qemu.stdin.write(text.encode())
            self._qemu.stdin.flush()
        except BrokenPipeError:
            raise RealXenError("QEMU has ended") from None

    def _await(self, mark: bytes, timeout: float, what: str) -> bytes:
        """What came before `mark`, which is taken from what was received."""
        assert self._qemu
        assert self._qemu.stdout
        deadline = time.monotonic() + timeout
        searched = 0
        while (at := self._received.find(mark, searched)) < 0:
            searched = max(0, len(self._received) - len(mark))
            if time.monotonic() > deadline:
                raise RealXenError(f"{timeout:g} s passed; waiting for {what}: {self._last()}")
            if not select.select([self._qemu.stdout], [], [], 10)[0]:
                # Now and then Xen's serial output stands still until some input comes. The agent skips empty lines.
                self._send("\n")
            else:
                chunk = os.read(self._qemu.stdout.fileno(), 65536)
                if not chunk:
                    raise RealXenError(f"QEMU ended; waiting for {what}: {self._last()}")
                self._received += chunk.replace(b"\r", b"")
        before = bytes(self._received[:at])
        del self._received[: at + len(mark)]
        return before

    def _last(self) -> str:
        return self._received[-2000:].decode(errors="replace")

    # -- guests --------------------------------------------------------------------------------------------------------

    def start_tools(self, disks: int = 1, megabytes: int = 64) -> None:
        """xenstored, xenconsoled, the bridge xenbr0, and /dev/loop0 and on, each on a file of so many megabytes."""
        self.run(
            "set -e; xenstored --pid-file /run/xen/xenstored.pid\n"
            "until xenstore-exists / 2>/dev/null || xenstore-read / >/dev/null 2>&1; do sleep 0.1; done\n"
            "/usr/lib/xen-4.17/bin/xen-init-dom0\n"
            "xenconsoled --pid-file=/run/xen/xenconsoled.pid\n"
            "brctl addbr xenbr0; echo 0 > /sys/class/net/xenbr0/bridge/forward_delay\n"
            "ip link set xenbr0 up; ip addr add 10.0.0.1/24 dev xenbr0"
        )
        for number in range(disks):
            self.run(
                f"truncate -s {megabytes}M /run/disk{number}; [ -b /dev/loop{number} ] || "
                f"mknod /dev/loop{number} b 7 {number}; losetup /dev/loop{number} /run/disk{number}"
            )
        self.report("Xen's tools run")

    def create(self, config: Config, timeout: float = 300) -> None:
        """xl create; the guest's agent may not be there yet."""
        self.run(f"cat > /run/{config.name}.cfg <<'END'\n{config.text()}END")
        self.run(f"xl create /run/{config.name}.cfg", timeout)

    def guest(self, command: str, name: str = "u", timeout: float = 300, check: bool = True) -> str:
        """What a shell command prints in a guest, once its agent takes commands. RealXenError as for `run`."""
        quoted = command.replace("'", "'\\''")
        return self.run(f"/lab/guest {name} '{quoted}'", timeout, check)

    def poweroff(self, name: str = "u", timeout: float = 300) -> None:
        """Let a guest's agent power it off, and wait until xl has destroyed it and its devices."""
        self.run(
            f"id=$(xl domid {name}); echo poweroff > $(xenstore-read /local/domain/$id/console/tty)\n"
            f"while xl domid {name} > /dev/null 2>&1 || xenstore-exists /libxl/$id; do sleep 0.2; done\n"
            f"rm -f /run/ready-{name}",
            timeout,
        )

    # -- ending --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill QEMU; idempotent."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.communicate()
            self._qemu = None
        self._scratch.cleanup()

    def __enter__(self) -> RealHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
