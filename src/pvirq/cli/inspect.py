"""`pvirq parse`, `explain`, `diff` and `export`: what a host's tables say. `pvirq top` is in inspect_top."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from pvirq.inspect import Explanation, Snapshot

FILES: Final = """FILE is anything a host printed of its interrupts, "-" for standard input, or a directory of such
    files (a bug report's): /proc/interrupts, lsevtchn, the debug keys e, i and q, xl list, xl vcpu-list, xenstore-ls,
    /proc/irq and the counters of sysfs. What it is, is told by its contents. Without FILE it is this machine."""

EXIT: Final = """\b
Exit status:
  0     done
  2     bad input: a file can't be read, or nothing in it is understood
"""


def _files(function: Callable[..., int]) -> Callable[..., int]:
    """The argument and options by which all of these take their input."""
    function = click.option("--debug-keys", metavar="KEYS", default="", help="Running machine: press e, i, q on Xen.")(
        function
    )
    function.__doc__ = (function.__doc__ or "").replace("FILES", FILES)
    return click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path())(function)


def take(files: tuple[str, ...], debug_keys: str = "") -> Snapshot:
    """A snapshot of the files, or of the running machine. InspectError also where nothing was understood."""
    from pvirq.inspect import InspectError, live, read_files

    if set(debug_keys) - set("eiq"):
        raise click.UsageError("--debug-keys: expected e, i or q")
    if not files:
        return live(debug_keys=debug_keys)
    if debug_keys:
        raise click.UsageError("--debug-keys is for the running machine, without FILE")
    snapshot = read_files(files)
    if snapshot.empty:
        first = f": {snapshot.unread[0]}"[:200] if snapshot.unread else ""
        raise InspectError(f"nothing in {snapshot.name} is understood{first}")
    return snapshot


@click.command(epilog=EXIT, short_help="Read a host's interrupt tables and print them as JSON.")
@_files
def parse(files: tuple[str, ...], debug_keys: str) -> int:
    """Print everything that was read as JSON: each table, row and port with its file and line, and what wasn't
    understood.

    FILES
    """
    from pvirq.inspect.report import snapshot_json

    click.echo(json.dumps(snapshot_json(take(files, debug_keys)), indent=1))
    return 0


@click.command(epilog=EXIT, short_help="Say what a host's interrupts are, and what is wrong with them.")
@_files
@click.option("--earlier", multiple=True, metavar="FILE", type=click.Path(), help="The same machine, earlier.")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), metavar="N",
    help="Time between the two; of the running machine: look twice, N seconds apart.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON.")
@click.option("--no-table", is_flag=True, help="Findings only.")
@click.option("--unread", is_flag=True, help="Show all lines that were not understood.")
def explain(
    files: tuple[str, ...], debug_keys: str, earlier: tuple[str, ...], seconds: float | None, as_json: bool,
    no_table: bool, unread: bool,
) -> int:  # fmt: skip
    """Join what was read: which IRQ is which port, of which device and queue, to whose port; and say what is wrong,
    most severe first, with the evidence and a command.

    FILES
    """
    from pvirq.inspect.report import json_report, text_report

    found = explained(files, debug_keys, earlier, seconds)
    if as_json:
        click.echo(json.dumps(json_report(found), indent=1))
    else:
        click.echo(text_report(found, table=not no_table, unread=unread), nl=False)
    return 0


def explained(
    files: tuple[str, ...], debug_keys: str = "", earlier: tuple[str, ...] = (), seconds: float | None = None
) -> Explanation:
    """What `explain` and `export` have to say."""
    from pvirq.inspect import explain as explain_snapshot

    before = take(earlier) if earlier else None
    if not files and seconds is not None and before is None:
        before, until = take(()), time.monotonic() + seconds
        time.sleep(max(until - time.monotonic(), 0))
        seconds = None  # their own times tell
    return explain_snapshot(take(files, debug_keys), before, seconds)


@click.command(
    short_help="Say what differs between two snapshots or hosts.",
    epilog="""\b
Exit status:
  0     nothing differs
  1     something does
  2     bad input
""",
)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--no-counts", is_flag=True, help="Leave interrupt counts out.")
@click.option("--no-store", is_flag=True, help="Leave xenstore out.")
@click.option("--json", "as_json", is_flag=True, help="JSON.")
def diff(a: str, b: str, no_counts: bool, no_store: bool, as_json: bool) -> int:
    """Compare A with B, each a file or a directory as for pvirq explain: rows, ports, vCPUs, affinities, counts.

    A line begins with "+" for what only B has, "-" for what only A has.
    """
    import dataclasses

    from pvirq.inspect.diff import compare
    from pvirq.inspect.report import printable

    if a == b == "-":
        raise click.UsageError("only one of A and B can be standard input")
    changes = compare(take((a,)), take((b,)), counts=not no_counts, store=not no_store)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(change) for change in changes], indent=1))
    else:
        click.echo("".join(f"{printable(str(change))}\n" for change in changes), nl=False)
    return 1 if changes else 0


@click.command(epilog=EXIT, short_help="Print a host's interrupts for Prometheus, or serve them by HTTP.")
@_files
@click.option(
    "--listen",
    metavar="[ADDRESS:]PORT",
    help="Serve /metrics by HTTP instead, on 127.0.0.1 unless there is an ADDRESS.",
)
def export(files: tuple[str, ...], debug_keys: str, listen: str | None) -> int:
    """Print the metrics of one scrape in Prometheus' text format, or serve them; each request looks anew.

    FILES
    """
    from pvirq.inspect.export import prometheus

    if listen is None:
        click.echo(prometheus(explained(files, debug_keys)), nl=False)
        return 0
    from pvirq.cli.inspect_http import parse_address, serve

    if "-" in files:
        raise click.UsageError("standard input can't be read again for each request")
    address = parse_address(listen)
    serve(address, lambda: prometheus(explained(files, debug_keys)))
    return 0
