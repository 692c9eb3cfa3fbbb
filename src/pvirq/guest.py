"""A running guest as a program sees it: its console, commands run in it, its interrupts and its end."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pvirq.abi.sched import (
    SHUTDOWN_crash,
    SHUTDOWN_poweroff,
    SHUTDOWN_reboot,
    SHUTDOWN_soft_reset,
    SHUTDOWN_suspend,
    SHUTDOWN_watchdog,
)
from pvirq.drivers.console import Console, note_input
from pvirq.pv import builder, restore
from pvirq.pv.guest import PvGuest
from pvirq.pv.image import ImageError, KernelImage, load_image
from pvirq.pv.save import SavedDomain
from pvirq.toolstack import domain as toolstack
from pvirq.toolstack.config import DomainConfig
from pvirq.toolstack.control import ControlError
from pvirq.toolstack.daemons import Ends
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain
from pvirq.xen.memory import PGT_WRITABLE
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.host import Host

SHUTDOWN_NAMES: Final = {
    SHUTDOWN_poweroff: "poweroff",
    SHUTDOWN_reboot: "reboot",
    SHUTDOWN_suspend: "suspend",
    SHUTDOWN_crash: "crash",
    SHUTDOWN_watchdog: "watchdog",
    SHUTDOWN_soft_reset: "soft_reset",
}
AGENT_READY: Final = b"\x1epvirq ready\n"
DEFAULT_TIMEOUT: Final = 60.0


class HostStuck(Exception):
    """Nothing can happen any more: every vCPU waits for an event that no timer and nobody outside will send."""


class GuestError(Exception):
    """A guest ended, or didn't answer in time, while something was wanted of it. One line."""


class GuestCrashed(GuestError):
    """The guest crashed."""


class GuestTimeout(GuestError):
    """So many seconds of the guest's time passed without what was waited for."""


@dataclass(frozen=True)
class CommandResult:
    """What a command in the guest printed (standard output and error together) and its exit status."""

    stdout: bytes
    status: int

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")


