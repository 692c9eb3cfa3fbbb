"""The backends in a modelled domain 0: its block devices, its network, its xenbus with blkback and netback."""

from __future__ import annotations

from typing import Any

from pvirq.drivers.blkback import blkback
from pvirq.drivers.blockstore import BlockDevices
from pvirq.drivers.bridge import Network, PhysicalInterface
from pvirq.drivers.netback import netback
from pvirq.drivers.xenbus import Xenbus
from pvirq.drivers.xenstore import Client
from pvirq.drivers.xs import Xs
from pvirq.hardware.disk import BlockDriver
from pvirq.hardware.nic import NicDriver
from pvirq.hardware.platform import Platform
from pvirq.linux.kernel import Kernel
from pvirq.toolstack.devices import DeviceManager


class Backends:
    """What serves guests' devices in domain 0. `devices` are its block devices, `network` its interfaces and bridges.

    The hardware is in them from the start: a disk as /dev/NAME, a NIC as NAME on its bridge.
    """

    def __init__(self, dom0: Kernel[Any], xs: Xs, store: Client, platform: Platform) -> None:
        self.devices = BlockDevices()
        self.network = Network(dom0.now)
        self.xenbus = Xenbus(dom0, xs)
        self.manager = DeviceManager(store, self.devices, self.network)
        for name, device in platform.devices.items():
            if isinstance(device, BlockDriver):
                self.devices.add(f"/dev/{name}", device)
            elif isinstance(device, NicDriver):
                if device.bridge and device.bridge not in self.network.bridges:
                    self.network.add_bridge(device.bridge)
                self.network.add(PhysicalInterface(name, device), device.bridge)
        self.xenbus.start_backends({"vbd": blkback(self.devices), "vif": netback(self.network)})
