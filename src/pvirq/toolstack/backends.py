"""The backends in a modelled domain 0: its block devices, its network, its xenbus with blkback and netback."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blkback import BlkBack
from pvirq.drivers.blockstore import BlockDevices, BlockStore, InPlaceStore
from pvirq.drivers.bridge import Network, PhysicalInterface
from pvirq.drivers.netback import netback
from pvirq.drivers.xenbus import Device, Driver, DriverFactory, Xenbus
from pvirq.drivers.xenstore import Client
from pvirq.drivers.xs import Xs
from pvirq.hardware.disk import BlockDriver
from pvirq.hardware.nic import NicDriver
from pvirq.hardware.platform import Platform
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Completion, Kthread
from pvirq.toolstack.devices import DeviceManager, DeviceRef, Disk, vdev_number
from pvirq.toolstack.diskimage import open_image


class Backends:
    """What serves guests' devices in domain 0. `devices` are its block devices, `network` its interfaces and bridges.

    The hardware is in them from the start: a disk as /dev/NAME, a NIC as NAME on its bridge.
    """

    def __init__(self, dom0: Kernel[Any], xs: Xs, store: Client, platform: Platform) -> None:
        self.feature_persistent = True  # xen_blkback's parameter, for disks that connect from now on
        self.devices = BlockDevices()
        self._images: list[InPlaceStore] = []  # that were opened here
        self.network = Network(dom0.now)
        self.xenbus = Xenbus(dom0, xs)
        self.manager = DeviceManager(store, self.devices, self.network)
        for name, device in platform.devices.items():
            if isinstance(device, BlockDriver):
                self.devices.add(f"/dev/{name}", device)
            elif isinstance(device, NicDriver):
                if device.bridge:
                    self.network.need_bridge(device.bridge)
                self.network.add(PhysicalInterface(name, device), device.bridge)
        self._drivers: dict[str, DriverFactory] = {"vbd": self._blkback, "vif": netback(self.network)}
        self.xenbus.start_backends(self._drivers)

    def _blkback(self, dev: Device) -> Driver:
        return BlkBack(dev, self.devices, persistent=self.feature_persistent)

    def attach_disk(
        self, domid: int, vdev: str, device: str | os.PathLike[str] | BlockStore, *, readonly: bool = False,
        format: str = "", cache: str = "none",
    ) -> DeviceRef:  # fmt: skip
        """As `Host.attach_disk`, for a domain."""
        devices, manager = self.devices, self.manager
        disk = Disk(vdev, "", readonly)
        ref = DeviceRef(domid, "vbd", disk.devid)
        manager.check_free(ref)
        path = os.fspath(device) if isinstance(device, (str, os.PathLike)) else ""
        known = devices.number(path) is not None
        if (known or not path) and (format not in ("", "raw") or cache != "none"):
            raise XenError(Errno.EINVAL, f"Disk vdev={vdev}: format and cache are for images")
        if known:
            manager.attach_disk(domid, replace(disk, params=path))
            return ref
        if not isinstance(device, (str, os.PathLike)):
            name = devices.add_free("ram", device)
            manager.attach_disk(domid, replace(disk, params=name), on_gone=lambda: devices.remove(name))
            return ref
        if not os.path.exists(path):
            raise XenError(Errno.ENOENT, f"Disk vdev={vdev} failed to stat: {path}: {os.strerror(Errno.ENOENT)}")
        image = open_image(path, readonly=readonly, format=format, cache=cache)
        self._images.append(image)

        def close() -> None:
            self._images.remove(image)
            image.close()

        if format in ("", "raw"):
            manager.attach_disk(domid, replace(disk, params=path), image, on_gone=close)
            return ref
        nbd = devices.add_free("nbd", image)  # qemu-nbd -c

        def gone() -> None:
            devices.remove(nbd)
            close()

        manager.attach_disk(domid, replace(disk, params=nbd), on_gone=gone)
        return ref

    def detach_disk(self, domid: int, vdev: str, *, force: bool = False) -> Completion[None]:
        """As `Host.detach_disk`, for a domain."""
        return self.manager.detach(DeviceRef(domid, "vbd", vdev_number(vdev)), force=force)

    def store_of(self, ref: DeviceRef) -> BlockStore:
        """What a disk's sectors are kept in. XenError(ENOENT): there is no such disk, or it is not ready yet."""
        store = self.devices.find(self.manager.store.read_text(f"{ref.backend}/physical-device", ""))
        if store is None:
            raise XenError(Errno.ENOENT, f"domain {ref.domid} has no disk {ref.devid}")
        return store

    def stores(self) -> list[BlockStore]:
        """All that disks are kept in, be they ready or not."""
        stores: list[BlockStore] = [*self.devices.stores(), *self._images]
        return list({id(store): store for store in stores}.values())

    def unload(self, kind: str) -> Kthread[None]:
        """Remove the module that serves devices of a kind, vbd or vif (rmmod xen-blkback).

        Frontends aren't told (allow_rebind in xenbus_dev_remove): what they ask for waits until it is loaded again.
        """
        return self.xenbus.run("rmmod", self.xenbus.backends.kill_driver(kind))

    def load(self, kind: str) -> Kthread[None]:
        """Load it again (modprobe xen-blkback): it takes the frontends' rings up where they stand."""
        return self.xenbus.run("modprobe", self.xenbus.backends.register_driver(kind, self._drivers[kind]))

    def close(self) -> None:
        """Let go of the images that disks still have."""
        self.manager.close()
