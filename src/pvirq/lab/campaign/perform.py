"""One run on a host: its scenario under its faults, and the verdict."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Final

import zstandard

from pvirq import crash
from pvirq.abi.errno import XenError
from pvirq.engine import EngineError
from pvirq.guest import Guest, GuestCrashed, GuestError, GuestTimeout, HostStuck
from pvirq.host import Host
from pvirq.lab.campaign.hosts import Blueprint, Unready
from pvirq.lab.campaign.plan import Cell, Run
from pvirq.lab.faults import Faults
from pvirq.lab.faults.values import FaultError
from pvirq.lab.trace import Trace
from pvirq.modelled import ModelledGuest
from pvirq.pv.builder import BuildError
from pvirq.pv.image import ImageError
from pvirq.scenario import load as scenarios
from pvirq.scenario.run import Run as ScenarioRun
from pvirq.scenario.schema import ScenarioError
from pvirq.toolstack.cpio import CpioError
from pvirq.toolstack.kernels import BusyboxNotFound, KernelNotFound
from pvirq.toolstack.xlcfg import ConfigError
from pvirq.xen.timer import NS_PER_S

VERDICTS: Final = ("pass", "fail", "crash", "timeout", "stuck", "hung", "error")
CONSOLE_LINES: Final = 40
# A trace that is still longer when packed is left out.
LARGEST_TRACE: Final = 64 << 20
# What a campaign file can have wrong that only shows when it is carried out.
UNUSABLE: Final = (
    Unready, BuildError, ImageError, EngineError, ConfigError, CpioError, BusyboxNotFound, KernelNotFound,
    ScenarioError, FaultError,
)  # fmt: skip


@dataclass
class Outcome:
    """What came out of a run.

    `verdict` is pass; fail: an expectation isn't met; crash: the guest crashed; timeout: guest time is up; stuck:
    nothing can happen any more; hung: real time is up; error: it couldn't be carried out. `detail` is a report for
    people: where it stood, or a traceback. `virtual_ns` is what passed on the host's clock in the run, `boot_s` the
    real time that was spent on booting before it, for it and those after it. `fired` is how often its faults did.
    """

    verdict: str
    message: str = ""
    detail: str = ""
    virtual_ns: int = 0
    wall_s: float = 0.0
    boot_s: float = 0.0
    fired: int = 0
    trace_hash: str = ""
    trace: bytes | None = field(default=None, repr=False)
    console: str = ""
    output: str = ""


class Failed(Exception):
    """An expectation isn't met. One line."""


def carry_out(run: Run, blueprint: Blueprint, host: Host | None, guest: Guest | None) -> Outcome:
    """Carry a run out: on a booted host, which is this run's alone from here on, or on one that is built for it."""
    performance = _Performance(run, blueprint)
    if host is not None:
        return performance.play(host, guest)
    if run.cell.what.file:
        return performance.play_file()
    try:
        host, built = blueprint.build(run.seed)
    except (*UNUSABLE, XenError, ValueError) as error:
        return Outcome("error", _one_line(error))
    return performance.play(host, built)


