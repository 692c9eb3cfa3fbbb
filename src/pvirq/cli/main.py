"""The entry point: the commands, and what an error becomes (one line on stderr and an exit status)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final, NoReturn

import click

import pvirq
from pvirq import machine_code
from pvirq.cli.boot import boot, restore
from pvirq.cli.cache import cache, fetch
from pvirq.cli.campaign import campaign
from pvirq.cli.check import check
from pvirq.cli.faults import faults
from pvirq.cli.inspect import diff, explain, export, parse
from pvirq.cli.inspect_top import top
from pvirq.cli.invocation import Invocation
from pvirq.cli.messages import Messages
from pvirq.cli.model import model
from pvirq.cli.replay import replay
from pvirq.cli.terminal import OutputClosed
from pvirq.cli.trace import trace

EXIT_ERROR: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130  # as if SIGINT had killed us
EXIT_PIPE: Final = 141  # SIGPIPE

EPILOG: Final = """\b
Try:
  pvirq boot --exec 'cat /proc/interrupts'
  pvirq boot --shell
  pvirq model writeup-dom0
  pvirq explain                     this machine's interrupts, or those in files
"""


def _version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        count = machine_code.count()
        click.echo(f"pvirq, version {pvirq.__version__}" + (f" ({count} modules as machine code)" if count else ""))
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def cli() -> None:
    """The Xen PV interrupt system in one process: boots unmodified Xen PV kernels, without Xen and without root."""


cli.add_command(boot)
cli.add_command(restore)
cli.add_command(model)
cli.add_command(campaign)
cli.add_command(check)
cli.add_command(faults)
cli.add_command(replay)
cli.add_command(trace)
cli.add_command(explain)
cli.add_command(top)
cli.add_command(diff)
cli.add_command(export)
cli.add_command(parse)
cli.add_command(fetch)
cli.add_command(cache)


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command line (default: the process's own) and exit with its status."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run a command line and return its exit status. Bad input is one line on stderr, never a traceback."""
    # Closed standard files are None, which nothing that follows wants to know.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    try:
        args = sys.argv[1:] if args is None else args
        status = invoke(args, Invocation(args))
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message(), err=True)
        return EXIT_BAD_INPUT
    except click.ClickException as error:
        return _fail(_with_hint(error), EXIT_BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except (OutputClosed, BrokenPipeError):
        # What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except Exception as error:
        if isinstance(error, _bad_input()):
            return _fail(str(error), EXIT_BAD_INPUT)
        if isinstance(error, MemoryError):
            return _fail("out of memory", EXIT_ERROR)
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror}", EXIT_ERROR)
        raise  # a bug of ours
    return status if isinstance(status, int) else 0


def invoke(args: list[str], invocation: Invocation) -> object:
    """Run a command line; what it raises is the caller's."""
    return cli.main(args, prog_name="pvirq", standalone_mode=False, obj=invocation)


def _bad_input() -> tuple[type[Exception], ...]:
    """What a wrong kernel, initrd, option, scenario, cache, table or model raises."""
    from pvirq.check.guided import ScheduleError
    from pvirq.check.load import CheckError
    from pvirq.check.schedulefile import ScheduleFileError
    from pvirq.check.threads import ModelError
    from pvirq.inspect.source import InspectError
    from pvirq.lab.campaign.spec import CampaignError
    from pvirq.lab.faults.values import FaultError
    from pvirq.lab.replay import RecordedError
    from pvirq.lab.traceview.perfetto import PerfettoError
    from pvirq.lab.traceview.plot import PlotError
    from pvirq.lab.traceview.tracefile import TraceFileError
    from pvirq.net.outside import OutsideError
    from pvirq.pv.restore import RestoreError
    from pvirq.scenario.schema import ScenarioError
    from pvirq.toolstack.cache import CacheError
    from pvirq.toolstack.cpio import CpioError
    from pvirq.toolstack.kernels import BusyboxNotFound, KernelNotFound
    from pvirq.toolstack.packages import FetchError
    from pvirq.toolstack.savefile import SaveFileError
    from pvirq.toolstack.xlcfg import ConfigError

    own = (pvirq.ImageError, pvirq.BuildError, pvirq.EngineError, pvirq.XenError, RestoreError, SaveFileError)
    return (
        *own,
        KernelNotFound,
        BusyboxNotFound,
        CacheError,
        FetchError,
        CpioError,
        CampaignError,
        CheckError,
        ModelError,
        ScheduleError,
        ScheduleFileError,
        ScenarioError,
        ConfigError,
        FaultError,
        RecordedError,
        OutsideError,
        TraceFileError,
        PlotError,
        PerfettoError,
        InspectError,
    )


def _with_hint(error: click.ClickException) -> str:
    text = error.format_message()
    context = getattr(error, "ctx", None)
    return f"{text.rstrip('.')} (see {context.command_path} --help)" if context else text


def _fail(text: str, status: int) -> int:
    Messages().error(" ".join(text.split()))
    return status
