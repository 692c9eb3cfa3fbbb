"""One run of `pvirq boot`: build the guest, let it run, and turn its end into an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from pvirq import crash
from pvirq.abi.errno import XenError
from pvirq.cli.messages import Messages
from pvirq.cli.terminal import (
    ConsoleInput,
    Interrupted,
    Interrupts,
    Left,
    Newlines,
    OutputClosed,
    raw_terminal,
    terminal_size,
)
from pvirq.cli.tracing import traced
from pvirq.engine import EngineError
from pvirq.guest import Guest, GuestCrashed, GuestError, GuestTimeout, HostStuck
from pvirq.host import Host
from pvirq.lab.faults import Faults
from pvirq.pv.symbols import symbols_for
from pvirq.toolstack import images, savefile, xlcfg
from pvirq.toolstack.config import Action, DomainConfig
from pvirq.toolstack.xlcfg import ConfigError
from pvirq.xen.timer import NS_PER_S

T = TypeVar("T")

EXIT_ENDED: Final = 1
EXIT_CRASHED: Final = 3
EXIT_TIMEOUT: Final = 4
EXEC_TIMEOUT: Final = 300.0
SEEDED_WALLCLOCK: Final = 946_684_800.0  # 2000-01-01
# The command has ended; whether its guest then powers off in time changes nothing.
POWEROFF_TIMEOUT: Final = 5.0


@dataclass(frozen=True)
class Guests:
    """What `pvirq boot` is told about the guest; None and empty: nothing. `memory` in bytes."""

    kernel: str | None
    initrd: str | None
    append: str
    memory: int | None
    vcpus: int | None
    disks: tuple[str, ...]
    vifs: tuple[str, ...]
    nat: bool
    dom0: bool


@dataclass(frozen=True)
class Watch:
    """What is to be done with a guest that runs, and shown at its end; `timeout` in seconds of the guest's clock."""

    command: str | None
    shell: bool
    save: str | None
    dom0_interrupts: bool
    lsevtchn: tuple[int, ...]
    debug_key: tuple[str, ...]
    xenstore: bool
    faults: tuple[str, ...]
    seed: int | None
    timeout: float | None
    engine: str
    trace: str | None
    verbose: bool

    @property
    def wallclock(self) -> float:
        """The time of day at which the guest's time begins."""
        return time.time() if self.seed is None else SEEDED_WALLCLOCK

    @property
    def mode(self) -> str:
        """What pvirq's init is to do."""
        return "agent" if self.command is not None else "shell" if self.shell else ""


