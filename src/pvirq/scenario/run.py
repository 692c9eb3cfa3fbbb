"""A scenario as a running host: its domains and devices built, its workload carried out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from types import MappingProxyType, TracebackType
from typing import Any

from pvirq.drivers.blockstore import SECTOR, MemoryStore
from pvirq.drivers.xs import Xs
from pvirq.guest import HostStuck
from pvirq.hardware.device import Driver, HardwareError
from pvirq.host import Host
from pvirq.linux import personalities
from pvirq.linux.irq_map import irq_map
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, Completion, Kthread
from pvirq.linux.personalities import KernelFactory
from pvirq.modelled import CONNECT_NS, ModelledGuest
from pvirq.scenario.contents import Contents
from pvirq.scenario.fields import Unexpected
from pvirq.scenario.schema import Domain as DomainSpec
from pvirq.scenario.schema import Scenario, ScenarioError
from pvirq.scenario.toml_lines import Path
from pvirq.scenario.traffic import Traffic


class Member:
    """A domain of a running scenario. `guest` is None for domain 0."""

    def __init__(
        self, name: str, kernel: Kernel[Any], xs: Xs, guest: ModelledGuest | None = None,
        devices: Mapping[str, Driver] = MappingProxyType({}), spec: DomainSpec | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.devices = devices
        self.disks = [disk.name for disk in spec.disks] if spec else []
        self.vifs = spec.vifs if spec else []
        self.kernel = kernel
        self.domain = kernel.domain
        self.guest = guest
        self.xs = xs

    def connected(self) -> bool:
        """All devices of a guest are in use."""
        guest = self.guest
        return guest is None or (
            all(map(guest.has_disk, self.disks)) and all(map(guest.has_nic, range(len(self.vifs))))
        )


class Outside(Completion[None]):
    """Something outside all domains that goes on in virtual time: `steps` yields the ns until its next step."""

    def __init__(self, host: Host, steps: Iterator[int]) -> None:
        super().__init__()
        self._clock = host.clock
        self._steps = steps
        self._step()

    def _step(self) -> None:
        gap = next(self._steps, None)
        if gap is None:
            self.complete(None)
        else:
            self._clock.at(self._clock.now() + gap, self._step)


class Run:
    """One run of a scenario. Build it, `connect` it, `start` the workload, `run`; then look at `members` and `host`.

    Of what has begun of the workload `times` things are to be done, and `times_done` are. ScenarioError where something
    in the file can't be.
    """

    def __init__(
        self, scenario: Scenario, on_built: Callable[[], object] = lambda: None, *, host_seed: int | None = None
    ) -> None:
        """`on_built` is called after each domain's building and connecting, which can be many.

        `host_seed` is the host's own: what comes next where Xen leaves it open (`Host`).
        """
        self.scenario = scenario
        self._on_built = on_built
        self._host_seed = host_seed
        self.times_done = 0
        self.times = 0
        self._parts: list[Completion[Any]] = []
        self.contents = Contents()
        self.traffic = Traffic(self)
        try:
            self.host = self._host()
            try:
                dom0 = Member("dom0", self.host.dom0, self.host.daemons.xs, devices=self.host.platform.devices)
                self.members = {dom0.name: dom0}
                self._build()
            except BaseException:
                self.host.close()
                raise
        except Unexpected as error:
            raise scenario.source.error(error) from None

    def _host(self) -> Host:
        spec = self.scenario.dom0
        if spec.platform and spec.devices:
            raise Unexpected(("dom0", "device"), "expected either a platform or devices, not both")
        tables = [{key: value for key, value in device.items() if key is not None} for device in spec.devices]
        factory = self._factory(spec.kernel, spec.style, ("dom0",))
        try:
            return Host(
                dom0_kernel=factory, dom0_vcpus=spec.vcpus, hardware=tables or spec.platform or "none",
                seed=self._host_seed,
            )  # fmt: skip
        except HardwareError as error:
            if error.device < 0 or spec.platform:
                raise Unexpected(("dom0", "platform"), str(error)) from None
            raise Unexpected(("dom0", "device", error.device, error.key), str(error)) from None

    def _factory(self, kernel: str, style: str, path: Path) -> KernelFactory:
        if style == "source":
            return personalities.find(kernel)
        if kernel.startswith("pvops"):
            raise Unexpected(
                (*path, "style"), f'expected "source" for the kernel "{kernel}": the write-up has none such'
            )
        options = {"style": style}
        return personalities.find(kernel, **options, **({"timer_first": True} if kernel == "2.6.18" else {}))

    def _build(self) -> None:
        for i, spec in enumerate(self.scenario.domains):
            factory = self._factory(spec.kernel, spec.style, ("domain", i))
            for number in range(1, spec.count + 1):
                name = spec.name if spec.count == 1 else f"{spec.name}-{number}"
                guest = self.host.model(factory, vcpus=spec.vcpus, name=name)
                self.members[name] = Member(name, guest.kernel, guest.xs, guest, spec=spec)
                self.host.pause(guest)
                self._attach(guest, spec, ("domain", i))
                self._on_built()

    def _attach(self, guest: ModelledGuest, spec: DomainSpec, path: Path) -> None:
        backends, domid = self.host.backends, guest.domain.domid
        for j, disk in enumerate(spec.disks):
            where: Path = (*path, "disk", j)
            if disk.on == "memory":
                device = f"/dev/loop{domid}-{j}"
                backends.devices.add(device, MemoryStore(disk.size // SECTOR))
            else:
                device = f"/dev/{disk.on}"
                if backends.devices.number(device) is None:
                    known = ", ".join(name.removeprefix("/dev/") for name in backends.devices.names()) or "none"
                    raise Unexpected((*where, "on"), f'expected "memory" or a disk of dom0: {known}')
            try:
                self.host.attach_disk(guest, disk.name, device, readonly=disk.readonly)
            except ValueError as error:
                raise Unexpected((*where, "name"), str(error)) from None
        for j, vif in enumerate(spec.vifs):
            backends.network.need_bridge(vif.bridge)
            self.host.attach_nic(guest, devid=j, mac=vif.mac, bridge=vif.bridge)

    # What workloads call.

    def thread(self, member: Member, name: str, body: Body[Any], cpu: int) -> None:
        """Run a thread of the workload in a domain."""
        self._parts.append(Kthread(member.kernel, name, body, cpu))

    def outside(self, steps: Iterator[int]) -> None:
        """Run something of the workload outside all domains."""
        self._parts.append(Outside(self.host, steps))

    # Going on.

    def connect(self) -> None:
        """Let the guests go until their devices are connected; the workload has not begun. Once is enough."""
        for member in self.members.values():
            if member.guest is not None and member.domain.paused:
                # One after the other, as xl creates them: that decides domain 0's IRQ numbers.
                self.host.unpause(member.guest)
                with suppress(HostStuck):  # a device that can't connect: the kernels' logs say why
                    self.host.run(member.connected, CONNECT_NS)
                self._on_built()

    def start(self) -> None:
        """Set the workload off."""
        self.connect()
        scenario = self.scenario
        self.host.clock.at(scenario.duration, lambda: None)  # something to wait for, where all is done before
        try:
            for i, workload in enumerate(scenario.workload):
                found = list(dict.fromkeys(member for on in workload.on for member in self.find(on)))
                if not found:
                    raise Unexpected(
                        (*workload.path, "on"), f"expected domains of this scenario, not {', '.join(workload.on)}"
                    )
                for member in found:
                    workload.start_on(self, member, random.Random(f"{scenario.seed}/{i}/{member.name}"))
        except Unexpected as error:
            raise scenario.source.error(error) from None

    @property
    def done(self) -> bool:
        """The workload is done, the scenario's time is over, and no domain has anything left to do."""
        return (
            self.host.quiet
            and self.host.clock.now() >= self.scenario.duration
            and all(part.done for part in self._parts)
        )

    def run(self, until_ns: int | None = None) -> bool:
        """Go on until the workload is `done`: True; or until virtual time is `until_ns`: False."""
        clock = self.host.clock
        try:
            self.host.run(lambda: self.done, None if until_ns is None else max(until_ns - clock.now(), 0))
        except HostStuck:
            raise ScenarioError(
                f"{self.scenario.source.file}: nothing can happen any more, and the workload isn't done"
            ) from None
        except Unexpected as error:
            raise self.scenario.source.error(error) from None
        return self.done

    # What there is to see.

    def find(self, name: str) -> list[Member]:
        """The domains that a name or pattern means."""
        return [member for known, member in self.members.items() if fnmatchcase(known, name)]

    def view(self, view: str, member: Member) -> str:
        """A domain's "interrupts", "lsevtchn", "map" or "dmesg"."""
        if view == "lsevtchn":
            return self.host.lsevtchn(member.domain.domid)
        if view == "dmesg":
            return "".join(f"{line}\n" for line in member.kernel.log)
        return irq_map(member.kernel) if view == "map" else str(member.kernel.proc_interrupts())

    def close(self) -> None:
        """Free everything; idempotent."""
        self.host.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
