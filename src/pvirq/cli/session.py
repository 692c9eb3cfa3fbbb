"""One run of `pvirq boot`: build the guest, let it run, and turn its end into an exit status."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pvirq import crash
from pvirq.abi.errno import XenError
from pvirq.cli import images
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
from pvirq.engine import EngineError
from pvirq.guest import Guest, GuestCrashed, GuestError, GuestTimeout, HostStuck
from pvirq.host import Host
from pvirq.pv.symbols import symbols_for
from pvirq.xen.timer import NS_PER_S

EXIT_ENDED: Final = 1
EXIT_CRASHED: Final = 3
EXIT_TIMEOUT: Final = 4
EXEC_TIMEOUT: Final = 300.0
# The command has ended; whether its guest then powers off in time changes nothing.
POWEROFF_TIMEOUT: Final = 5.0


@dataclass(frozen=True)
class Options:
    """The options of `pvirq boot`; `memory` in bytes, `timeout` in seconds of the guest's clock."""

    kernel: str | None
    initrd: str | None
    append: str
    memory: int
    vcpus: int
    command: str | None
    shell: bool
    dom0: bool
    dom0_interrupts: bool
    lsevtchn: tuple[int, ...]
    debug_keys: tuple[str, ...]
    timeout: float | None
    engine: str
    verbose: bool


class Session:
    """A guest in a host of its own, from the command line to the exit status."""

    def __init__(self, options: Options, say: Messages) -> None:
        self.options = options
        self.say = say
        self.system_map: Path | None = None
        self._views_wanted = True

    def run(self) -> int:
        """Returns the exit status. What bad input raises (ImageError, BuildError, ...) is the caller's."""
        options = self.options
        path, self.system_map = images.choose_kernel(options.kernel, self.say)
        image = images.load_kernel(path)
        mode = "agent" if options.command is not None else "shell" if options.shell else ""
        initrd = images.make_initrd(options.initrd, image, bool(mode), self.say)
        size = terminal_size(sys.stdout.fileno()) if options.shell else None
        append = images.command_line(options.append, mode, options.initrd is not None, size)
        if not images.is_linux(image):
            append = options.append
        with Host(engine=options.engine, wallclock=time.time(), dom0=not options.dom0) as host:
            guest = host.boot(image, initrd=initrd, append=append, memory=options.memory, vcpus=options.vcpus)
            with Interrupts() as interrupts:
                return self._watched(guest, interrupts)

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
        if self.options.timeout is None:
            guest.host.idle = idle
        guest.console.on_output(Newlines(self._stdout).feed)
        return self._wait(guest)

    def _wait(self, guest: Guest) -> int:
        reason = guest.wait(self.options.timeout)
        if reason in ("crash", "watchdog"):
            detail = guest.machine.crash or ("its watchdog ended it" if reason == "watchdog" else "")
            raise GuestCrashed(f"{guest.name} crashed{f': {detail}' if detail else ''}")
        if reason != "poweroff":
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
        if options.dom0_interrupts:
            texts.append("domain 0:\n" + host.dom0.proc_interrupts())
        texts += [host.debug_key(key) for key in options.debug_keys]
        for domid in options.lsevtchn:
            try:
                texts.append(f"domain {domid}:\n" + host.lsevtchn(domid))
            except XenError:
                self.say.note(f"--lsevtchn {domid}: there is no such domain")
        for text in texts:
            self._stdout(text.encode())

    def _report(self, guest: Guest, why: str, status: int) -> int:
        assert guest.image is not None
        self.say.text(crash.report(guest, f"pvirq: {why}", symbols_for(guest.image, self.system_map)))
        self._views(guest.host)
        return status