class Session:
    """A guest in a host of its own, from the command line to the exit status."""

    def __init__(self, options: Watch, say: Messages) -> None:
        self.options = options
        self.say = say
        self.system_map: Path | None = None
        self._views_wanted = True
        self._from_file = False
        self._faults: Faults | None = None

    def boot(self, guests: Guests) -> int:
        """Returns the exit status. What bad input raises (ImageError, BuildError, ...) is the caller's."""
        options, wanted = self.options, self._config(guests)
        found = guests.kernel is None or (self._from_file and not wanted.kernel)
        choice = images.choose_kernel(None if found else wanted.kernel, self.say.note)
        self.system_map = choice.system_map
        image = images.load_kernel(choice.path)
        drivers = [*(["xen-blkfront"] if wanted.disks else []), *(["xen-netfront"] if wanted.vifs else [])]
        initrd = images.make_initrd(wanted.ramdisk or None, image, bool(options.mode), self.say.note, choice, drivers)
        size = terminal_size(sys.stdout.fileno()) if options.shell else None
        config = replace(wanted, kernel=os.fspath(choice.path))
        if images.is_linux(image):
            config.cmdline = images.command_line(wanted.cmdline, options.mode, bool(wanted.ramdisk), size)
        with (
            Host(engine=options.engine, wallclock=options.wallclock, dom0=not guests.dom0, seed=options.seed) as host,
            traced(host, options.trace, kernel=Path(choice.path), initrd=initrd),
        ):
            self._disturb(host)
            _make_bridges(host, config)
            if guests.nat:
                if not config.vifs:
                    raise ConfigError("--nat: the guest has no interface; --vif gives it one")
                host.nat(bridge=config.vifs[0].bridge)
            with Interrupts() as interrupts:
                while True:
                    guest = host.create(replace(config), kernel=image, initrd=initrd)
                    status = self._watched(guest, interrupts)
                    if not self._restarts(guest):
                        return status
                    self.say.note(f"{guest.name} ended: {guest.shutdown_reason}; it is started again")
                    host.destroy(guest)

    def _config(self, guests: Guests) -> DomainConfig:
        """The configuration from a file, if one was named, with what the options say instead."""
        config = DomainConfig(kernel=guests.kernel or "")
        self._from_file = guests.kernel is not None and guests.kernel.endswith(".cfg")
        if self._from_file:
            config, notes = xlcfg.load(guests.kernel or "")
            for note in notes:
                self.say.note(note)
        if guests.initrd is not None:
            config.ramdisk = guests.initrd
        if guests.append:
            config.cmdline = f"{config.cmdline} {guests.append}".strip()
        if guests.memory is not None:
            config.memory = config.maxmem = guests.memory
        if guests.vcpus is not None:
            config.vcpus = config.maxvcpus = guests.vcpus
        config.disks += [_spec("--disk", text, xlcfg.parse_disk) for text in guests.disks]
        config.vifs += [_spec("--vif", text, xlcfg.parse_vif) for text in guests.vifs]
        return config

    def _restarts(self, guest: Guest) -> bool:
        """A configuration's on_reboot and the like say that the guest, which ended by itself, starts again."""
        reason = guest.shutdown_reason
        if not self._from_file or self.options.command is not None or reason is None:
            return False
        return guest.config.on.get(reason) in (Action.RESTART, Action.RENAME_RESTART, Action.COREDUMP_RESTART)

    def restore(self, path: str) -> int:
        """The same for a guest from a file."""
        options = self.options
        with open(path, "rb") as file:
            config, saved = savefile.read(file)
        with (
            Host(engine=options.engine, wallclock=options.wallclock, seed=options.seed) as host,
            traced(host, options.trace, saved=Path(path)),
        ):
            self._disturb(host)
            _make_bridges(host, config)
            guest = host.revive(config, saved)
            if options.mode and f"pvirq={options.mode}" not in guest.config.cmdline.split():
                self.say.error(f"{guest.name} was booted without --{'exec' if options.mode == 'agent' else 'shell'}")
                return EXIT_ENDED
            with Interrupts() as interrupts:
                return self._watched(guest, interrupts)

    def _disturb(self, host: Host) -> None:
        """Make the rules that were asked for, for the host as it is before its guest comes. FaultError."""
        if self.options.faults:
            self._faults = Faults(host)
            for text in self.options.faults:
                self._faults.rule(text)

    def _watched(self, guest: Guest, interrupts: Interrupts) -> int:
        try:
            status = self._watch(guest, interrupts)
            self._views(guest.host)
            return status
        except Interrupted as interrupted:
            return interrupted.status
        except GuestCrashed as error:
            return self._report(guest, str(error), EXIT_CRASHED)
        except GuestTimeout as error:
            return self._report(guest, str(error), EXIT_TIMEOUT)
        except EngineError as error:
            return self._report(guest, str(error), EXIT_ENDED)
        except GuestError as error:
            self.say.error(str(error))
            return EXIT_ENDED
        finally:
            self.say.end()
            if self._faults is not None:
                for rule in self._faults.rules:
                    self.say.note(f"fault {rule}: fired {rule.fired} time{'' if rule.fired == 1 else 's'}")

    # -- three ways to watch a guest -----------------------------------------------------------------------------------

    def _watch(self, guest: Guest, interrupts: Interrupts) -> int:
        if self.options.command is not None:
            return self._exec(guest, interrupts, self.options.command)
        return self._shell(guest, interrupts) if self.options.shell else self._console(guest, interrupts)

    def _exec(self, guest: Guest, interrupts: Interrupts, command: str) -> int:
        def on_turn() -> None:
            interrupts.check()
            self.say.tick()

        host = guest.host
        host.on_turn = on_turn
        if self.options.verbose:
            guest.console.on_output(self._stderr)
        else:
            self.say.begin("booting")
        timeout = EXEC_TIMEOUT if self.options.timeout is None else self.options.timeout
        deadline = host.clock.now() + int(timeout * NS_PER_S)
        guest.await_agent(timeout)
        if not self.options.verbose:
            self.say.begin("running")
        left = max((deadline - host.clock.now()) / NS_PER_S, 0.001)
        try:
            result = guest.run(command, left, self._stdout)
        except GuestTimeout as error:
            if host.clock.now() < deadline:  # it sleeps for ever
                raise
            # In terms of what was asked for, not of what the boot has left.
            raise GuestTimeout(f"{timeout:g} s of guest time passed; waiting for the end of {command!r}") from error
        self.say.end()
        self._views(host)  # before the power-off adds to them
        if self.options.save is not None:
            self.say.begin("saving")
            host.save(guest, self.options.save)
            self.say.end()
            return result.status
        with contextlib.suppress(GuestError):
            guest.poweroff(POWEROFF_TIMEOUT)
        return result.status

    def _shell(self, guest: Guest, interrupts: Interrupts) -> int:
        fd = sys.stdin.fileno()
        keys = ConsoleInput(fd, interrupts, guest.console.send, guest.host.outside.filenos)

        def on_turn() -> None:
            interrupts.check()
            keys.pump()

        if sys.stdin.isatty():
            self.say.note("Ctrl-] leaves the guest")
        guest.host.on_turn, guest.host.idle = on_turn, keys.wait
        guest.console.on_output(self._stdout if sys.stdin.isatty() else Newlines(self._stdout).feed)
        try:
            with raw_terminal(fd):
                return self._wait(guest)
        except Left:
            self.say.text("\n")
            return 0

    def _console(self, guest: Guest, interrupts: Interrupts) -> int:
        def idle(ns: int | None) -> int:
            if ns is None:
                raise HostStuck("the guest sleeps for ever: it waits for an event, and no timer is set")
            passed = interrupts.wait(ns, *guest.host.outside.filenos())
            interrupts.check()
            return passed

        guest.host.on_turn = interrupts.check
        if self.options.timeout is None and self.options.seed is None:
            guest.host.idle = idle
        guest.console.on_output(Newlines(self._stdout).feed)
        return self._wait(guest)

    def _wait(self, guest: Guest) -> int:
        reason = guest.wait(self.options.timeout)
        if reason in ("crash", "watchdog"):
            detail = guest.machine.crash or ("its watchdog ended it" if reason == "watchdog" else "")
            raise GuestCrashed(f"{guest.name} crashed{f': {detail}' if detail else ''}")
        if reason != "poweroff" and not self._restarts(guest):
            self.say.note(f"the guest ended: {reason}; pvirq does not go on with it")
        return 0 if reason in ("poweroff", "reboot") else EXIT_ENDED

    # -- output --------------------------------------------------------------------------------------------------------

    def _stdout(self, data: bytes) -> None:
        self.say.clear()
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise OutputClosed from None

    def _stderr(self, data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()

    def _views(self, host: Host) -> None:
        """What was asked for of domain 0's and the hypervisor's side; once."""
        if not self._views_wanted:
            return
        self._views_wanted = False
        options, texts = self.options, []
        host.settle()
        if options.dom0_interrupts:
            texts.append("domain 0:\n" + host.dom0.proc_interrupts())
        texts += [host.debug_key(key) for key in options.debug_key]
        for domid in options.lsevtchn:
            try:
                texts.append(f"domain {domid}:\n" + host.lsevtchn(domid))
            except XenError:
                self.say.note(f"--lsevtchn {domid}: there is no such domain")
        if options.xenstore:
            texts.append("".join(f"{line}\n" for line in host.store.dump()))
        for text in texts:
            self._stdout(text.encode())

    def _report(self, guest: Guest, why: str, status: int) -> int:
        symbols = None if guest.image is None else symbols_for(guest.image, self.system_map)
        self.say.text(crash.report(guest, f"pvirq: {why}", symbols))
        self._views(guest.host)
        return status


def _make_bridges(host: Host, config: DomainConfig) -> None:
    """Those that a guest's interfaces are to be on."""
    for vif in config.vifs:
        host.backends.network.need_bridge(vif.bridge)


def _spec(option: str, text: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}") from None
