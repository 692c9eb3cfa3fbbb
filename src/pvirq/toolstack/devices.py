"""What xl does for the disks and network interfaces of a domain (libxl_disk.c, libxl_nic.c, libxl_device.c of 4.17).

It writes both ends' nodes, waits for the backend to be ready, and does what the hotplug scripts do: it names the
block device, or puts the interface on its bridge. A domain may run or be still to be built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_xenbus import XenbusState
from pvirq.drivers.blockstore import BlockDevices, BlockStore
from pvirq.drivers.bridge import Network
from pvirq.drivers.xenstore import Client, Operations, Perm, WatchHandle
from pvirq.linux.kthread import Completion
from pvirq.toolstack.domain import remove_path

PROTOCOL: Final = "x86_64-abi"
BLOCK_SCRIPT: Final = "/etc/xen/scripts/block"
VIF_SCRIPT: Final = "/etc/xen/scripts/vif-bridge"

XVDA: Final = 202 << 8
EXTENDED: Final = 1 << 28


@dataclass(frozen=True)
class Disk:
    """A disk of a domain: `params` is the block device or file in domain 0, `vdev` its name in the guest, as xvda."""

    vdev: str
    params: str
    readonly: bool = False
    removable: bool = False

    @property
    def devid(self) -> int:
        return vdev_number(self.vdev)


@dataclass(frozen=True)
class Nic:
    """A network interface of a domain."""

    devid: int
    mac: str
    bridge: str = "xenbr0"
    mtu: int = 1500


@functools.lru_cache(maxsize=256)  # asked again and again by who waits for a disk
def vdev_number(vdev: str) -> int:
    """The number of a virtual device such as xvda, xvdb1, hda or sda (libxl__device_disk_dev_number).

    ValueError for a name that is none.
    """
    prefix, rest = vdev[:3], vdev[3:]
    if prefix != "xvd":
        prefix, rest = vdev[:2], vdev[2:]
    letters = rest.rstrip("0123456789")
    partition = int(rest[len(letters) :] or "0")
    if prefix not in ("xvd", "hd", "sd") or not letters or not letters.islower() or not letters.isalpha():
        raise ValueError(f"{vdev!r} is no virtual device: expected xvd, hd or sd, a letter and perhaps a number")
    disk = 0
    for letter in letters:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    disk -= 1
    if prefix == "hd" and disk < 4 and partition < 64:
        return ((3, 22)[disk // 2] << 8) | (disk % 2) << 6 | partition
    if prefix == "sd" and disk < 16 and partition < 16:
        return 8 << 8 | disk << 4 | partition
    if prefix == "xvd" and disk < 16 and partition < 16:
        return XVDA | disk << 4 | partition
    if prefix != "xvd" or partition > 255 or disk >= 1 << 20:
        raise ValueError(f"{vdev!r} is beyond what there are numbers for")
    return EXTENDED | disk << 8 | partition


@dataclass(frozen=True)
class DeviceRef:
    """A device by its place: libxl__device."""

    domid: int
    kind: str
    devid: int

    @property
    def frontend(self) -> str:
        return f"/local/domain/{self.domid}/device/{self.kind}/{self.devid}"

    @property
    def backend(self) -> str:
        return f"/local/domain/0/backend/{self.kind}/{self.domid}/{self.devid}"

    @property
    def vif(self) -> str:
        """The name of its interface in domain 0, where it is one."""
        return f"vif{self.domid}.{self.devid}"

    @property
    def libxl(self) -> str:
        return f"/libxl/{self.domid}/device/{self.kind}/{self.devid}"


Nodes = Iterable[tuple[str, str | int]]


class DeviceManager:
    """Attaches and detaches devices of domain 0's backends.

    What a script can't do goes to `hotplug-error` and `hotplug-status`, and is how the attaching fails.
    """

    def __init__(self, store: Client, devices: BlockDevices, network: Network) -> None:
        """`devices` and `network` are domain 0's block devices and interfaces."""
        self.store = store
        self._devices = devices
        self._network = network
        self._loops: dict[DeviceRef, str] = {}  # loop devices that scripts have made
        self._closing: dict[DeviceRef, Callable[[], None]] = {}  # what goes with a disk
        self._attaching: dict[DeviceRef, WatchHandle] = {}  # whose script still waits for the backend

    # -- attaching -----------------------------------------------------------------------------------------------------

    def attach_disk(
        self, domid: int, disk: Disk, image: BlockStore | None = None, on_gone: Callable[[], None] | None = None
    ) -> Completion[DeviceRef]:
        """Give a domain a disk; done when its backend has the block device. XenError(EEXIST): it has one there.

        With an `image`, `disk.params` is a file in domain 0, which the script makes a loop device, for as long as the
        disk is there. `on_gone` is called when the disk has gone, or didn't come.

        Fails with XenError(ENOENT) where domain 0 has no such block device, its text in `hotplug-error`.
        """
        ref = DeviceRef(domid, "vbd", disk.devid)
        back: Nodes = [
            ("params", disk.params), ("script", BLOCK_SCRIPT), ("frontend-id", domid), ("online", 1),
            ("removable", int(disk.removable)), ("bootable", 1), ("state", 1), ("dev", disk.vdev), ("type", "phy"),
            ("mode", "r" if disk.readonly else "w"), ("device-type", "disk"),
            ("discard-enable", int(not disk.readonly)), ("specification", "xen"),
        ]  # fmt: skip
        front: Nodes = [
            ("backend-id", 0), ("state", 1), ("virtual-device", ref.devid), ("device-type", "disk"), ("trusted", 1),
            ("protocol", PROTOCOL),
        ]  # fmt: skip
        try:
            self._add(ref, back, front, [])
        except XenError:
            if on_gone is not None:
                on_gone()
            raise
        if on_gone is not None:
            self._closing[ref] = on_gone
        return self._when_ready(ref, lambda: self._block_script(ref, disk.params, image))

    def attach_nic(self, domid: int, nic: Nic) -> Completion[DeviceRef]:
        """Give a domain a network interface; done when it is on its bridge. XenError(EEXIST)."""
        ref = DeviceRef(domid, "vif", nic.devid)
        back: Nodes = [
            ("frontend-id", domid), ("online", 1), ("state", 1), ("script", VIF_SCRIPT), ("mac", nic.mac),
            *([("mtu", nic.mtu)] if nic.mtu != 1500 else []),
            ("bridge", nic.bridge), ("handle", nic.devid), ("type", "vif"), ("hotplug-status", ""),
        ]  # fmt: skip
        front: Nodes = [("backend-id", 0), ("state", 1), ("handle", nic.devid), ("mac", nic.mac), ("trusted", 1)]
        self._add(ref, back, front, [("mtu", nic.mtu)])
        return self._when_ready(ref, lambda: self._vif_script(ref, nic.bridge))

    def check_free(self, ref: DeviceRef) -> None:
        """XenError(EEXIST): the domain has that device."""
        if self.store.exists(f"{ref.libxl}/backend"):
            raise XenError(Errno.EEXIST, f"domain {ref.domid} has {ref.kind} {ref.devid}")

    def _add(self, ref: DeviceRef, back: Nodes, front: Nodes, front_ro: Nodes) -> None:
        """libxl__device_generic_add."""
        self.check_free(ref)
        theirs = Perm.parse(f"n{ref.domid}"), Perm.parse("r0")
        ours = Perm.parse("n0"), Perm.parse(f"r{ref.domid}")
        frontend, backend, libxl = ref.frontend, ref.backend, ref.libxl

        def write(t: Operations) -> None:
            t.write(f"{libxl}/frontend", frontend)
            t.write(f"{libxl}/backend", backend)
            t.mkdir(frontend)
            t.set_perms(frontend, theirs)
            t.write(f"{frontend}/backend", backend)
            for nodes, perms in ((front, theirs), (front_ro, ours)):
                for key, value in nodes:
                    t.write(f"{frontend}/{key}", value)
                    t.set_perms(f"{frontend}/{key}", perms)
            t.mkdir(backend)
            t.set_perms(backend, ours)
            t.write(f"{backend}/frontend", frontend)
            for key, value in back:
                t.write(f"{backend}/{key}", value)
                t.write(f"{libxl}/{key}", value)

        self.store.transact(write)

    def _when_ready(self, ref: DeviceRef, script: Callable[[], None]) -> Completion[DeviceRef]:
        """Run the hotplug script once the backend waits for it (device_hotplug)."""
        done: Completion[DeviceRef] = Completion()

        def ready() -> None:
            self._attaching.pop(ref, None)
            try:
                script()
            except XenError as error:
                self.store.write(f"{ref.backend}/hotplug-error", error.why)
                self.store.write(f"{ref.backend}/hotplug-status", "error")
                done.fail(error)
            else:
                done.complete(ref)

        waits = self._when_state(ref, (XenbusState.InitWait,), ready)
        if waits is not None:
            self._attaching[ref] = waits
        return done

    def _when_state(
        self, ref: DeviceRef, states: tuple[XenbusState, ...], action: Callable[[], None]
    ) -> WatchHandle | None:
        """Once the backend is in one of these states, or its nodes are gone where Unknown is one (ev_devstate)."""
        watch: list[WatchHandle] = []

        def changed(path: str, token: str) -> None:
            text = self.store.read_text(f"{ref.backend}/state", "0")
            if watch and text.isdigit() and int(text) in states:
                watch.pop().close()
                action()

        watch.append(self.store.watch(f"{ref.backend}/state", f"{ref.kind}-{ref.domid}-{ref.devid}", changed))
        changed("", "")
        return watch[0] if watch else None

    def _block_script(self, ref: DeviceRef, device: str, image: BlockStore | None) -> None:
        """/etc/xen/scripts/block add: a file gets a loop device (losetup -f)."""
        if image is not None:
            device = self._loops[ref] = self._devices.add_free("loop", image)
            self.store.write(f"{ref.backend}/node", device)
        number = self._devices.number(device)
        if number is None:
            raise XenError(Errno.ENOENT, f"{device} does not exist")
        self.store.write(f"{ref.backend}/physical-device", number)
        self.store.write(f"{ref.backend}/physical-device-path", device)
        self.store.write(f"{ref.backend}/hotplug-status", "connected")

    def _vif_script(self, ref: DeviceRef, bridge: str) -> None:
        """/etc/xen/scripts/vif-bridge online."""
        self._network.attach(ref.vif, bridge)
        self.store.write(f"{ref.backend}/hotplug-status", "connected")

    # -- detaching -----------------------------------------------------------------------------------------------------

    def detach(self, ref: DeviceRef, *, force: bool = False) -> Completion[None]:
        """Take a device away: both ends close, then its nodes go; `force` doesn't wait for the guest.

        XenError(ENOENT): there is none.
        """
        done: Completion[None] = Completion()
        if not self.store.exists(f"{ref.libxl}/backend"):
            raise XenError(Errno.ENOENT, f"domain {ref.domid} has no {ref.kind} {ref.devid}")

        def closed() -> None:
            self._destroy(ref)
            done.complete(None)

        def close(t: Operations) -> None:
            if t.exists(f"{ref.backend}/state"):
                t.write(f"{ref.backend}/online", 0)
                if t.read_text(f"{ref.backend}/state") != str(int(XenbusState.Closed)):
                    t.write(f"{ref.backend}/state", int(XenbusState.Closing))

        self.store.transact(close)
        if force:
            closed()
        else:
            self._when_state(ref, (XenbusState.Unknown, XenbusState.Closed), closed)
        return done

    def _destroy(self, ref: DeviceRef) -> None:
        """The scripts' `remove` and libxl__device_destroy: its nodes, and directories that are empty with that."""
        waits = self._attaching.pop(ref, None)
        if waits is not None:
            waits.close()  # or the script would run for the next device of this name
        if ref.kind == "vif":
            self._network.detach(ref.vif)
        elif (loop := self._loops.pop(ref, None)) is not None:
            self._devices.remove(loop)  # losetup -d
        for path in (ref.frontend, ref.backend, ref.libxl):
            remove_path(self.store, path)
        gone = self._closing.pop(ref, None)
        if gone is not None:
            gone()

    def detach_all(self, domid: int) -> None:
        """Take all devices of a domain that has ended away (libxl__devices_destroy)."""
        base = f"/libxl/{domid}/device"
        if not self.store.exists(base):
            return
        for kind in self.store.ls(base):
            if kind == "console":
                continue
            for devid in self.store.ls(f"{base}/{kind}"):
                self.detach(DeviceRef(domid, kind, int(devid)), force=True)

    def close(self) -> None:
        """The host ends: let go of what disks still have."""
        closing, self._closing = self._closing, {}
        for gone in closing.values():
            gone()
