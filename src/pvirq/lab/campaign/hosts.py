"""The hosts of runs: a campaign's kernel with its devices, built and, where runs begin there, booted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pvirq.drivers.blockstore import SECTOR, BlockStore, MemoryStore
from pvirq.drivers.privatestore import PrivateStore
from pvirq.guest import Guest
from pvirq.host import Host
from pvirq.lab.campaign.plan import Start, configuration, digest
from pvirq.lab.campaign.spec import Kernel, MemoryDisk
from pvirq.modelled import ModelledGuest
from pvirq.pv.image import KernelImage
from pvirq.toolstack import images
from pvirq.toolstack.config import DiskConfig, DomainConfig, VifConfig
from pvirq.toolstack.diskimage import sniff_format
from pvirq.xen.timer import NS_PER_S

# Of a host that many runs begin from. A run's own seed takes over where it begins.
BOOT_SEED: Final = 1
NO_NOTES: Final[Callable[[str], None]] = lambda text: None  # noqa: E731


class Unready(Exception):
    """A host can't become what a run needs: one line. Nothing of the guest's is to blame."""


class Blueprint:
    """A start's files, read once, from which its host is built any number of times.

    Unready where they can't be had, or aren't what the campaign was planned with.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.kernel: Kernel = start.kernel
        self.image: KernelImage | None = None
        self.initrd = b""
        self.agent = False
        self.config = DomainConfig(name="guest")
        for path, expected in start.digests.items():
            if path != "kernel":
                self._check(path, Path(start.directory) / path, expected)
        if self.kernel.real:
            self._read()

    def _read(self) -> None:
        kernel, directory = self.kernel, Path(self.start.directory)
        self.config = config = configuration(kernel, directory)
        config.name = config.name or "guest"
        here = directory / config.kernel if config.kernel else None
        choice = images.choose_kernel(
            None if here is None else str(here) if here.exists() else config.kernel, NO_NOTES
        )  # fmt: skip
        self._check("kernel", choice.path, self.start.digests["kernel"])
        self.image = images.load_kernel(choice.path)
        frontends = [
            *(["xen-blkfront"] if config.disks or kernel.disks else []), *(["xen-netfront"] if config.vifs else [])
        ]  # fmt: skip
        given = config.ramdisk and (
            config.ramdisk if config.ramdisk == images.NO_INITRD else directory / config.ramdisk
        )
        self.agent = images.is_linux(self.image) and given != images.NO_INITRD
        files = {path: directory / name for path, name in kernel.files.items()}
        self.initrd = images.make_initrd(
            os.fspath(given) if given else None, self.image, self.agent, NO_NOTES, choice, frontends, files
        )
        if images.is_linux(self.image):
            mode = "agent" if self.agent else ""
            config.cmdline = images.command_line(config.cmdline, mode, bool(given), None)

    def _check(self, name: str, path: Path, expected: str) -> None:
        """A worker elsewhere, or a file that somebody changes meanwhile, would make other runs of these."""
        try:
            found = digest(path)
        except OSError as error:
            raise Unready(f"{path}: {error.strerror}") from None
        # What is told by its age may have another one where workers have copies.
        told_by_age = " bytes of " in expected and expected.split(maxsplit=1)[0] == found.split(maxsplit=1)[0]
        if found != expected and not told_by_age:
            raise Unready(f"{name}: {path} is not what it was when the campaign began")

    def build(self, seed: int) -> tuple[Host, Guest | ModelledGuest]:
        """A host with the guest about to begin its boot. Unready; BuildError and the like as `Host.create` has them."""
        kernel = self.kernel
        host = new_host(kernel, seed)
        try:
            return host, self._guest(host)
        except BaseException:
            host.close()
            raise

    def _guest(self, host: Host) -> Guest | ModelledGuest:
        kernel, config = self.kernel, self.config
        vifs = config.vifs if kernel.real else kernel.vifs
        disks = [*(config.disks if kernel.real else []), *kernel.disks]
        for vif in vifs:
            host.backends.network.need_bridge(vif.bridge)
        if kernel.station:
            host.station(kernel.station, bridge=vifs[0].bridge if vifs else VifConfig().bridge)
        guest: Guest | ModelledGuest
        if kernel.real:
            bare = DomainConfig(**{**vars(config), "disks": [], "vifs": list(vifs)})
            guest = host.create(bare, kernel=self.image, initrd=self.initrd)
        else:
            guest = host.model(kernel.model, vcpus=kernel.vcpus or 1, name="guest")
            for number, vif in enumerate(vifs):
                devid = number if vif.devid is None else vif.devid
                host.attach_nic(guest, devid=devid, mac=vif.mac, bridge=vif.bridge)
        for disk in disks:
            device, readonly = self._disk(host, disk)
            host.attach_disk(guest, disk.vdev, device, readonly=readonly)
        return guest

    def _disk(self, host: Host, disk: DiskConfig | MemoryDisk) -> tuple[str | BlockStore, bool]:
        """What is behind a disk: a device of domain 0's, or what is this run's alone."""
        if isinstance(disk, MemoryDisk):
            return MemoryStore(disk.size // SECTOR), disk.readonly
        if host.backends.devices.number(disk.target) is not None:
            return disk.target, disk.readonly
        path = Path(self.start.directory) / disk.target
        store = PrivateStore(path)
        if (kind := disk.format or sniff_format(store.read(0, 1))) != "raw":
            raise Unready(f"{path}: runs can't share an image in {kind}: convert it to raw")
        return store, disk.readonly

    def boot(self) -> tuple[Host, Guest]:
        """A host whose guest has booted and is ready for a scenario.

        Unready where its `ready` command fails; GuestError and its kinds as for any boot.
        """
        if not self.agent:
            raise Unready(
                "this kernel takes no commands, so nobody knows when it has booted: scenarios need boot = true"
            )
        host, guest = self.build(BOOT_SEED)
        try:
            assert isinstance(guest, Guest)
            timeout = self.start.boot_ns / NS_PER_S
            guest.await_agent(timeout)
            if self.kernel.ready:
                result = guest.run(self.kernel.ready, timeout)
                if result.status:
                    raise Unready(
                        f"its `ready` command ended with status {result.status}: {result.text.strip()[-200:]}"
                    )
            return host, guest
        except BaseException:
            host.close()
            raise


def new_host(kernel: Kernel, seed: int) -> Host:
    """A repeatable host with the domain 0 that a kernel's table wants. HardwareError."""
    return Host(hardware=kernel.hardware, dom0_kernel=kernel.dom0_kernel, dom0_vcpus=kernel.dom0_vcpus, seed=seed)
