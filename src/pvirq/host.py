"""A host: the hypervisor, domain 0, the guests and their devices.

with pvirq.Host() as host:
    guest = host.boot("vmlinuz", initrd=initrd, append="console=hvc0 pvirq=agent")
    print(guest.run("cat /proc/interrupts").text)
    print(host.dom0.proc_interrupts())
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import PAGE_SHIFT, VIRQ_DOM_EXC
from pvirq.drivers.blockstore import BlockStore, InPlaceStore
from pvirq.drivers.bridge import Bridge, Interface
from pvirq.engine import DEFAULT_ENGINE, EngineError
from pvirq.fork import Fork, ForkError, fork
from pvirq.guest import Guest, HostStuck
from pvirq.hardware import platform
from pvirq.hardware.platform import DeviceTable
from pvirq.linux import personalities
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Completion
from pvirq.linux.personalities import KernelFactory
from pvirq.linux.personality import StartInfo
from pvirq.modelled import ModelledGuest
from pvirq.net.outside import OutsideError, Outsider
from pvirq.pv import save
from pvirq.pv.builder import BuildError
from pvirq.pv.guest import PvGuest
from pvirq.pv.image import KernelImage, load_image
from pvirq.pv.save import SavedDomain
from pvirq.runloop import RunLoop
from pvirq.schedule import Schedule
from pvirq.toolstack import control, savefile
from pvirq.toolstack import domain as toolstack
from pvirq.toolstack.backends import Backends
from pvirq.toolstack.config import DEFAULT_MEMORY, DiskConfig, DomainConfig, VifConfig
from pvirq.toolstack.daemons import Daemons
from pvirq.toolstack.devices import DeviceRef, Nic
from pvirq.xen import evtchn, evtchn_views, irq_views
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine
from pvirq.xen.timer import NS_PER_S, Clock

if TYPE_CHECKING:
    from pvirq.net.nat import Nat
    from pvirq.net.station import Station
    from pvirq.net.tap import Tap

T = TypeVar("T")

MIB: Final = 1 << 20


class Host(RunLoop):
    """One host in this process; several may exist side by side, each used from one thread at a time.

    How its domains run, and what may be set for that (`idle`, `on_turn`, `outside`), is `RunLoop`'s.
    """

    def __init__(
        self, *, engine: str = DEFAULT_ENGINE, dom0_vcpus: int = 2, dom0: bool = True,
        dom0_kernel: str | KernelFactory = "pvops", hardware: str | DeviceTable = "none", wallclock: float = 0,
        machine_memory: int = 16 << 30, seed: int | Schedule | None = None,
    ) -> None:  # fmt: skip
        """`wallclock` is the time of day (Unix seconds) at which virtual time begins; `machine_memory` in bytes.

        `dom0_kernel` is what the modelled domain 0 runs: a name of `pvirq.linux.personalities`, or a factory, and
        `hardware` what it has for devices: a machine of `pvirq.hardware.platform`, or a table of devices
        (HardwareError). With `dom0` false there is no such domain: the kernel that is booted then is domain 0 itself.

        Time is what guests have executed. With a `seed` the host's run is repeatable to the bit: what comes next is
        drawn from the seed where Xen leaves it open; a `Schedule` can also say it otherwise. Nothing can come from
        outside then. Without one, what is first in line comes next, and translated code takes less memory.
        """
        super().__init__(
            Hypervisor(Machine(machine_memory), Clock()), Schedule(seed) if isinstance(seed, int) else seed
        )
        self.engine_name = engine
        self.dom0_kernel, self.hardware = dom0_kernel, hardware
        self.wallclock_ns = int(wallclock * NS_PER_S)
        self.guests: list[Guest] = []
        self.modelled: list[ModelledGuest] = []
        self.on_fork: list[Callable[[], object]] = []  # called in a copy of this host, before its function
        self._closed = False
        self.has_dom0 = dom0
        if dom0:
            self._start_dom0(dom0_vcpus, _factory(dom0_kernel), hardware)

    def _start_dom0(self, vcpus: int, factory: KernelFactory, hardware: str | DeviceTable) -> None:
        domain = self.hypervisor.create_domain(0, privileged=True, vcpus=vcpus)
        self.dom0 = Kernel(domain, lambda kernel: factory(kernel, start_info=StartInfo(initial=True)))
        self.add_kernel(self.dom0)
        self.platform = platform.build(hardware, self.dom0)
        self.dom0.boot()
        self.daemons = Daemons(self.hypervisor, self.dom0)
        self.xenstored, self.store = self.daemons.xenstored, self.daemons.store

    # -- guests --------------------------------------------------------------------------------------------------------

    def boot(
        self, kernel: str | os.PathLike[str] | bytes | KernelImage, *, initrd: bytes | str | os.PathLike[str] = b"",
        append: str = "", memory: int = DEFAULT_MEMORY, vcpus: int = 1, maxvcpus: int = 0, name: str | None = None,
    ) -> Guest:  # fmt: skip
        """Build a guest that will start at its kernel's entry when the host next runs; `memory` in bytes.

        It has `maxvcpus` vCPUs (0: as many as `vcpus`), of which its kernel is to use the first `vcpus`: see
        `set_vcpus`.

        In a host without a modelled domain 0 it becomes domain 0, privileged; there can be only that one.

        ImageError or BuildError, one line, for a kernel, initrd or size that can't work; EngineError where the
        engine can't.
        """
        config = DomainConfig(
            name=name or "", kernel=_path(kernel), ramdisk=_path(initrd), cmdline=append, memory=memory, vcpus=vcpus,
            maxvcpus=maxvcpus or vcpus,
        )  # fmt: skip
        return self.create(config, kernel=kernel, initrd=initrd)

    def create(
        self, config: DomainConfig, *, kernel: str | os.PathLike[str] | bytes | KernelImage | None = None,
        initrd: bytes | str | os.PathLike[str] | None = None,
    ) -> Guest:  # fmt: skip
        """Build a guest with its devices as a configuration says (xl create); see `boot`, which this is the whole of.

        `kernel` and `initrd`, where given, are used for the files that `config` names. Bridges that its interfaces name
        must exist. Errors as of `boot`, `attach_disk` and `attach_nic`; nothing of the guest stays then.
        """
        kernel = config.kernel if kernel is None else kernel
        initrd = config.ramdisk if initrd is None else initrd
        image = kernel if isinstance(kernel, KernelImage) else load_image(kernel)
        data = initrd if isinstance(initrd, bytes) else _read_initrd(initrd)
        guest = self._new_guest(config, config.memory)
        try:
            guest.start(image, data, config.cmdline)
            self._attach_configured(guest)
        except BaseException:
            self.destroy(guest)
            raise
        return guest

    def _attach_configured(self, guest: Guest) -> None:
        """The devices that a guest's configuration has."""
        for disk in guest.config.disks:
            self._attach_disk(guest, disk)
        for number, vif in enumerate(guest.config.vifs):
            self._attach_nic(guest, vif, number if vif.devid is None else vif.devid)

    def _new_guest(self, config: DomainConfig, memory: int) -> Guest:
        """A domain with `memory` bytes, an engine, and nothing in it. BuildError, EngineError."""
        vcpus = config.maxvcpus or config.vcpus
        if not 1 <= config.vcpus <= vcpus:
            raise BuildError(f"{config.vcpus} of {vcpus} vCPUs")
        try:
            if self.has_dom0:
                domain = self.hypervisor.create_domain(vcpus=vcpus, max_evtchns=config.max_event_channels)
            else:
                domain = self.hypervisor.create_domain(0, privileged=True, vcpus=vcpus)
        except XenError as error:
            raise BuildError(error.why) from None
        try:
            machine = PvGuest(
                domain, memory, self.engine_name, wallclock_ns=self.wallclock_ns, max_memory_bytes=config.maxmem,
                repeatable=self.schedule is not None,
            )  # fmt: skip
        except EngineError:
            self.hypervisor.destroy_domain(domain)
            raise
        except XenError as error:
            self.hypervisor.destroy_domain(domain)
            raise BuildError(f"{memory // MIB} MiB of guest memory are more than this host has left") from error
        self.add_machine(machine)
        guest = Guest(self, domain, machine, config)
        self.guests.append(guest)
        return guest

    def save(self, guest: Guest, file: str | os.PathLike[str] | BinaryIO, *, checkpoint: bool = False) -> None:
        """Suspend a guest, write it to a file in xl's format and end it; with `checkpoint` it goes on (xl save [-c]).

        GuestError where it doesn't suspend, SaveError where its memory can't be understood, OSError. Then it goes on.
        """
        guest.suspend()
        try:
            saved = save.save(guest.machine)
            with savefile.replaced(file) as out:
                savefile.write(out, guest.config, saved)
        except BaseException:
            guest.resume()
            raise
        if checkpoint:
            guest.resume()
        else:
            self.destroy(guest)

    def restore(self, file: str | os.PathLike[str] | BinaryIO, *, name: str | None = None) -> Guest:
        """A guest from a file that `save` or a real `xl save` wrote, in a new domain; it goes on when the host runs.

        Its devices are attached anew, as its configuration says. SaveFileError, RestoreError, BuildError; OSError.
        """
        with _opened(file) as source:
            config, saved = savefile.read(source)
        if name is not None:
            config.name = name
        return self.revive(config, saved)

    def revive(self, config: DomainConfig, saved: SavedDomain) -> Guest:
        """`restore` of what has been read (`pvirq.toolstack.savefile.read`). Bridges that it names must exist."""
        guest = self._new_guest(config, len(saved.pfns) << PAGE_SHIFT)
        try:
            guest.revive(saved)
            self._attach_configured(guest)
        except BaseException:
            self.destroy(guest)
            raise
        return guest

    def fork(self, function: Callable[[Host], T], *, seed: int | Schedule | None = None) -> Fork[T]:
        """Run `function(host)` with a copy of this host, in a process of its own: one of its possible futures.

            futures = [host.fork(lambda host: stress(host.guests[0]), seed=seed) for seed in range(8)]
            results = [future.result() for future in futures]

        The copy is exact, costs milliseconds, and shares its memory until it is written. This host stands still
        meanwhile, or goes on: neither sees the other. What the function returns has to be picklable. `seed` gives a
        host that has a schedule another one. What a copy writes to a disk's image stays in it; it reads what others
        write there, so this host had better write nothing while it runs.

        ForkError where something can't be in two processes: qcow2 and other images that QEMU's server reads, and what
        connects a network with the outside.
        """
        if seed is not None and self.schedule is None:
            raise ValueError("only a host with a seed can have another")
        if self.outside:
            raise ForkError("a host with a connection to the outside (NAT, tap) can't be copied")
        stores = self.backends.stores() if "backends" in self.__dict__ else []
        if not all(getattr(store, "may_fork", True) for store in stores):
            raise ForkError("a disk that QEMU's server reads can't be copied: convert its image to raw")

        def prepare() -> None:
            for store in stores:
                if isinstance(store, InPlaceStore):
                    store.forked()
            for forked in self.on_fork:
                forked()
            if seed is not None and self.schedule is not None:
                listeners = [listener for listener in self.schedule.listeners if listener != self._note_choice]
                self.schedule = Schedule(seed) if isinstance(seed, int) else seed
                self.schedule.listeners += listeners

        return fork(lambda: function(self), prepare)

    def model(
        self, kernel: str | KernelFactory = "2.6.18", *, vcpus: int = 1, name: str | None = None
    ) -> ModelledGuest:
        """Build and boot a guest whose kernel is Python: a name of `pvirq.linux.personalities`, or a factory.

        Its drivers go on when the host next runs. KeyError for an unknown kernel, XenError(EINVAL) for a number of
        vCPUs that can't be; it needs the modelled domain 0 (RuntimeError).
        """
        if not self.has_dom0:
            raise RuntimeError("a modelled guest needs the modelled domain 0")
        factory = _factory(kernel)
        domain = self.hypervisor.create_domain(vcpus=vcpus, max_evtchns=toolstack.MAX_EVENT_CHANNELS)
        guest = ModelledGuest(self, domain, factory, name or f"guest{domain.domid}")
        self.add_kernel(guest.kernel)
        self.modelled.append(guest)
        guest.boot()
        return guest

    def wallclock(self) -> float:
        """The time of day in this host: Unix seconds."""
        return (self.wallclock_ns + self.clock.now()) / NS_PER_S

    @cached_property
    def backends(self) -> Backends:
        """Domain 0's block and network backends, its block devices and bridges. They start with their first use."""
        return Backends(self.dom0, self.daemons.xs, self.store, self.platform)

    def attach_disk(
        self, guest: Guest | ModelledGuest, vdev: str, device: str | os.PathLike[str] | BlockStore, *,
        readonly: bool = False, format: str = "", cache: str = "none",
    ) -> DeviceRef:  # fmt: skip
        """Give a guest a disk (xl block-attach): `vdev` is what it calls it, as "xvda".

        `device` is a block device of domain 0's by name, else the path of an image or block device here, or a store.
        An image's `format` is xl's: raw, or what QEMU reads (qcow2 and others); `cache` "writeback" loses what the
        guest didn't flush when its store `crash`es. An image that is opened here is locked, and closed when the disk
        goes.

        It connects as the host runs; a real guest's kernel needs its frontend driver for that. XenError(EEXIST),
        ValueError for a `vdev` that is none, and XenError as `diskimage.open_image` raises it.
        """
        named = os.fspath(device) if isinstance(device, (str, os.PathLike)) else ""
        disk = DiskConfig(named, vdev, format, readonly=readonly, cache=cache)
        ref = self._attach_disk(guest, disk, device)
        if not named:
            disk = replace(disk, target=self.store.read_text(f"{ref.backend}/params"))
        guest.config.disks.append(disk)
        return ref

    def _attach_disk(
        self, guest: Guest | ModelledGuest, disk: DiskConfig, device: str | os.PathLike[str] | BlockStore | None = None
    ) -> DeviceRef:
        return self.backends.attach_disk(
            guest.domain.domid, disk.vdev, device or disk.target, readonly=disk.readonly, format=disk.format,
            cache=disk.cache,
        )  # fmt: skip

    def detach_disk(self, guest: Guest | ModelledGuest, vdev: str, *, force: bool = False) -> Completion[None]:
        """Take a disk away (xl block-detach), done once both ends have closed; `force` doesn't wait for the guest.

        Another can have its name when the guest has seen it go.

        XenError(ENOENT): there is none.
        """
        done = self.backends.detach_disk(guest.domain.domid, vdev, force=force)
        guest.config.disks = [disk for disk in guest.config.disks if disk.vdev != vdev]
        return done

    def attach_nic(
        self, guest: Guest | ModelledGuest, *, devid: int = 0, mac: str = "", bridge: str = "xenbr0"
    ) -> DeviceRef:
        """Give a guest a network interface (xl network-attach) on a bridge of domain 0. XenError(EEXIST, ENODEV)."""
        vif = VifConfig(mac, bridge, devid)
        ref = self._attach_nic(guest, vif, devid)
        guest.config.vifs.append(vif)
        return ref

    def _attach_nic(self, guest: Guest | ModelledGuest, config: VifConfig, devid: int) -> DeviceRef:
        domid = guest.domain.domid
        if config.bridge not in self.backends.network.bridges:  # what the hotplug script would find, too late to say so
            raise XenError(Errno.ENODEV, f"Could not find bridge device {config.bridge}: Host.add_bridge makes it")
        mac = config.mac or f"00:16:3e:{domid >> 8 & 0xFF:02x}:{domid & 0xFF:02x}:{devid & 0xFF:02x}"
        self.backends.manager.attach_nic(domid, Nic(devid, mac, config.bridge, config.mtu))
        return DeviceRef(domid, "vif", devid)

    def detach_nic(self, guest: Guest | ModelledGuest, devid: int = 0, *, force: bool = False) -> Completion[None]:
        """Take a network interface away (xl network-detach); as `detach_disk`. XenError(ENOENT)."""
        done = self.backends.manager.detach(DeviceRef(guest.domain.domid, "vif", devid), force=force)
        numbered = [vif if vif.devid is not None else replace(vif, devid=i) for i, vif in enumerate(guest.config.vifs)]
        guest.config.vifs = [vif for vif in numbered if vif.devid != devid]
        return done

    # -- the ends of the network that are no domains -------------------------------------------------------------------

    def add_bridge(self, name: str = "xenbr0") -> Bridge:
        """Make a bridge in domain 0 (brctl addbr). XenError(EEXIST)."""
        return self.backends.network.add_bridge(name)

    def station(
        self, address: str = "10.0.0.1/24", *, bridge: str = "xenbr0", name: str = "", mac: str = "",
        dhcp: bool = True, gateway: str | None = None, names: Mapping[str, str] | None = None, domain: str = "",
    ) -> Station:  # fmt: skip
        """Put a station on a bridge, which is made if it isn't there; its options are `Station`'s.

        ValueError, XenError(EEXIST) for a `name` that another interface has.
        """
        from pvirq.net.station import Station  # here and below: not every host has one

        station = Station(
            name or self._interface_name("station"), self.clock, address,
            mac=mac, dhcp_server=dhcp, gateway=gateway, names=names, domain=domain,
        )  # fmt: skip
        self._put_on(bridge, station)
        return station

    def nat(
        self, address: str = "10.0.2.2/24", *, bridge: str = "xenbr0", name: str = "", dhcp: bool = True,
        services: Collection[int] | None = None, outbound: bool = False,
    ) -> Nat:  # fmt: skip
        """Put a gateway to the real loopback on a bridge, which is made if it isn't there; its options are `Nat`'s.

        One bridge needs but one DHCP server. OutsideError without libslirp or in a host with a seed, ValueError,
        XenError(EEXIST).
        """
        self._refuse_outside("NAT")
        from pvirq.net.nat import Nat

        nat = Nat(
            name or self._interface_name("nat"), self.backends.network, self.clock.now, address,
            dhcp_server=dhcp, services=services, outbound=outbound,
        )  # fmt: skip
        self._put_on(bridge, nat, nat)
        return nat

    def tap(self, name: str = "", *, bridge: str = "xenbr0") -> Tap:
        """Put a tap device of the real machine on a bridge, which is made if it isn't there.

        "" lets the kernel choose a name. OutsideError where it isn't permitted and in a host with a seed, ValueError,
        XenError(EEXIST).
        """
        self._refuse_outside("a tap device")
        from pvirq.net.tap import Tap

        tap = Tap(name, self.backends.network)
        self._put_on(bridge, tap, tap)
        return tap

    def _interface_name(self, kind: str) -> str:
        interfaces = self.backends.network.interfaces
        return next(name for i in range(len(interfaces) + 1) if (name := f"{kind}{i}") not in interfaces)

    def _refuse_outside(self, what: str) -> None:
        if self.schedule is not None:
            raise OutsideError(f"{what} can't be in a host with a seed: what comes from outside can't be repeated")

    def _put_on(self, bridge: str, interface: Interface, outsider: Outsider | None = None) -> None:
        network = self.backends.network
        network.need_bridge(bridge)
        try:
            network.add(interface, bridge)
        except XenError:
            if outsider is not None:
                outsider.close()
            raise
        if outsider is not None:
            self.outside.add(outsider)

    # -- what xl does to a guest that runs -----------------------------------------------------------------------------

    def pause(self, guest: Guest | ModelledGuest) -> None:
        """Let a guest's vCPUs run no more until `unpause` (xl pause). Its events and timers go on."""
        guest.domain.paused = True

    def unpause(self, guest: Guest | ModelledGuest) -> None:
        """Let a paused guest go on; nothing happens to one that has ended (xl unpause)."""
        domain = guest.domain
        if domain.shutdown_reason is None and not domain.dying:
            domain.unpause()

    def shutdown(
        self, guest: Guest | ModelledGuest, how: str = "poweroff", timeout: float | None = control.ACKNOWLEDGE_S
    ) -> None:
        """Ask a guest to end (xl shutdown, xl reboot): "poweroff", "reboot", "halt", "suspend".

        Runs the host until the guest's kernel has taken the request, `timeout` seconds at most; its end is then to be
        waited for. ControlError where it can't be asked or doesn't react, ValueError for another `how`.
        """
        unasked = isinstance(guest, Guest) and guest.restored
        request = control.ShutdownRequest(self.store, guest.domain.domid, guest.name, how, unasked=unasked)
        ended = guest.domain
        try:
            self.run(
                lambda: request.acknowledged or ended.shutdown_reason is not None,
                None if timeout is None else int(timeout * NS_PER_S),
            )
        except HostStuck:
            pass
        finally:
            request.close()
        if not request.acknowledged and ended.shutdown_reason is None:
            raise control.ControlError(f"{guest.name} didn't acknowledge the request ({how})")

    def sysrq(self, guest: Guest | ModelledGuest, key: str) -> None:
        """Send a guest's kernel a magic key (xl sysrq); it reacts as the host runs. ValueError, ControlError."""
        control.send_sysrq(self.store, guest.domain.domid, guest.name, key)

    def set_vcpus(self, guest: Guest | ModelledGuest, count: int) -> None:
        """Let a guest use its first `count` vCPUs (xl vcpu-set); its kernel brings them up or down as the host runs.

        ControlError for more than it has.
        """
        domain = guest.domain
        control.set_vcpus(self.store, domain.domid, guest.name, count, len(domain.vcpus))
        guest.config.vcpus = count

    def destroy(self, guest: Guest | ModelledGuest) -> None:
        """End a guest at once (xl destroy): both ends of its channels close, its memory is free."""
        if guest not in self.guests and guest not in self.modelled:
            return
        if "backends" in self.__dict__:
            self.backends.manager.detach_all(guest.domain.domid)
        if isinstance(guest, ModelledGuest):
            self._destroy_modelled(guest)
            return
        self.guests.remove(guest)
        guest.release()
        machine = self.remove_machine(guest.domain.domid)
        self.hypervisor.destroy_domain(guest.domain)
        machine.close()
        if self.has_dom0:
            evtchn.send_global_virq(self.hypervisor, VIRQ_DOM_EXC)

    def _destroy_modelled(self, guest: ModelledGuest) -> None:
        self.modelled.remove(guest)
        guest.release()
        self.remove_kernel(guest.domain)
        self.hypervisor.destroy_domain(guest.domain)
        evtchn.send_global_virq(self.hypervisor, VIRQ_DOM_EXC)

    # -- views ---------------------------------------------------------------------------------------------------------

    def debug_key(self, key: str) -> str:
        """What `xl debug-keys KEY` makes Xen print, "(XEN) " in front of each line.

        There are "e", event channels, and "i", interrupts. ValueError for another.
        """
        if key == "e":
            return evtchn_views.debug_e(self.hypervisor)
        if key == "i":
            return irq_views.debug_i(self.hypervisor)
        raise ValueError(f"no debug key {key!r} here; there are 'e', event channels, and 'i', interrupts")

    def lsevtchn(self, domid: int) -> str:
        """What `lsevtchn DOMID` prints. XenError(ESRCH) for a domain that isn't there."""
        domain = self.hypervisor.domains.get(domid)
        if domain is None:
            raise XenError(Errno.ESRCH, f"no domain {domid}")
        return evtchn_views.lsevtchn(domain)

    # -- ending --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free all guests and the host's memory; idempotent."""
        if not self._closed:
            self._closed = True
            self.outside.close()
            for guest in list(self.guests):
                self.destroy(guest)
            if "backends" in self.__dict__:
                self.backends.close()
            self.hypervisor.machine.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _factory(kernel: str | KernelFactory) -> KernelFactory:
    return personalities.find(kernel) if isinstance(kernel, str) else kernel


def _path(source: object) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""


def _opened(file: str | os.PathLike[str] | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """A file by name, to be closed; one that is open stays open."""
    if isinstance(file, (str, os.PathLike)):
        return open(file, "rb")
    return nullcontext(file)


def _read_initrd(path: str | os.PathLike[str]) -> bytes:
    if not os.fspath(path):
        return b""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BuildError(f"initrd {path}: {error.strerror}") from None