class _Performance:
    """A run under way."""

    def __init__(self, run: Run, blueprint: Blueprint) -> None:
        self.run, self.cell, self.blueprint = run, run.cell, blueprint
        self.expect = run.cell.what.expect
        self.outcome = Outcome("pass")
        self._console_from = 0
        self._logs_from = 0
        self._deadline = 0

    # -- on a host with one guest --------------------------------------------------------------------------------------

    def play(self, host: Host, guest: Guest | ModelledGuest | None) -> Outcome:
        assert guest is not None
        if isinstance(guest, Guest):
            self._console_from = guest.console.total
        self._logs_from = len(host.dom0.log)
        with self._observed(host) as faults, self._judged(host, guest):
            self._scenario(host, guest, faults)
            self._check_console(host, guest)
        self.outcome.console = _last_lines(self._console(guest))
        return self.outcome

    def _scenario(self, host: Host, guest: Guest | ModelledGuest, faults: Faults) -> None:
        what = self.cell.what
        if what.command:
            assert isinstance(guest, Guest)
            self._command(guest, what.command)
        elif what.python:
            self._python(host, guest, faults, what.python)
        elif isinstance(guest, Guest):
            self._boot(host, guest)
        elif not host.run(lambda: host.quiet, self._left(host)):
            raise GuestTimeout("guest time is up; waiting for the boot")
        if self.expect.ends:
            self._end(host, guest)

    def _command(self, guest: Guest, command: str) -> None:
        """`exec`."""
        ends = self.expect.ends
        pieces: list[bytes] = []
        try:
            result = guest.run(command, self._left(guest.host) / NS_PER_S, pieces.append)
            status: int | None = result.status
        except GuestError:
            if not ends or not guest.ended:
                self.outcome.output = _text(pieces)
                raise
            status = None  # it ended the guest: `_end` looks how
        self.outcome.output = output = _text(pieces)
        wanted = self.expect.status if self.expect.status is not None else None if ends else 0
        if wanted is not None and status != wanted:
            last = output.strip().rpartition("\n")[2].strip()
            got = "no exit status" if status is None else f"exit status {status}"
            raise Failed(f"{got}, expected {wanted}{f': {last[:200]}' if last else ''}")
        _check("output", output, self.expect.output, self.expect.no_output)

    def _boot(self, host: Host, guest: Guest) -> None:
        """Nothing but the boot: until the console has what is expected, else the agent, where there is one."""
        if self.expect.console:
            self._await_console(guest, re.compile(self.expect.console, re.MULTILINE))
        elif not self.expect.ends and self.blueprint.agent:
            guest.await_agent(self._left(host) / NS_PER_S)
        elif not self.expect.ends:
            raise Unready("this kernel has no agent: expect.console or expect.ends has to say when it has booted")

    def _await_console(self, guest: Guest, wanted: re.Pattern[str]) -> None:
        """Until it is on the console. Whether it is then is `_check_console`'s to say, where the guest has ended."""
        seen, found = -1, False

        def there() -> bool:
            nonlocal seen, found
            if seen != guest.console.total:
                seen = guest.console.total
                found = bool(wanted.search(self._console(guest)))
            return found or guest.ended

        if not guest.host.run(there, self._left(guest.host)):
            raise GuestTimeout(f"guest time is up; waiting for {wanted.pattern!r} on the console")
        if guest.shutdown_reason in ("crash", "watchdog") and not self.expect.ends:
            raise GuestCrashed(_crash(guest))

    def _end(self, host: Host, guest: Guest | ModelledGuest) -> None:
        """`expect.ends`."""
        wanted = self.expect.ends
        if not isinstance(guest, Guest):
            host.shutdown(guest, wanted, self._left(host) / NS_PER_S)
            return
        if not guest.ended and wanted == "poweroff" and self.blueprint.agent:
            with contextlib.suppress(GuestError):
                guest.poweroff(self._left(host) / NS_PER_S)
        if not guest.ended:
            with contextlib.suppress(GuestCrashed):
                guest.wait(self._left(host) / NS_PER_S)
        if guest.shutdown_reason != wanted:
            if guest.shutdown_reason in ("crash", "watchdog"):
                raise GuestCrashed(_crash(guest))
            raise Failed(f"the guest ended: {guest.shutdown_reason}, expected {wanted}")

    def _python(self, host: Host, guest: Guest | ModelledGuest, faults: Faults, where: str) -> None:
        """A function of the user's, whose parameters are asked for by name."""
        file, _, name = where.rpartition(":")
        function = _function(Path(self.cell.start.directory) / file, name)
        offered = {
            "host": host, "guest": guest, "faults": faults, "seed": self.run.seed,
            "rng": random.Random(f"{self.run.seed}/{self.cell.scenario}"), "timeout": self.cell.timeout_ns / NS_PER_S,
        }  # fmt: skip
        wanted = inspect.signature(function).parameters.values()
        unknown = [one.name for one in wanted if one.name not in offered and one.default is one.empty]
        if unknown:
            raise Unready(f"{where}: no {unknown[0]!r} to call it with; there are {', '.join(offered)}")
        host.on_turn = lambda: self._in_time(host)
        function(**{one.name: offered[one.name] for one in wanted if one.name in offered})

    # -- on a scenario file's host -------------------------------------------------------------------------------------

    def play_file(self) -> Outcome:
        """A scenario of modelled domains from its file, with the campaign's kernel in its guests."""
        what, kernel = self.cell.what, self.cell.start.kernel
        try:
            found = scenarios.load(what.file)
            guests = [domain.name for domain in found.domains]
            changes = [*what.settings, f"seed={self.run.seed}"]
            for name in what.domains or guests:
                if name not in guests:
                    raise Unready(f"domains: {what.file} has no {name!r}; there are {', '.join(guests)}")
                changes.append(f'{name}.kernel="{kernel.model}"')
                if kernel.vcpus is not None:
                    changes.append(f"{name}.vcpus={kernel.vcpus}")
            run = ScenarioRun(scenarios.load(what.file, changes), host_seed=self.run.seed)
        except UNUSABLE as error:
            return Outcome("error", _one_line(error))
        with run, self._observed(run.host), self._judged(run.host, None):
            run.start()
            if not run.run(self._deadline):
                raise GuestTimeout(
                    f"{self.cell.timeout_ns / NS_PER_S:g} s of guest time passed; the workload isn't done"
                )
            if run.contents.wrong:
                raise Failed(f"{run.contents.wrong} sectors came back from a disk as something else")
            for member in run.members.values():
                _check(f"log of {member.name}", "\n".join(member.kernel.log), "", self.expect.no_console)
        return self.outcome

    # -- what goes on around it ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _observed(self, host: Host) -> Iterator[Faults]:
        """Under the run's faults, with a trace."""
        began = host.clock.now()
        self._deadline = began + self.cell.timeout_ns
        with _traced(host, self.outcome, self.cell.trace, self.run.name) as finish:
            faults = Faults(host, seed=self.run.seed)
            rules = [faults.rule(rule) for rule in self.cell.rules]
            try:
                yield faults
            finally:
                self.outcome.fired = sum(rule.fired for rule in {*rules, *faults.rules})
                self.outcome.virtual_ns = host.clock.now() - began
                finish(self.outcome.verdict)

    @contextlib.contextmanager
    def _judged(self, host: Host, guest: Guest | ModelledGuest | None) -> Iterator[None]:
        """What is raised becomes the verdict."""
        outcome = self.outcome
        try:
            yield
        except Failed as error:
            outcome.verdict, outcome.message = "fail", _one_line(error)
        except AssertionError as error:
            outcome.verdict, outcome.message = "fail", _assertion(error, self.cell)
            outcome.detail = _traceback(error, self.cell)
        except GuestCrashed as error:
            outcome.verdict, outcome.message = "crash", _one_line(error)
        except (GuestTimeout, HostStuck, ScenarioError) as error:
            # Whoever turns the one into the other has it as context.
            stuck = isinstance(error, HostStuck) or isinstance(error.__context__, HostStuck)
            timeout = isinstance(error, GuestTimeout)
            outcome.verdict = "stuck" if stuck else "timeout" if timeout else "error"
            outcome.message = _one_line(error).replace(" ".join(repr(self.cell.what.command).split()), "exec")
        except GuestError as error:
            outcome.verdict, outcome.message = "fail", _one_line(error)
        except UNUSABLE as error:
            outcome.verdict, outcome.message = "error", _one_line(error)
        except Exception as error:
            outcome.verdict, outcome.message = "error", f"{type(error).__name__}: {_one_line(error)}"
            outcome.detail = _traceback(error, self.cell)
        if isinstance(guest, Guest):
            guest.console.service()
            if outcome.verdict in ("crash", "timeout", "stuck"):
                outcome.detail = crash.report(guest, f"{self.run.name}: {outcome.message}")
                if outcome.verdict == "crash":
                    outcome.message = _crash(guest)

    def _left(self, host: Host) -> int:
        """ns of the guest time that the run may still take; GuestTimeout."""
        self._in_time(host)
        return max(self._deadline - host.clock.now(), 1)

    def _in_time(self, host: Host) -> None:
        if host.clock.now() > self._deadline:
            raise GuestTimeout(f"{self.cell.timeout_ns / NS_PER_S:g} s of guest time passed")

    def _console(self, guest: Guest | ModelledGuest) -> str:
        """What the guest has said since the scenario's beginning."""
        if isinstance(guest, ModelledGuest):
            return "\n".join(guest.kernel.log) + "\n" + guest.console.output.decode("utf-8", "replace")
        said = min(guest.console.total - self._console_from, len(guest.console.output))
        return guest.console.output[-said:].decode("utf-8", "replace").replace("\r\n", "\n") if said else ""

    def _check_console(self, host: Host, guest: Guest | ModelledGuest) -> None:
        if isinstance(guest, Guest):
            guest.console.service()  # its last words: nobody may have read them since it ended
        no_console = self.expect.no_console
        if self.expect.ends == "crash" and no_console:
            no_console = ""  # it will have complained
        _check("console", self._console(guest), self.expect.console, no_console)
        _check("log of domain 0", "\n".join(list(host.dom0.log)[self._logs_from :]), "", no_console)


