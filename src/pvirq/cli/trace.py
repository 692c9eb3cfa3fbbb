"""`pvirq trace`: what is in a trace, as a summary, a timeline, a picture, or a file for Perfetto."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from pvirq.cli.messages import Messages
    from pvirq.lab.traceview.selection import Selection
    from pvirq.lab.traceview.summary import Options
    from pvirq.lab.traceview.timeline import Timeline
    from pvirq.lab.traceview.traceevents import Header
    from pvirq.lab.traceview.tracefile import TraceFile

EXIT_DIFFERS: Final = 1

EPILOG: Final = """\b
Examples:
  pvirq trace run.jsonl                    counts, latencies, storms, balance
  pvirq trace run.jsonl --json             the same for programs
  pvirq trace run.jsonl --timeline --from 1.2s --to 1.3s
  pvirq trace run.jsonl --svg run.svg --domain guest1
  pvirq trace run.jsonl --pftrace run.pftrace    for https://ui.perfetto.dev
  pvirq trace run.jsonl --events --port 12
  pvirq trace run.jsonl --diff other.jsonl  where two runs part

\b
Exit status:
  0     done; with --diff: the same events
  1     with --diff: they differ; or another error, such as a full disk
  2     bad input: options or the trace; one line says what, and where
  130   Ctrl-C
  141   nobody reads stdout any more
