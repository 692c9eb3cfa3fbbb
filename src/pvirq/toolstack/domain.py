"""What xl does around a domain: its xenstore nodes and its first event channels.

The layout is that of libxl 4.17 (tools/libs/light/libxl_create.c, libxl_console.c, libxl_dom.c).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Final

from pvirq.drivers.xenstore import Client, Perm

# libxl's default for max_event_channels.
MAX_EVENT_CHANNELS: Final = 1023
CONSOLE_LIMIT: Final = 1 << 20
# What a modelled domain 0 says it has; it takes what it needs and has no balloon.
DOM0_MEMORY_KIB: Final = 1 << 20


@dataclass(frozen=True)
class DomainInfo:
    """What xenstore is told of a domain. Sizes in KiB, as libxl writes them."""

    domid: int
    name: str
    memory_kib: int
    vcpus: int
    vcpus_online: int
    store_port: int
    store_mfn: int
    console_port: int
    console_mfn: int
    kernel: str = ""
    ramdisk: str = ""
    cmdline: str = ""
    uuid: str = field(default_factory=lambda: str(uuid.UUID(int=0)))
    start_time: float = 0.0  # Unix seconds at which it is created
    restored: bool = False  # and so without files that it was booted from


def write_dom0(store: Client) -> None:
    """Domain 0's own nodes, as its kernel, xen-init-dom0 and xl's first look at its memory leave them."""
    store.mkdir("/tool/xenstored")
    for path, value in (
        ("/local/domain/0/control/feature-poweroff", "1"),
        ("/local/domain/0/control/feature-reboot", "1"),
        ("/local/domain/0/control/feature-suspend", "1"),
        ("/local/domain/0/domid", "0"),
        ("/local/domain/0/name", "Domain-0"),
        ("/local/domain/0/memory/target", str(DOM0_MEMORY_KIB)),
        ("/local/domain/0/memory/static-max", str(DOM0_MEMORY_KIB)),
        ("/local/pool/0/name", "Pool-0"),
    ):
        store.write(path, value)


def write_domain(store: Client, info: DomainInfo) -> None:
    """A new guest's nodes, in libxl's order and with its permissions. XenError as xenstore gives it."""
    guest = f"/local/domain/{info.domid}"
    vm, libxl = f"/vm/{info.uuid}", f"/libxl/{info.domid}"
    read_only, read_write, private = _perms("n0", f"r{info.domid}"), _perms(f"n{info.domid}"), _perms("n0")

    def node(path: str, permissions: tuple[Perm, ...], value: str | None = None) -> None:
        if value is None:
            store.mkdir(path)
        else:
            store.write(path, value)
        store.set_perms(path, permissions)

    node(guest, read_only)
    node(vm, read_only)
    node(libxl, private)
    node(f"{libxl}/device", private)
    node(f"{guest}/vm", read_only, vm)
    node(f"{guest}/name", read_only, info.name)
    node(f"{guest}/cpu", read_only)
    node(f"{guest}/memory", read_only)
    node(f"{guest}/device", read_only)
    node(f"{guest}/device/suspend", read_only)
    node(f"{guest}/device/suspend/event-channel", read_write, "")
    node(f"{guest}/control", read_only)
    node(f"{guest}/control/shutdown", read_write, "")
    for feature in ("poweroff", "reboot", "suspend"):
        node(f"{guest}/control/feature-{feature}", read_write, "")
    node(f"{guest}/control/sysrq", read_write, "")
    node(f"{guest}/control/platform-feature-multiprocessor-suspend", read_only, "1")
    node(f"{guest}/control/platform-feature-xs_reset_watches", read_only, "1")
    for path in ("data", "drivers", "feature", "attr", "error"):
        node(f"{guest}/{path}", read_write)
    node(f"{vm}/name", read_only, info.name)
    node(f"{vm}/uuid", read_only, info.uuid)
    node(f"{libxl}/type", private, "pv")
    node(f"{libxl}/dm-version", private, "qemu_xen")
    for cpu in range(info.vcpus):
        node(f"{guest}/cpu/{cpu}", read_only)
        node(f"{guest}/cpu/{cpu}/availability", read_only, "online" if cpu < info.vcpus_online else "offline")
    for key, value in (("static-max", info.memory_kib), ("target", info.memory_kib), ("videoram", 0)):
        node(f"{guest}/memory/{key}", read_only, str(value))
    node(f"{guest}/domid", read_only, str(info.domid))
    node(f"{guest}/store", read_only)
    node(f"{guest}/store/port", read_only, str(info.store_port))
    node(f"{guest}/store/ring-ref", read_only, str(info.store_mfn))
    node(f"{vm}/image", read_only)
    files = {} if info.restored else {"kernel": info.kernel, "ramdisk": info.ramdisk, "cmdline": info.cmdline}
    for key, text in {"ostype": "linux", **files}.items():
        node(f"{vm}/image/{key}", read_only, text)
    node(f"{vm}/start_time", read_only, f"{info.start_time:.2f}")
    _write_console(store, info, guest, libxl)


def _write_console(store: Client, info: DomainInfo, guest: str, libxl: str) -> None:
    front, back = f"{guest}/console", f"/local/domain/0/backend/console/{info.domid}/0"
    read_only = _perms("n0", f"r{info.domid}")
    backend = {"frontend": front, "frontend-id": info.domid, "online": 1, "state": 1, "protocol": "vt100"}
    for key, value in backend.items():
        store.write(f"{back}/{key}", str(value))
    store.set_perms(back, read_only)
    frontend = {
        "backend": back, "backend-id": 0, "limit": CONSOLE_LIMIT, "type": "xenconsoled", "output": "pty",
        "tty": "", "port": info.console_port, "ring-ref": info.console_mfn,
    }  # fmt: skip
    for key, value in frontend.items():
        store.write(f"{front}/{key}", str(value))
        store.set_perms(f"{front}/{key}", read_only)
    store.set_perms(front, [f"n{info.domid}", "r0"])
    for key, value in {"frontend": front, "backend": back, **backend}.items():
        store.write(f"{libxl}/device/console/0/{key}", str(value))


def _perms(*texts: str) -> tuple[Perm, ...]:
    """Permissions for many nodes, parsed once."""
    return tuple(map(Perm.parse, texts))


def remove_path(store: Client, path: str) -> None:
    """Take a node away, and with it directories that are empty then (libxl__xs_path_cleanup)."""
    if store.exists(path):
        store.rm(path)
    while path := path[: path.rfind("/")]:
        if not store.exists(path) or store.ls(path):
            return
        store.rm(path)


def remove_domain(store: Client, domid: int, vm_uuid: str) -> None:
    """Take a domain's nodes away after its end; what is gone already doesn't matter."""
    if store.exists(f"/local/domain/{domid}"):
        store.rm(f"/local/domain/{domid}")  # first: domain 0's kernel looks for devices that go
    remove_path(store, f"/local/domain/0/backend/console/{domid}/0")
    for path in (f"/libxl/{domid}", f"/vm/{vm_uuid}"):
        if store.exists(path):
            store.rm(path)
