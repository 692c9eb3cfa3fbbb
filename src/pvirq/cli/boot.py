"""`pvirq boot` and `pvirq restore`: their options, and what they are turned into."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Final

import click

from pvirq.cli import tracing
from pvirq.engine import DEFAULT_ENGINE, ENGINES

EXIT_STATUS: Final = """\b
Exit status:
  the command's own     with --exec (128 + n: killed by signal n)
  0                     the guest powered off or rebooted; --shell was left
  1                     the guest ended before the command did, or another error
  2                     bad input: options, configuration, kernel, initrd, memory, engine
  3                     the guest crashed; a report is on stderr
  4                     --timeout passed; a report is on stderr
  130                   Ctrl-C
"""
EPILOG: Final = (
    """\b
Examples:
  pvirq boot --exec 'cat /proc/interrupts'          a kernel is found or fetched
  pvirq boot ./vmlinuz --exec 'uname -a; exit 7'    exit status 7
  pvirq boot --shell                                look around in the guest
  pvirq boot guest.cfg --exec 'ls /dev/xvd*'        a domain as xl.cfg(5) describes it
  pvirq boot --disk disk.img,raw,xvda,rw --vif bridge=xenbr0 --exec 'cat /proc/interrupts' --dom0-interrupts
  pvirq boot --disk d.img,raw,xvda,rw --fault 'slow 20ms device=vbd-51712' --exec 'time cat /dev/xvda >/dev/null'
  pvirq boot --seed 7 --trace run.jsonl --exec 'dd ...'      then: pvirq trace run.jsonl, pvirq replay run.jsonl
  pvirq boot --exec 'touch /tmp/x' --save x.save    then: pvirq restore x.save --exec 'ls /tmp'
  pvirq boot --dom0 ./test-kernel.elf               a kernel as domain 0; --debug-key e for its channels
  pvirq boot ./vmlinux --initrd ./initrd.img --append 'root=/dev/ram0' --timeout 60

"""
    + EXIT_STATUS
)
_UNITS: Final = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}


class MemorySize(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """256, 256M, 1G: MiB without a unit; the value is in bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,12})\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE | re.ASCII)
        size = int(match[1]) << _UNITS[match[2].upper()] if match else 0
        if not size:
            self.fail(f"{value!r} is no memory size: 256 (MiB), 256M or 1G", param, ctx)
        return size


# What a guest that runs can be watched by, however it came to be.
WATCHING: Final = (
    click.option("--exec", "command", metavar="COMMAND", help="Run a shell command in the guest, print its output."),
    click.option("--shell", is_flag=True, help="A shell in the guest, on this terminal; Ctrl-] leaves it."),
    click.option("--save", metavar="FILE", help="With --exec: afterwards save the guest, as `xl save` does."),
    click.option("--dom0-interrupts", is_flag=True, help="At the end print domain 0's /proc/interrupts as well."),
    click.option("--lsevtchn", type=int, multiple=True, metavar="DOMID", help="At the end print lsevtchn of a domain."),
    click.option(
        "--debug-key", type=click.Choice(["e", "i"]), multiple=True, help="At the end print Xen's dump for that key."
    ),
    click.option("--xenstore", is_flag=True, help="At the end print xenstore, as `xenstore-ls -f` in domain 0 does."),
    click.option(
        "--fault", "faults", multiple=True, metavar="RULE",
        help="Disturb it, as `pvirq faults` says; may be given several times. At the end: how often each fired.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), metavar="NUMBER",
        help="A repeatable run: the same to the bit for the same NUMBER. Time is what the guest executes, from the "
        "year 2000 on; whose turn it is, how long, and when a backend answers is drawn from NUMBER.",
    ),
    click.option(
        "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
        help="Give up after so many seconds of the guest's clock, which jumps over the time in which the guest sleeps. "
        "Default: 300 with --exec, else none.",
    ),
    click.option(
        "--engine", type=click.Choice(list(ENGINES)), default=DEFAULT_ENGINE, show_default=True,
        help="What runs its code.",
    ),
    tracing.option,
    click.option("-v", "--verbose", is_flag=True, help="With --exec: the guest's console on stderr."),
    click.option("-q", "--quiet", is_flag=True, help="On stderr nothing but errors."),
)  # fmt: skip