"""


class _Time(click.ParamType[int]):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pvirq.lab.traceview.units import parse_time

        if isinstance(value, int):
            return value
        try:
            return parse_time(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_OUT: Final = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=EPILOG, short_help="Summarise a trace, draw it, or compare two.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--timeline", "in_terminal", is_flag=True, help="Draw a timeline in the terminal.")
@click.option("--svg", type=_OUT, metavar="OUT", help="Draw it into an SVG file (needs matplotlib: pvirq[plots]).")
@click.option("--png", type=_OUT, metavar="OUT", help="Draw it into a PNG file (the same).")
@click.option("--pftrace", type=_OUT, metavar="OUT", help="Convert all of it for Perfetto (needs pvirq[perfetto]).")
@click.option("--events", "listing", is_flag=True, help="Print the events, a line each.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--hash", "hashing", is_flag=True, help="Print the SHA-256 of the lines of all events.")
@click.option(
    "--diff", type=click.Path(path_type=Path), metavar="OTHER",
    help="Compare with another trace: print the first difference and what is around it.",
)  # fmt: skip
@click.option("--domain", "domains", multiple=True, metavar="DOMAIN", help="Only this domain, a name or number.")
@click.option("--port", "ports", type=click.IntRange(0), multiple=True, metavar="PORT", help="Only this port.")
@click.option("--from", "start", type=_Time(), metavar="TIME", help="From so long after the trace's start: 20ms, 1.5s.")
@click.option("--to", "stop", type=_Time(), metavar="TIME", help="And until then.")
@click.option(
    "--storm-events", type=click.IntRange(2, 1_000_000), metavar="N",
    help="What is a storm: so many events on one port within --storm-window. Default: 100.",
)  # fmt: skip
@click.option("--storm-window", type=_Time(), metavar="TIME", help="Default: 10ms.")
@click.option("-q", "--quiet", is_flag=True, help="On stderr nothing but errors.")
def trace(
    file: Path, in_terminal: bool, svg: Path | None, png: Path | None, pftrace: Path | None, listing: bool,
    as_json: bool, hashing: bool, diff: Path | None, domains: tuple[str, ...], ports: tuple[int, ...],
    start: int | None, stop: int | None, storm_events: int | None, storm_window: int | None, quiet: bool,
) -> int:  # fmt: skip
    """Show what is in FILE, a trace that --trace has recorded.

    Without options it prints a summary: for each port how often it was raised and what became of that, how long its
    events were on their way to their handler, how long that took; what each vCPU did; what stands out. --domain and
    --port, which may be repeated, and --from and --to choose a part of it. Times are virtual, and from the trace's
    start. docs/lab-traceview.md explains all figures and pictures.
    """
    from pvirq.cli.messages import Messages
    from pvirq.cli.terminal import OutputClosed
    from pvirq.lab.traceview.summary import STORM_EVENTS, STORM_WINDOW_NS, Options

    pictures = in_terminal or svg or png
    chosen = bool(domains or ports or start is not None or stop is not None)
    if (hashing or diff or pftrace) and chosen:
        raise click.UsageError("--hash, --diff and --pftrace take all of a trace: no --domain, --port, --from or --to")
    if pictures and ports:
        raise click.UsageError("--port is for the summary and for --events")
    if start is not None and stop is not None and start >= stop:
        raise click.UsageError("--from has to be before --to")
    for out in (svg, png, pftrace):
        if out and out.exists() and file.exists() and out.samefile(file):
            raise click.UsageError(f"{out} is the trace itself")
    view = _View(file, domains, ports, start, stop, Messages(quiet))
    options = Options(storm_events=storm_events or STORM_EVENTS, storm_window=storm_window or STORM_WINDOW_NS)
    try:
        if hashing:
            view.hash()
        if listing:
            view.list()
        if pictures:
            view.draw(in_terminal, svg, png)
        if pftrace:
            view.convert(pftrace)
        if as_json or not (hashing or listing or pictures or pftrace or diff):
            view.summarise(options, as_json)
        return view.diff(diff) if diff else 0
    except BrokenPipeError:  # click would make an error of it
        raise OutputClosed from None


@dataclass
class _View:
    """A trace, and what of it is to be shown."""

    file: Path
    domains: tuple[str, ...]
    ports: tuple[int, ...]
    start: int | None  # from the trace's start
    stop: int | None
    messages: Messages

    @contextmanager
    def open(self, path: Path | None = None) -> Iterator[TraceFile]:
        """The trace, with a status line on stderr for as long as it is read."""
        from pvirq.lab.traceview.tracefile import TraceFile

        with TraceFile(path or self.file) as trace:
            self.messages.begin(f"reading {trace.path.name}")

            def on_turn() -> None:
                share = f"{100 * trace.done // trace.size} %, " if trace.size else ""
                self.messages.tick(share)

            trace.on_turn = on_turn
            try:
                yield trace
            finally:
                self.messages.end()
            if trace.truncated:
                self.messages.note(f"{trace.path}: the last line is cut off")

    def selection(self, header: Header) -> Selection:
        from pvirq.lab.traceview.selection import Selection

        start, stop = (None if t is None else header.start + t for t in (self.start, self.stop))
        return Selection(self.domains, self.ports, start, stop)

    def check_domains(self, known: dict[str, str]) -> None:
        """A usage error if there is a --domain that the trace doesn't have; `known` are their numbers and names."""
        for name in self.domains:
            if name not in known and name not in known.values():
                there = ", ".join(list(known.values())[:8]) or "none"
                raise click.UsageError(f"no domain {name!r} in {self.file}; there are {there}")

    def summarise(self, options: Options, as_json: bool) -> None:
        from pvirq.lab.traceview.summary import summarise
        from pvirq.lab.traceview.summary_text import summary_dict, summary_text

        with self.open() as trace:
            selection = self.selection(trace.header)
            options.start, options.stop = selection.start, selection.stop
            summary = summarise(trace, options)
        self.check_domains({str(one.domain.d): one.domain.name for one in summary.domains})
        if as_json:
            json.dump(summary_dict(summary, selection, options), sys.stdout, indent=2)
            sys.stdout.write("\n")
        else:
            sys.stdout.write(summary_text(summary, selection, options))

    def list(self) -> None:
        from pvirq.lab.traceview.eventtext import event_text
        from pvirq.lab.traceview.follower import Follower

        follower = Follower()
        with self.open() as trace:
            follower.begin(trace.header)
            selection = self.selection(trace.header)
            for event in trace:
                if selection.stop is not None and event.t >= selection.stop:
                    break
                follower.feed(event)
                if selection.event(event, follower):
                    self.messages.clear()
                    sys.stdout.write(event_text(event, follower) + "\n")
        self.check_domains({str(d): domain.name for d, domain in follower.domains.items()})

    def draw(self, in_terminal: bool, svg: Path | None, png: Path | None) -> None:
        from pvirq.lab.traceview.timeline import timeline

        if svg or png:
            from pvirq.lab.traceview.plot import check_plots

            check_plots()  # before a long file is read for nothing
        with self.open() as trace:
            drawn = timeline(trace, self.selection(trace.header))
        self.check_domains({str(d): name for d, name in drawn.names.items()})
        if in_terminal:
            self._print(drawn)
        for kind, out in (("svg", svg), ("png", png)):
            if out:
                from pvirq.lab.traceview.plot import plot

                with _written(out) as unfinished:
                    plot(drawn, unfinished, kind)

    def _print(self, drawn: Timeline) -> None:
        from rich.console import Console

        from pvirq.lab.traceview.terminal import lines

        console = Console(highlight=False, soft_wrap=True)
        width = console.width if sys.stdout.isatty() or "COLUMNS" in os.environ else 80
        plain = not (sys.stdout.encoding or "").lower().startswith("utf")
        for line in lines(drawn, width, plain=plain):
            console.print(line)

    def convert(self, out: Path) -> None:
        from pvirq.lab.traceview.perfetto import convert

        with self.open() as trace, _written(out) as unfinished:
            convert(trace, unfinished)

    def hash(self) -> None:
        from pvirq.lab.traceview.diff import hash_of

        with self.open() as trace:
            sys.stdout.write(hash_of(trace) + "\n")

    def diff(self, other: Path) -> int:
        from pvirq.lab.traceview.diff import differ

        with self.open() as first, self.open(other) as second:
            found = differ(first, second)
            if first.header.raw != second.header.raw:
                self.messages.note("the headers differ")
        if found is None:
            return 0
        write = sys.stdout.write
        write(f"line {found.line} is the first that differs")
        write(f", in {', '.join(found.keys)}\n" if found.keys else "\n")
        for line in found.before:
            write(f"  {line}\n")
        for mark, path, lines in (("-", self.file, found.first), ("+", other, found.second)):
            write(f"{mark} {path}{'' if lines else ': no more events'}\n")
            for line in lines:
                write(f"{mark} {line}\n")
        return EXIT_DIFFERS


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place in the end; nothing is left of it if something fails."""
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        yield path
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
