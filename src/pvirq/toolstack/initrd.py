"""The initramfs a guest gets when the user gives none, and the overlay for one the user does give.

Both hold /pvirq/init (see init.sh for what it does) and a static busybox; the default initrd adds the least
of a userland around it. The archives are not compressed: the guest would spend more time unpacking than the
copy costs.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from pvirq.toolstack import cpio

INIT: Final = "/pvirq/init"  # the kernel parameter is rdinit=/pvirq/init; the default initrd has /init as well

_FSTAB: Final = b"proc /proc proc\nsysfs /sys sysfs\ndevtmpfs /dev devtmpfs\n"
# Until devtmpfs is mounted, and instead of it in a kernel without: Linux
# Documentation/admin-guide/devices.txt.
_NODES: Final = (
    ("dev/console", 5, 1, 0o600),
    ("dev/null", 1, 3, 0o666),
    ("dev/zero", 1, 5, 0o666),
    ("dev/urandom", 1, 9, 0o666),
    ("dev/tty", 5, 0, 0o666),
    ("dev/hvc0", 229, 0, 0o600),
)
# Links to busybox that are in the archive: what "#!" lines name, and what init itself may need. The others
# are made at boot (init.sh says when, and what either costs).
_LINKS: Final = ("ash", "awk", "busybox", "env", "sed", "sh")
# What the kernel runs when the toolstack asks for it (orderly_poweroff, orderly_reboot), and a user types: there is no
# init system to tell.
_ENDS: Final = ("halt", "poweroff", "reboot")
# Where builds of busybox look for the script of udhcpc (CONFIG_UDHCPC_DEFAULT_SCRIPT): Debian's, others.
_UDHCPC: Final = ("etc/udhcpc", "usr/share/udhcpc")
# Run for each event of the kernel's (uevent).
_HOTPLUG: Final = b"""\
if [ "$ACTION $SUBSYSTEM" = "add cpu" ]; then
	echo 1 > "/sys$DEVPATH/online"
fi
"""
# What a busybox says of itself if its shell runs applets without looking for a file
# (CONFIG_FEATURE_SH_STANDALONE).
_STANDALONE: Final = b"configured to run built-in utilities"


def default_initrd(
    busybox: Path,
    files: Mapping[str, bytes | Path] | None = None,
    modules: Sequence[tuple[str, bytes]] = (),
) -> bytes:
    """An initramfs with busybox, links to it in /bin, and `files` (path in the guest: content).

    A file given as a Path keeps its permission bits and, if it is a symlink, stays one; a directory given as
    a Path is taken with all below it; plain bytes get mode 0644, or 0755 when they start with "#!" or are an
    ELF image. An executable /etc/rc runs instead of the shell. `modules` are (name, content) pairs, loaded in
    that order before anything else (see pvirq.toolstack.modules). OSError when a file can't be read,
    CpioError for impossible names.
    """
    image = busybox.read_bytes()
    archive = cpio.Writer()
    for path, content in sorted((files or {}).items()):  # first: they win over what follows
        _add_file(archive, path, content)
    _add_base(archive, image, modules)
    for directory in ("tmp", "root", "run", "bin"):
        archive.directory(directory, 0o1777 if directory == "tmp" else 0o755)
    for link, target in (
        ("init", "pvirq/init"),
        ("sbin", "bin"),
        ("usr/bin", "../bin"),
        ("usr/sbin", "../bin"),
    ):
        if link not in archive:
            archive.symlink(link, target)
    archive.file("pvirq/udhcpc", _resource("udhcpc.sh"), 0o755)
    for directory in _UDHCPC:
        if f"{directory}/default.script" not in archive:
            archive.symlink(f"{directory}/default.script", "/pvirq/udhcpc")
    for applet in _LINKS:
        if f"bin/{applet}" not in archive:
            archive.symlink(f"bin/{applet}", "/pvirq/busybox")
    for applet in _ENDS:
        if f"bin/{applet}" not in archive:
            archive.file(f"bin/{applet}", _end_script(applet), 0o755)
    archive.file("pvirq/links", b"interactive\n" if _STANDALONE in image else b"always\n")
    for name, text in (("passwd", b"root:x:0:0:root:/root:/bin/sh\n"), ("group", b"root:x:0:\n")):
        if f"etc/{name}" not in archive:
            archive.file(f"etc/{name}", text)
    return archive.getvalue()


def overlay(busybox: Path, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """An archive that adds /pvirq (init, busybox) and mount points to the user's own: see with_overlay."""
    archive = cpio.Writer()
    _add_base(archive, busybox.read_bytes(), modules)
    return archive.getvalue()


def with_overlay(initrd: bytes, busybox: Path, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The user's initramfs (plain or compressed in any way) with the overlay; needs rdinit=/pvirq/init.

    The overlay goes in front, as microcode archives do. Behind a compressed archive it would depend on each
    decompressor of the kernel to stop at the right byte (unlz4 took what followed for another chunk for
    years); and in front, the user's archive wins where both have a name.
    """
    return overlay(busybox, modules) + initrd


@cache
def _resource(name: str) -> bytes:
    return resources.files("pvirq.toolstack").joinpath(name).read_bytes()


def _end_script(applet: str) -> bytes:
    return f"#!/pvirq/busybox sh\nexec /pvirq/busybox {applet} -f\n".encode()


def _add_base(archive: cpio.Writer, busybox: bytes, modules: Sequence[tuple[str, bytes]]) -> None:
    for directory in ("dev", "proc", "sys", "pvirq"):
        archive.directory(directory)
    for path, major, minor, mode in _NODES:
        if path not in archive:
            archive.device(path, "c", major, minor, mode)
    archive.file("pvirq/init", _resource("init.sh"), 0o755)
    archive.file("pvirq/busybox", busybox, 0o755)
    archive.file("pvirq/fstab", _FSTAB)
    archive.file("pvirq/poweroff", _end_script("poweroff"), 0o755)
    archive.file("pvirq/hotplug", _HOTPLUG)
    archive.file("pvirq/shrc", "".join(f"alias {end}='/pvirq/busybox {end} -f'\n" for end in _ENDS).encode())
    paths = []
    for name, content in modules:
        paths.append(f"/pvirq/{name}.ko")
        archive.file(paths[-1], content)
    if paths:
        archive.file("pvirq/modules", "".join(f"{path}\n" for path in paths).encode())


def _add_file(archive: cpio.Writer, path: str, content: bytes | Path) -> None:
    if isinstance(content, bytes):
        program = content.startswith((b"#!", b"\x7fELF"))
        archive.file(path, content, 0o755 if program else 0o644)
    elif content.is_symlink():
        archive.symlink(path, str(content.readlink()))
    elif content.is_dir():
        archive.directory(path, stat.S_IMODE(content.stat().st_mode))
        for child in sorted(content.iterdir()):
            _add_file(archive, f"{path}/{child.name}", child)
    elif not content.is_file():  # a FIFO would have us wait
        raise cpio.CpioError(f"neither file, directory nor symlink: {content}")
    else:
        archive.file(path, content.read_bytes(), stat.S_IMODE(content.stat().st_mode))
