"""Records tests/data/hardware/qemu-pc.txt: a Linux as domain 0 of a real Xen in QEMU, on a whole set of devices. Not a
test.

Needs what realxen.py says, and a Linux with its modules: ROOT holds boot/vmlinuz-* and lib/modules/* of one kernel,
as an unpacked linux-image package (Debian's generic one; `dpkg-deb -x`) has them.

    python tests/record_hardware.py ROOT [--xen /boot/xen-4.17-amd64.gz]
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import realxen
from pvirq.toolstack.initrd import INIT, default_initrd
from pvirq.toolstack.kernels import find_busybox
from pvirq.toolstack.modules import read_modules

RECORDED = Path(__file__).parent / "data" / "hardware" / "qemu-pc.txt"
TIMEOUT = 300

DEVICES = [
    *("-net", "none", "-netdev", "user,id=n0", "-device", "e1000,netdev=n0,romfile="),
    *("-drive", "file={}/ide.img,format=raw,if=ide,index=0"),
    *("-device", "ich9-ahci,id=ahci0", "-drive", "file={}/ahci.img,format=raw,if=none,id=a0"),
    *("-device", "ide-hd,drive=a0,bus=ahci0.0"),
    *("-device", "piix3-usb-uhci", "-device", "piix3-usb-uhci", "-device", "usb-ehci"),
    *("-audiodev", "none,id=s0", "-device", "intel-hda", "-device", "hda-duplex,audiodev=s0"),
]

DD = "dd iflag=direct 2>/dev/null"
TEN_READS = f"for i in 1 2 3 4 5 6 7 8 9 10; do {DD} if=/dev/{{}} of=/dev/null bs=4k count=1 skip=$i; done"

# Stage, what is done there; None: the module of that name is loaded.
STAGES: list[tuple[str, str | None]] = [
    ("boot", ""),
    ("psmouse", None),
    ("floppy", None),
    ("floppy-read", "dd if=/dev/fd0 of=/dev/null bs=512 count=1 2>/dev/null"),
    ("ata_piix", None),
    ("ahci", None),
    ("uhci-hcd", None),
    ("snd-hda-codec-generic", None),
    ("snd-hda-intel", None),
    ("e1000", None),
    ("sd_mod", None),
    ("sda-10-reads", TEN_READS.format("sda")),
    ("sda-1M", f"{DD} if=/dev/sda of=/dev/null bs=1M count=1"),
    ("sdb-10-reads", TEN_READS.format("sdb")),
    ("sdb-1M", f"{DD} if=/dev/sdb of=/dev/null bs=1M count=1"),
    ("sdb-write", "dd oflag=direct if=/dev/zero of=/dev/sdb bs=4k count=1 2>/dev/null"),
    ("alarm", "echo +2 > /sys/class/rtc/rtc0/wakealarm; sleep 4"),
    ("eth0-up", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ip link set eth0 up; sleep 3"),
    ("keys", "echo KEYS; sleep 6"),
]
MODULE_ARGS = {"psmouse": "proto=bare"}
INPUT = ("sendkey a", "sendkey b", "mouse_move 5 5")  # to QEMU's monitor, once the guest says KEYS


def build_initrd(root: Path) -> bytes:
    (modules,) = (root / "lib/modules").iterdir()
    script = ["#!/bin/sh", "mount -t proc proc /proc 2>/dev/null", "mount -t sysfs sysfs /sys 2>/dev/null"]
    script += ["mount -t devtmpfs devtmpfs /dev 2>/dev/null"]
    files: dict[str, bytes | Path] = {}
    for stage, action in STAGES:
        if action is None:
            for name, content in read_modules(modules, [stage]):
                files[f"m/{name}.ko"] = content
                script.append(f"insmod /m/{name}.ko {MODULE_ARGS.get(name, '')} 2>/dev/null")
            action = "sleep 2"
        script += [action, f"echo '=== {stage}'", "grep -E '^ *[0-9]+:.*xen-pirq' /proc/interrupts"]
    files["etc/rc"] = "\n".join([*filter(None, script), "poweroff -f", ""]).encode()
    return default_initrd(find_busybox(print), files)


def boot(root: Path, xen: Path, scratch: Path) -> str:
    """What came over the serial line. TimeoutError."""
    (scratch / "xen").write_bytes(gzip.decompress(xen.read_bytes()))
    (scratch / "initrd").write_bytes(build_initrd(root))
    for image in ("ide.img", "ahci.img"):
        with (scratch / image).open("wb") as file:
            file.truncate(64 << 20)
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    command = [realxen.QEMU, "-accel", "tcg", "-cpu", "max,-smap,-smep,-la57", "-smp", "2", "-m", "1024"]
    command += ["-display", "none", "-vga", "none", "-no-reboot", "-no-user-config", "-serial", "stdio"]
    command += ["-monitor", f"unix:{scratch}/monitor,server,nowait", "-kernel", f"{scratch}/xen"]
    command += ["-append", "com1=115200,8n1 console=com1 dom0_mem=600M xsave=0 dom0_max_vcpus=2"]
    command += ["-initrd", f"{kernel} console=hvc0 rdinit={INIT},{scratch}/initrd"]
    command += [each.format(scratch) for each in DEVICES]
    output, deadline, typed = bytearray(), time.monotonic() + TIMEOUT, False
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout
        try:
            while time.monotonic() < deadline:
                if not select.select([qemu.stdout], [], [], 1)[0]:
                    continue
                chunk = os.read(qemu.stdout.fileno(), 65536)
                if not chunk:
                    return output.decode(errors="replace")
                output += chunk
                if not typed and b"\nKEYS" in output:
                    typed = True
                    use_input(scratch / "monitor")
        finally:
            qemu.kill()
    raise TimeoutError(output[-2000:].decode(errors="replace"))


def use_input(monitor: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(monitor))
        for line in INPUT:
            connection.sendall(f"{line}\n".encode())
            time.sleep(0.7)


def main() -> int:
    parser = argparse.ArgumentParser(description="Record a domain 0's physical IRQs from a real Xen.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--xen", type=Path, default=realxen.default_binary())
    options = parser.parse_args()
    if why := realxen.missing(options.xen):
        parser.error(why)
    with tempfile.TemporaryDirectory(prefix="pvirq-hardware-") as scratch:
        output = boot(options.root.resolve(), options.xen, Path(scratch))
    lines = [line.rstrip() for line in output.replace("\r", "").splitlines()]
    text = "".join(f"{line}\n" for line in lines if re.match(r"=== |[ \d]{3}: .* xen-pirq ", line))
    RECORDED.write_text(text)
    print(f"{len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