# -- traces ------------------------------------------------------------------------------------------------------------


def prepare(host: Host) -> None:
    """Pay once for what the first trace of a host costs, its guest's symbols, and not in each fork of it."""
    with _traced(host, Outcome("pass"), "none") as finish:
        finish("pass")


@contextlib.contextmanager
def _traced(host: Host, outcome: Outcome, keep: str, name: str = "") -> Iterator[Callable[[str], None]]:
    """Trace a host; what is called at the end, with the verdict, puts hash and trace into the outcome."""
    # A file without a name: nothing is left of it where this process is killed.
    with tempfile.TemporaryFile() as file:
        path = os.devnull if keep == "none" else f"/proc/self/fd/{file.fileno()}"
        trace = Trace(host, path=path, header={"run": name})

        def finish(verdict: str) -> None:
            trace.close()
            outcome.trace_hash = trace.hash()
            if keep == "all" or (keep == "failures" and verdict != "pass"):
                packed = zstandard.ZstdCompressor(level=3).compress(file.read())
                if len(packed) <= LARGEST_TRACE:
                    outcome.trace = packed
                else:
                    outcome.detail += f"\n(its trace, {len(packed) >> 20} MiB even packed, is left out)\n"

        yield finish


# -- texts -------------------------------------------------------------------------------------------------------------