def watching(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command the options of WATCHING."""
    for option in reversed(WATCHING):
        function = option(function)
    return function


def _check_watching(
    command: str | None, shell: bool, save: str | None, timeout: float | None, seed: int | None
) -> None:  # fmt: skip
    if command is not None and shell:
        raise click.UsageError("--exec and --shell exclude each other")
    if seed is not None and shell:
        raise click.UsageError("--seed and --shell exclude each other: nobody types the same twice")
    if save is not None and command is None:
        raise click.UsageError("--save needs --exec: when the command has ended, the guest is saved")
    if timeout is not None and math.isnan(timeout):
        raise click.BadParameter("not a number", param_hint="--timeout")


def _check_faults(rules: tuple[str, ...]) -> None:
    """Before a kernel is looked for. FaultError."""
    if rules:
        from pvirq.lab.faults import kinds as fault_kinds

        for rule in rules:
            fault_kinds.parse(rule)


@click.command(epilog=EPILOG)
@click.argument("kernel", required=False, metavar="[KERNEL | FILE.cfg]")
@click.option("--initrd", metavar="FILE", help='Initial ramdisk; "none" for none. Default: one with busybox.')
@click.option("--append", metavar="TEXT", default="", help="Kernel parameters, behind pvirq's own (console=hvc0 ...).")
@click.option("--memory", "-m", type=MemorySize(), help="256 (MiB), 256M, 1G ... Default: 256M.")
@click.option("--vcpus", type=click.IntRange(1, 32), help="Number of virtual CPUs. Default: 1.")
@click.option("--disk", multiple=True, metavar="SPEC", help="A disk, as xl's disk=[...] has it: FILE,raw,xvda,rw")
@click.option("--vif", multiple=True, metavar="SPEC", help="A network interface, as xl's vif=[...] has it.")
@click.option("--nat", is_flag=True, help="A way to this machine's loopback on the guest's bridge (needs libslirp).")
@click.option("--dom0", is_flag=True, help="KERNEL is domain 0 itself, privileged; no modelled one beside it.")
@watching
def boot(
    kernel: str | None, initrd: str | None, append: str, memory: int | None, vcpus: int | None, disk: tuple[str, ...],
    vif: tuple[str, ...], nat: bool, dom0: bool, **watch: Any,
) -> int:  # fmt: skip
    """Boot an unmodified x86-64 Xen PV kernel as a guest.

    KERNEL is a file (vmlinuz, vmlinux; compressed in any way), or a name that `pvirq cache` lists, or "cloud" or
    "generic". Without it: a kernel from the cache, or this machine's newest, or the distribution's package (fetched
    once, as is the static busybox that the default initrd is made of).

    FILE.cfg is a configuration of xl's: kernel, ramdisk, extra, memory, vcpus, disk, vif, on_reboot and so on; options
    given beside it win. Without a ramdisk the default initrd is used, which loads the drivers of the guest's disks and
    interfaces where its kernel has them as modules.

    Without --exec and --shell, the guest's console goes to stdout until the guest ends. Time then passes as on a
    real machine; with --exec or --timeout, a sleeping guest's time jumps to whatever wakes it.
    """
    _check_watching(watch["command"], watch["shell"], watch["save"], watch["timeout"], watch["seed"])
    _check_faults(watch["faults"])
    if dom0 and (watch["command"] is not None or watch["shell"] or watch["dom0_interrupts"] or watch["xenstore"]):
        raise click.UsageError("--dom0 has a kernel's console only: no --exec, --shell, --dom0-interrupts, --xenstore")
    if dom0 and (disk or vif or nat):
        raise click.UsageError("--dom0 has no backends: no --disk, --vif or --nat")
    from pvirq.cli.messages import Messages
    from pvirq.cli.session import Guests, Session, Watch

    say = Messages(watch.pop("quiet"))
    guests = Guests(
        kernel=kernel,
        initrd=initrd,
        append=append,
        memory=memory,
        vcpus=vcpus,
        disks=disk,
        vifs=vif,
        nat=nat,
        dom0=dom0,
    )
    return Session(Watch(**watch), say).boot(guests)


@click.command(epilog=EXIT_STATUS)
@click.argument("file")
@watching
def restore(file: str, **watch: Any) -> int:
    """Go on with a guest that was saved: by `pvirq boot --save`, Host.save, or `xl save` on a real host.

    Its disks must be where they were. --exec and --shell work where the guest was booted with them.
    """
    _check_watching(watch["command"], watch["shell"], watch["save"], watch["timeout"], watch["seed"])
    _check_faults(watch["faults"])
    from pvirq.cli.messages import Messages
    from pvirq.cli.session import Session, Watch

    say = Messages(watch.pop("quiet"))
    return Session(Watch(**watch), say).restore(file)
