"""A host: the hypervisor, domain 0, the guests, and the one loop that runs them all.

with pvirq.Host() as host:
    guest = host.boot("vmlinuz", exec_agent=True)
    print(guest.run("cat /proc/interrupts").stdout.decode())
    print(host.dom0.proc_interrupts())
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import VIRQ_DOM_EXC
from pvirq.engine import DEFAULT_ENGINE, EngineError
from pvirq.guest import Guest, HostStuck
from pvirq.hardware import platform
from pvirq.hardware.platform import DeviceTable
from pvirq.linux import personalities
from pvirq.linux.kernel import Kernel
from pvirq.linux.personalities import KernelFactory
from pvirq.linux.personality import Personality, StartInfo
from pvirq.modelled import ModelledGuest
from pvirq.pv.builder import BuildError
from pvirq.pv.guest import PvGuest
from pvirq.pv.image import KernelImage, load_image
from pvirq.toolstack import domain as toolstack
from pvirq.toolstack.backends import Backends
from pvirq.toolstack.daemons import Daemons
from pvirq.toolstack.devices import DeviceRef, Disk, Nic
from pvirq.xen import evtchn, evtchn_views, irq_views
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.memory import Machine
from pvirq.xen.timer import NS_PER_S, Clock

MIB: Final = 1 << 20
DEFAULT_MEMORY: Final = 256 * MIB
# How long a vCPU runs while another of the host could.
SLICE_NS: Final = 5_000_000
# How long it still runs when it, or domain 0 on its behalf, has woken another. Who sends an event mostly holds a lock
# just then that the receiver wants, and the one would be stopped while the other spins for it: Linux spins 32768 times
# before it asks Xen to wait (SPIN_THRESHOLD), which takes 3 ms here.
GRACE_NS: Final = 200_000
FOREVER: Final = 1 << 62


class Host:
    """One host in this process; several may exist side by side, each used from one thread at a time.

    `idle`, where set, is called instead of jumping over time in which every vCPU sleeps: with the ns until the
    next timer (None: no timer), it returns how many ns to let pass. An interactive console waits there for its
    user, in real time. `on_turn`, where set, is called before each turn of the loop, which is every 50 ms at least
    while a guest works; what it raises ends `run`.
    """

    def __init__(
        self, *, engine: str = DEFAULT_ENGINE, dom0_vcpus: int = 2, dom0: bool = True,
        dom0_kernel: str | KernelFactory = "pvops", hardware: str | DeviceTable = "none", wallclock: float = 0,
        machine_memory: int = 16 << 30,
    ) -> None:  # fmt: skip
        """`wallclock` is the time of day (Unix seconds) at which virtual time begins; `machine_memory` in bytes.

        `dom0_kernel` is what the modelled domain 0 runs: a name of `pvirq.linux.personalities`, or a factory, and
        `hardware` what it has for devices: a machine of `pvirq.hardware.platform`, or a table of devices
        (HardwareError). With `dom0` false there is no such domain: the kernel that is booted then is domain 0 itself.
        """
        self.engine_name = engine
        self.hypervisor = Hypervisor(Machine(machine_memory), Clock())
        self.clock = self.hypervisor.clock
        self.wallclock_ns = int(wallclock * NS_PER_S)
        self.guests: list[Guest] = []
        self.modelled: list[ModelledGuest] = []
        self.idle: Callable[[int | None], int] | None = None
        self.on_turn: Callable[[], None] | None = None
        self._machines: dict[int, PvGuest] = {}  # of real guests
        self._kernels: dict[int, Kernel[Personality]] = {}  # of modelled domains
        self._woken: dict[Vcpu, None] = {}  # vCPUs of those that may have something to do; an ordered set
        self._running: PvGuest | None = None
        self._running_vcpu: Vcpu | None = None
        self._last: Vcpu | None = None
        self._slice_end = 0  # of the vCPU that ran last, in ns
        self._closed = False
        self._clocked = False
        self.hypervisor.on_wake = self._wake
        self.hypervisor.on_shutdown = self._shut_down
        self.clock.on_earlier = self._earlier_deadline
        self.has_dom0 = dom0
        if dom0:
            self._start_dom0(dom0_vcpus, _factory(dom0_kernel), hardware)

    def _start_dom0(self, vcpus: int, factory: KernelFactory, hardware: str | DeviceTable) -> None:
        domain = self.hypervisor.create_domain(0, privileged=True, vcpus=vcpus)
        self.dom0 = Kernel(domain, lambda kernel: factory(kernel, start_info=StartInfo(initial=True)))
        self._kernels[0] = self.dom0
        self.platform = platform.build(hardware, self.dom0)
        self.dom0.boot()
        self.daemons = Daemons(self.hypervisor, self.dom0)
        self.xenstored, self.store = self.daemons.xenstored, self.daemons.store

    # -- guests --------------------------------------------------------------------------------------------------------

    def boot(
        self, kernel: str | os.PathLike[str] | bytes | KernelImage, *, initrd: bytes | str | os.PathLike[str] = b"",
        append: str = "", memory: int = DEFAULT_MEMORY, vcpus: int = 1, name: str | None = None,
    ) -> Guest:  # fmt: skip
        """Build a guest that will start at its kernel's entry when the host next runs; `memory` in bytes.

        In a host without a modelled domain 0 it becomes domain 0, privileged; there can be only that one.

        ImageError or BuildError, one line, for a kernel, initrd or size that can't work; EngineError where the
        engine can't.
        """
        image = kernel if isinstance(kernel, KernelImage) else load_image(kernel)
        data = initrd if isinstance(initrd, bytes) else _read_initrd(Path(initrd))
        try:
            if self.has_dom0:
                domain = self.hypervisor.create_domain(vcpus=vcpus, max_evtchns=toolstack.MAX_EVENT_CHANNELS)
            else:
                domain = self.hypervisor.create_domain(0, privileged=True, vcpus=vcpus)
        except XenError as error:
            raise BuildError(error.why) from None
        try:
            machine = PvGuest(domain, memory, self.engine_name, wallclock_ns=self.wallclock_ns)
        except EngineError:
            self.hypervisor.destroy_domain(domain)
            raise
        except XenError as error:
            self.hypervisor.destroy_domain(domain)
            raise BuildError(f"{memory // MIB} MiB of guest memory are more than this host has left") from error
        self._machines[domain.domid] = machine
        if not self._clocked:
            self._clocked = True
            self.clock.set_counter(machine.engine.counter, machine.engine.counter_hz())
        self.clock.on_offset(machine.engine.set_tsc_offset)
        guest = Guest(self, domain, machine, name or f"guest{domain.domid}")
        self.guests.append(guest)
        try:
            guest.start(image, data, append)
        except BaseException:
            self.destroy(guest)
            raise
        return guest

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
        self._kernels[domain.domid] = guest.kernel
        self.modelled.append(guest)
        guest.boot()
        return guest

    @cached_property
    def backends(self) -> Backends:
        """Domain 0's block and network backends, its block devices and bridges. They start with their first use."""
        return Backends(self.dom0, self.daemons.xs, self.store, self.platform)

    def attach_disk(self, guest: Guest | ModelledGuest, vdev: str, device: str, *, readonly: bool = False) -> DeviceRef:
        """Give a guest a disk (xl block-attach): `vdev` is what it calls it, as "xvda", `device` one of domain 0's.

        It connects as the host runs; a real guest's kernel needs its frontend driver for that. XenError(EEXIST),
        ValueError for a `vdev` that is none.
        """
        disk = Disk(vdev, device, readonly)
        self.backends.manager.attach_disk(guest.domain.domid, disk)
        return DeviceRef(guest.domain.domid, "vbd", disk.devid)

    def attach_nic(
        self, guest: Guest | ModelledGuest, *, devid: int = 0, mac: str = "", bridge: str = "xenbr0"
    ) -> DeviceRef:
        """Give a guest a network interface (xl network-attach) on a bridge of domain 0. XenError(EEXIST)."""
        domid = guest.domain.domid
        mac = mac or f"00:16:3e:{domid >> 8 & 0xFF:02x}:{domid & 0xFF:02x}:{devid & 0xFF:02x}"
        self.backends.manager.attach_nic(domid, Nic(devid, mac, bridge))
        return DeviceRef(domid, "vif", devid)

    def pause(self, guest: Guest | ModelledGuest) -> None:
        """Let a guest's vCPUs run no more until `unpause` (xl pause). Its events and timers go on."""
        guest.domain.paused = True

    def unpause(self, guest: Guest | ModelledGuest) -> None:
        """Let a paused guest go on; nothing happens to one that has ended (xl unpause)."""
        domain = guest.domain
        if domain.shutdown_reason is None and not domain.dying:
            domain.paused = False
            for vcpu in domain.vcpus:
                if vcpu.runnable:
                    self._wake(vcpu)  # what woke it while it was paused was in vain

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
        self._last = None
        guest.release()
        machine = self._machines.pop(guest.domain.domid)
        self.clock.remove_offset(machine.engine.set_tsc_offset)
        self.hypervisor.destroy_domain(guest.domain)
        if not self._machines:
            self.clock.stop()
            self.clock.detach_counter()
            self._clocked = False
        elif self.clock.is_counter(machine.engine.counter):
            self.clock.replace_counter(next(iter(self._machines.values())).engine.counter)
        machine.close()
        if self.has_dom0:
            evtchn.send_global_virq(self.hypervisor, VIRQ_DOM_EXC)

    def _destroy_modelled(self, guest: ModelledGuest) -> None:
        self.modelled.remove(guest)
        guest.release()
        del self._kernels[guest.domain.domid]
        self._woken = {vcpu: None for vcpu in self._woken if vcpu.domain is not guest.domain}
        self.hypervisor.destroy_domain(guest.domain)
        evtchn.send_global_virq(self.hypervisor, VIRQ_DOM_EXC)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _wake(self, vcpu: Vcpu) -> None:
        domid = vcpu.domain.domid
        if domid in self._kernels:
            self._woken[vcpu] = None
            if self._running is not None:
                self._running.engine.stop()  # a modelled one takes no time, and has its turn at once
        elif (machine := self._machines.get(domid)) is not None:
            machine.woken(vcpu)
            if vcpu is not self._running_vcpu:
                self._slice_end = min(self._slice_end, self.clock.now() + GRACE_NS)
                if self._running is not None:
                    self._running.engine.stop_at = self.clock.counter_at(self._turn_end())

    def _shut_down(self, domain: Domain) -> None:
        if self._running is not None:
            self._running.engine.stop()
        if self.has_dom0:
            evtchn.send_global_virq(self.hypervisor, VIRQ_DOM_EXC)

    def _earlier_deadline(self, when: int) -> None:
        if self._running is not None:
            self._running.engine.stop_at = self.clock.counter_at(self._turn_end())
            if when <= self.clock.now():
                # Due at once: it fires before another instruction of the guest's, as Xen's timer softirq does.
                self._running.engine.stop()

    def run(self, until: Callable[[], bool], timeout_ns: int | None = None) -> bool:
        """Run all domains until `until()` holds: True; or until `timeout_ns` of virtual time have passed: False.

        HostStuck where neither can come about any more.
        """
        clock = self.clock
        limit = None if timeout_ns is None else clock.now() + timeout_ns
        timer = None if limit is None else clock.at(limit, lambda: None)
        clock.start()
        try:
            while True:
                clock.fire_due()
                if self.on_turn is not None:
                    self.on_turn()
                if until():
                    return True
                if limit is not None and clock.now() >= limit:
                    return False
                if not self._step():
                    self._pass_time()
        finally:
            clock.stop()
            if timer is not None:
                timer.cancel()

    @property
    def quiet(self) -> bool:
        """No domain has anything to do before the next timer."""
        return not self._woken and not any(
            vcpu.runnable for machine in self._machines.values() for vcpu in machine.domain.vcpus
        )

    def _step(self) -> bool:
        """Give the modelled vCPUs that were woken a turn, else the next runnable one of a real guest.

        False where none is runnable.
        """
        if self._woken:
            # Those that these wake in turn come next time: `until` and the clock are looked at in between.
            woken, self._woken = self._woken, {}
            kernels = self._kernels
            for vcpu in woken:
                domain = vcpu.domain
                if not vcpu.blocked and vcpu.up and not vcpu.polling and not domain.paused:  # vcpu.runnable
                    kernels[domain.domid].run(vcpu)
            return True
        ready = [vcpu for machine in self._machines.values() for vcpu in machine.domain.vcpus if vcpu.runnable]
        if not ready:
            return False
        now = self.clock.now()
        # Who was stopped for domain 0's sake, or let another become ready, goes on until its time is up.
        if now >= self._slice_end or not any(vcpu is self._last for vcpu in ready):
            self._last = _behind(self._last, ready)
            self._slice_end = FOREVER
        self._slice_end = FOREVER if len(ready) == 1 else min(self._slice_end, now + SLICE_NS)
        assert self._last is not None
        self._run_vcpu(self._last)
        return True

    def _turn_end(self) -> int:
        """When the turn of the vCPU that runs is over, in ns."""
        deadline = self.clock.next_deadline()
        return self._slice_end if deadline is None else min(self._slice_end, deadline)

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        clock = self.clock
        until = self._turn_end()
        self._running, self._running_vcpu = self._machines[vcpu.domain.domid], vcpu
        try:
            self._running.run(vcpu, None if until == FOREVER else clock.counter_at(until))
        finally:
            self._running = self._running_vcpu = None

    def _pass_time(self) -> None:
        """Every vCPU sleeps: on to the next timer."""
        clock = self.clock
        deadline = clock.next_deadline()
        if self.idle is not None:
            now = clock.now()
            clock.stop()
            passed = self.idle(None if deadline is None else max(deadline - now, 0))
            clock.start()
            clock.jump_to(now + passed)
        elif deadline is None:
            raise HostStuck("every vCPU waits for an event, and no timer is set")
        else:
            clock.jump_to(deadline)

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
            for guest in list(self.guests):
                self.destroy(guest)
            self.hypervisor.machine.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _behind(last: Vcpu | None, ready: list[Vcpu]) -> Vcpu:
    """The next one in turn: `ready` is in the order of domains and vCPUs, and after its last comes its first."""
    if last is not None:
        place = last.domain.domid, last.vcpu_id
        for vcpu in ready:
            if (vcpu.domain.domid, vcpu.vcpu_id) > place:
                return vcpu
    return ready[0]


def _factory(kernel: str | KernelFactory) -> KernelFactory:
    return personalities.find(kernel) if isinstance(kernel, str) else kernel


def _read_initrd(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"initrd {path}: {error.strerror}") from None