class Guest:
    """One guest of a host. Made by `Host.boot`; gone with `Host.destroy` or the host.

    All times are seconds of the guest's own clock, which runs with the real one while the guest works and
    jumps ahead while it sleeps.
    """

    def __init__(self, host: Host, domain: Domain, machine: PvGuest, config: DomainConfig) -> None:
        """A name and a uuid that `config` lacks are made up, and written into it."""
        self.host = host
        self.domain = domain
        self.machine = machine
        self.config = config
        config.name = config.name or f"guest{domain.domid}"
        config.uuid = config.uuid or str(uuid.uuid5(uuid.NAMESPACE_OID, f"pvirq/{config.name}/{domain.domid}"))
        domain.label.name, domain.label.kind = config.name, "real"
        domain.label.kernel = "/".join(Path(config.kernel).parts[-2:])  # where files are kept is no part of a run
        self.image: KernelImage | None = None
        self.console = Console()
        self.console.on_input = partial(note_input, domain)
        self._dom0_ports: Ends | None = None
        self._waiting_for_agent = True
        self._commands = 0
        self.restored = False  # from a file, not booted

    # -- coming and going ----------------------------------------------------------------------------------------------

    def start(self, image: KernelImage, initrd: bytes, append: str) -> None:
        """Build the domain, and connect it to domain 0 where it isn't that itself (as `xl create` does)."""
        self.image = image
        self.machine.on_console_io = self.console.put_direct
        if not self.domain.domid:
            builder.build(self.machine, image, initrd, append)
            self._runs(lambda: image)
            return
        self._open_ports()
        layout = builder.build(self.machine, image, initrd, append)
        self._runs(lambda: image)
        self._connect(self.machine.mfn(layout.xenstore), self.machine.mfn(layout.console))

    def revive(self, saved: SavedDomain) -> None:
        """Fill the domain with one that was saved, and connect it (as `xl restore` does). RestoreError."""
        self.machine.on_console_io = self.console.put_direct
        self.restored = True
        self._open_ports()
        rings = restore.restore(self.machine, saved)
        self._runs(self.kernel_file)
        self._connect(rings.store_mfn, rings.console_mfn)
        self._waiting_for_agent = False  # who has one has said so long ago

    def _runs(self, image: Callable[[], KernelImage | None]) -> None:
        """There is a kernel in it now."""
        self.machine.kernel_image = image
        self.host.hypervisor.probes.refresh()

    def kernel_file(self) -> KernelImage | None:
        """What is in the file that its configuration has for a kernel, if it is still there."""
        try:
            return load_image(self.config.kernel) if self.config.kernel else None
        except ImageError:
            return None

    def _open_ports(self) -> None:
        """In this order, for the guest's ports are 1 and 2."""
        dom0, machine = self.host.dom0.domain, self.machine
        machine.store_port = evtchn.alloc_unbound(dom0, self.domain.domid, 0)
        machine.console_port = evtchn.alloc_unbound(dom0, self.domain.domid, 0)
        machine.uuid = uuid.UUID(self.uuid).bytes

    def _connect(self, store_mfn: int, console_mfn: int) -> None:
        """Tell xenstore of the guest, and give the daemons of domain 0 their ends of its rings."""
        host, domain, machine, config = self.host, self.domain, self.machine, self.config
        # Domain 0 has them mapped for as long as the guest lives: given back, they must not become another guest's.
        for mfn in (store_mfn, console_mfn):
            machine.tables.get_type(mfn, PGT_WRITABLE)
        self._dom0_ports = host.daemons.connect(
            domain,
            self.console,
            toolstack.DomainInfo(
                domain.domid, config.name, machine.frames * 4, len(domain.vcpus), config.vcpus, machine.store_port,
                store_mfn, machine.console_port, console_mfn, kernel=config.kernel, ramdisk=config.ramdisk,
                cmdline=config.cmdline, uuid=config.uuid, start_time=host.wallclock(), restored=self.restored,
            ),
        )  # fmt: skip

    def suspend(self, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """Ask the guest to suspend itself, and wait until it has: only `resume` or its end can follow.

        GuestError where its kernel doesn't take such requests or ends otherwise, GuestTimeout.
        """
        try:
            self.host.shutdown(self, "suspend", timeout)
        except ControlError as error:
            raise GuestError(str(error)) from None
        limit = None if timeout is None else int(timeout * NS_PER_S)
        if not self.host.run(lambda: self.ended, limit):
            raise GuestTimeout(f"{timeout:g} s of guest time passed; waiting for {self.name} to suspend")
        if self.shutdown_reason != "suspend":
            raise GuestError(f"{self.name} ended ({self.shutdown_reason}) when it was to suspend")

    def resume(self) -> None:
        """Let a suspended guest go on where it is, as if its suspending had been cancelled (xc_domain_resume, fast).

        Its channels, grants and devices are what they were. GuestError for one that isn't suspended.
        """
        if self.shutdown_reason != "suspend":
            raise GuestError(f"{self.name} is not suspended")
        self.machine.return_from_suspend(cancelled=True)
        self.domain.resume()
        self.host.xenstored.resume(self.domain.domid)

    def release(self) -> None:
        """Take back what domain 0 holds of the guest; `Host.destroy` calls this."""
        ports, self._dom0_ports = self._dom0_ports, None
        host = self.host
        if ports is not None:
            self.console.service()
            host.daemons.disconnect(self.domain, ports)
        self.console.close()
        if self.domain.domid:
            toolstack.remove_domain(host.store, self.domain.domid, self.uuid)

    @property
    def name(self) -> str:
        """What the toolstack calls it."""
        return self.config.name

    @property
    def uuid(self) -> str:
        """Its uuid, as text."""
        return self.config.uuid

    @property
    def ended(self) -> bool:
        """The guest has shut down or crashed."""
        return self.domain.shutdown_reason is not None

    @property
    def shutdown_reason(self) -> str | None:
        """poweroff, reboot, suspend, crash, watchdog or soft_reset; None while the guest runs."""
        reason = self.domain.shutdown_reason
        return None if reason is None else SHUTDOWN_NAMES.get(reason, f"reason {reason}")

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _run(self, until: Callable[[], bool], timeout: float | None, what: str) -> None:
        """Run the host until `until()`; an end of the guest or the timeout before that is an error."""
        limit = None if timeout is None else int(timeout * NS_PER_S)
        try:
            done = self.host.run(lambda: until() or self.ended, limit)
        except HostStuck:
            raise GuestTimeout(f"{self.name} sleeps for ever; waiting for {what}") from None
        if self.ended:
            self.console.service()  # its last words: nobody may have read them since
        if until():
            return
        if not done:
            raise GuestTimeout(f"{timeout:g} s of guest time passed; waiting for {what}")
        if self.shutdown_reason in ("crash", "watchdog"):
            raise GuestCrashed(f"{self.name} crashed{f': {self.machine.crash}' if self.machine.crash else ''}")
        raise GuestError(f"{self.name} ended ({self.shutdown_reason}); waiting for {what}")

    def wait_for(self, text: str | bytes, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """Run until `text` appears on the console, or has already (within the output that is kept)."""
        wanted = text.encode() if isinstance(text, str) else text
        self._run(lambda: wanted in self.console.output, timeout, f"{wanted.decode('utf-8', 'replace')!r}")

    def wait(self, timeout: float | None = DEFAULT_TIMEOUT) -> str:
        """Run until the guest ends, and return its `shutdown_reason`."""
        self._run(lambda: self.ended, timeout, "its end")
        assert self.shutdown_reason is not None
        return self.shutdown_reason

    # -- commands ------------------------------------------------------------------------------------------------------

    def run(
        self,
        command: str,
        timeout: float | None = DEFAULT_TIMEOUT,
        on_output: Callable[[bytes], None] | None = None,
    ) -> CommandResult:
        """Run a shell command in the guest, whose initrd has pvirq's agent, and wait for its end.

        `on_output` gets its output in pieces, as it comes. GuestTimeout, GuestCrashed or GuestError where the
        command doesn't end.
        """
        self.await_agent(timeout)
        self._commands += 1
        nonce = f"pvirq{self._commands}"
        receiver = _Receiver(nonce.encode(), on_output)
        remove = self.console.on_output(receiver.feed)
        try:
            line = base64.b64encode(command.encode("utf-8", "surrogateescape")).decode()
            self.console.send(f"{nonce} {line}\n".encode())
            self._run(lambda: receiver.status is not None, timeout, f"the end of {command!r}")
        finally:
            remove()
        assert receiver.status is not None
        return CommandResult(bytes(receiver.output), receiver.status)

    def await_agent(self, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """Run until the agent in the guest's initrd takes commands, which `run` and `poweroff` do by themselves."""
        if self._waiting_for_agent:
            self._run(lambda: AGENT_READY in self.console.output, timeout, "the agent in the guest's initrd")
            self._waiting_for_agent = False

    def poweroff(self, timeout: float | None = DEFAULT_TIMEOUT) -> str:
        """Tell the agent to power the guest off, and wait for it."""
        self.await_agent(timeout)
        self.console.send(b"poweroff\n")
        return self.wait(timeout)

    def proc_interrupts(self) -> str:
        """The guest's own /proc/interrupts, read in the guest."""
        return self.run("cat /proc/interrupts").text


class _Receiver:
    """Picks one command's output out of the console's: what stands between its begin and end marks."""

    def __init__(self, nonce: bytes, on_output: Callable[[bytes], None] | None) -> None:
        self._begin = b"\x1e" + nonce + b" begin\n"
        self._end = b"\x1e" + nonce + b" end "
        self._on_output = on_output
        self._pending = bytearray()
        self._begun = False
        self.output = bytearray()
        self.status: int | None = None

    def feed(self, data: bytes) -> None:
        if self.status is not None:
            return
        self._pending += data
        if not self._begun:
            at = self._pending.find(self._begin)
            if at < 0:
                return
            self._begun = True
            del self._pending[: at + len(self._begin)]
        at = self._pending.find(self._end)
        if at < 0:
            # The last bytes may be the start of the end mark.
            at = len(self._pending)
            keep = self._pending.rfind(b"\x1e")
            if keep >= 0 and self._end.startswith(self._pending[keep : keep + len(self._end)]):
                at = keep
            self._take(at)
            return
        stop = self._pending.find(b"\n", at)
        if stop < 0:
            self._take(at)
            return
        number = bytes(self._pending[at + len(self._end) : stop])
        self._take(at)
        self.status = int(number) if number.isdigit() else 255

    def _take(self, size: int) -> None:
        piece = bytes(self._pending[:size])
        del self._pending[:size]
        self.output += piece
        if piece and self._on_output is not None:
            self._on_output(piece)