def _check(what: str, text: str, wanted: str, unwanted: str) -> None:
    if wanted and not re.search(wanted, text, re.MULTILINE):
        raise Failed(f"nothing in the {what} fits {wanted!r}")
    if unwanted and (found := re.search(unwanted, text, re.MULTILINE)):
        start = text.rfind("\n", 0, found.start()) + 1
        line = text[start:].partition("\n")[0].strip()
        raise Failed(f"in the {what}: {line[:200]}")


def _function(path: Path, name: str) -> FunctionType:
    """A function from a file, imported once. Unready."""
    module_name = f"pvirq_campaign_{path.stem}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # what it imports from beside it
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    function = getattr(module, name, None)
    if not isinstance(function, FunctionType):
        raise Unready(f"{path}: no function {name}")
    return function


def _crash(guest: Guest) -> str:
    """Linux's own words for it, where there are any."""
    text = guest.console.output.decode("utf-8", "replace")
    panics = re.findall(r"Kernel panic - not syncing: [^\r\n]*", text)
    return panics[-1].strip() if panics else guest.machine.crash or f"the guest ended: {guest.shutdown_reason}"


def _assertion(error: AssertionError, cell: Cell) -> str:
    """Where and what: a plain assert says nothing by itself."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(cell.start.directory)] or list(frames)
    where = own[-1]
    text = _one_line(error) or (where.line or "").strip()
    return f"{Path(where.filename).name}:{where.lineno}: {text}"


def _traceback(error: BaseException, cell: Cell) -> str:
    """Without what called the user's function."""
    found = error.__traceback__
    while found is not None and not Path(found.tb_frame.f_code.co_filename).is_relative_to(cell.start.directory):
        found = found.tb_next
    return "".join(traceback.format_exception(type(error), error, found or error.__traceback__))


def _one_line(error: BaseException) -> str:
    text = error.why if isinstance(error, XenError) else str(error)
    return " ".join(text.split())[:500]


def _text(pieces: list[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace").replace("\r\n", "\n")


def _last_lines(text: str) -> str:
    lines = [line.rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-CONSOLE_LINES:])
