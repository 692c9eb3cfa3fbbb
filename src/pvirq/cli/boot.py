"""`pvirq boot`: its options, and what they are turned into."""

from __future__ import annotations

import math
import re
from typing import Final

import click

from pvirq.engine import DEFAULT_ENGINE, ENGINES

EPILOG: Final = """\b
Examples:
  pvirq boot --exec 'cat /proc/interrupts'          a kernel is found or fetched
  pvirq boot ./vmlinuz --exec 'uname -a; exit 7'    exit status 7
  pvirq boot --shell                                look around in the guest
  pvirq boot --exec true --dom0-interrupts          domain 0's side of it
  pvirq boot --dom0 ./test-kernel.elf               a kernel as domain 0; --debug-key e for its channels
  pvirq boot ./vmlinux --initrd ./initrd.img --append 'root=/dev/ram0' --timeout 60

\b
Exit status:
  the command's own     with --exec (128 + n: killed by signal n)
  0                     the guest powered off or rebooted; --shell was left
  1                     the guest ended before the command did, or another error
  2                     bad input: options, kernel, initrd, memory, engine
  3                     the guest crashed; a report is on stderr
  4                     --timeout passed; a report is on stderr
  130                   Ctrl-C
"""
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


@click.command(epilog=EPILOG)
@click.argument("kernel", required=False)
@click.option("--initrd", metavar="FILE", help='Initial ramdisk; "none" for none. Default: one with busybox.')
@click.option("--append", metavar="TEXT", default="", help="Kernel parameters, behind pvirq's own (console=hvc0 ...).")
@click.option("--memory", "-m", type=MemorySize(), default="256M", show_default=True, help="256 (MiB), 256M, 1G ...")
@click.option("--vcpus", type=click.IntRange(1, 32), default=1, show_default=True, help="Number of virtual CPUs.")
@click.option("--exec", "command", metavar="COMMAND", help="Run a shell command in the guest and print what it prints.")
@click.option("--shell", is_flag=True, help="A shell in the guest, on this terminal; Ctrl-] leaves it.")
@click.option("--dom0", is_flag=True, help="KERNEL is domain 0 itself, privileged; no modelled one beside it.")
@click.option("--dom0-interrupts", is_flag=True, help="At the end print domain 0's /proc/interrupts as well.")
@click.option("--lsevtchn", type=int, multiple=True, metavar="DOMID", help="At the end print lsevtchn of a domain.")
@click.option(
    "--debug-key", type=click.Choice(["e", "i"]), multiple=True, help="At the end print Xen's dump for that key."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
    help="Give up after so many seconds of the guest's clock, which jumps over the time in which the guest sleeps. "
    "Default: 300 with --exec, else none.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(list(ENGINES)), default=DEFAULT_ENGINE, show_default=True, help="What runs its code."
)
@click.option("-v", "--verbose", is_flag=True, help="With --exec: the guest's console on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="On stderr nothing but errors.")
def boot(
    kernel: str | None, initrd: str | None, append: str, memory: int, vcpus: int, command: str | None, shell: bool,
    dom0: bool, dom0_interrupts: bool, lsevtchn: tuple[int, ...], debug_key: tuple[str, ...], timeout: float | None,
    engine: str, verbose: bool, quiet: bool,
) -> int:  # fmt: skip
    """Boot an unmodified x86-64 Xen PV kernel as a guest.

    KERNEL is a file (vmlinuz, vmlinux; compressed in any way), or a name that `pvirq cache` lists, or "cloud" or
    "generic". Without it: a kernel from the cache, or this machine's newest, or the distribution's package (fetched
    once, as is the static busybox that the default initrd is made of).

    Without --exec and --shell, the guest's console goes to stdout until the guest ends. Time then passes as on a
    real machine; with --exec or --timeout, a sleeping guest's time jumps to whatever wakes it.
    """
    if command is not None and shell:
        raise click.UsageError("--exec and --shell exclude each other")
    if dom0 and (command is not None or shell or dom0_interrupts):
        raise click.UsageError("--dom0 has a kernel's console only: no --exec, --shell or --dom0-interrupts")
    if timeout is not None and math.isnan(timeout):
        raise click.BadParameter("not a number", param_hint="--timeout")
    from pvirq.cli.messages import Messages
    from pvirq.cli.session import Options, Session

    options = Options(
        kernel=kernel, initrd=initrd, append=append, memory=memory, vcpus=vcpus, command=command, shell=shell,
        dom0=dom0, dom0_interrupts=dom0_interrupts, lsevtchn=lsevtchn, debug_keys=debug_key, timeout=timeout,
        engine=engine, verbose=verbose,
    )  # fmt: skip
    return Session(options, Messages(quiet)).run()
