"""`pvirq campaign`: run a campaign, and look at its results."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from pvirq.cli.messages import Messages
    from pvirq.lab.campaign.perform import Outcome
    from pvirq.lab.campaign.plan import Run
    from pvirq.lab.campaign.store import Store

EXIT_FAILED: Final = 1

EPILOG: Final = """\b
Examples:
  pvirq campaign net.toml                         run it, on all cores; again: go on with it
  pvirq campaign net.toml --only 'cloud/*/lossy'  a part of it
  pvirq campaign net.toml --only cloud/dd/lossy/7 one run, again
  pvirq campaign net.toml --scheduler tcp://head:8786
  pvirq campaign report net.toml --plot net.png
  pvirq campaign trace net.toml cloud/dd/lossy/7 > trace.jsonl

\b
Exit status:
  0     all runs passed
  1     some didn't
  2     bad input: options or the file; one line says file, line and what was expected
  130   Ctrl-C; what is done is kept
"""


class _Group(click.Group):
    """`pvirq campaign FILE` is `pvirq campaign run FILE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Group, epilog=EPILOG, short_help="Run kernels x scenarios x faults x seeds, and report on them.")
def campaign() -> None:
    """Run a campaign: each kernel with each scenario, under each set of faults, with each seed.

    Every run is independent and repeatable: its seed says all that chance decides, and the same run gives the same
    verdict and trace on any worker. Results are in one SQLite file beside FILE.
    """


def _results_option(function: Any) -> Any:
    return click.option("--results", metavar="PATH", help="The file of results. Default: FILE with .sqlite.")(function)


def _only_option(function: Any) -> Any:
    return click.option(
        "--only", multiple=True, metavar="KERNEL/SCENARIO/FAULTS/SEED",
        help="These runs: names or patterns, the last parts may be left out. A run named in full is run again.",
    )(function)  # fmt: skip


@campaign.command("run", epilog=EPILOG)
@click.argument("file")
@_only_option
@click.option(
    "--workers", type=click.IntRange(0, 1024), metavar="N", help="Processes. Default: one for each core; 0: here."
)
@click.option("--scheduler", metavar="ADDRESS", default="", help="A Dask cluster's, as tcp://HOST:8786, instead.")
@click.option("--fresh", is_flag=True, help="Forget the results that there are.")
@_results_option
@click.option("-q", "--quiet", is_flag=True, help="On stderr nothing but errors.")
def run_command(
    file: str, only: tuple[str, ...], workers: int | None, scheduler: str, fresh: bool, results: str | None, quiet: bool
) -> int:
    """Run the campaign in FILE, or go on with it: what is done is not done again, unless its definition has changed."""
    from pvirq.cli.messages import Messages
    from pvirq.lab.campaign.plan import Plan
    from pvirq.lab.campaign.spec import load
    from pvirq.lab.campaign.store import Store, exclusive, results_path

    if scheduler and workers is not None:
        raise click.UsageError("--workers and --scheduler exclude each other")
    say = Messages(quiet)
    plan = Plan(load(file), say.note)
    wanted = plan.select(only)
    path = Path(results) if results else results_path(file)
    with exclusive(path), Store(path, create=True) as store:
        source = plan.campaign.source
        store.plan(plan.campaign.name, file, source.text, plan, fresh=fresh)
        return _Session(file, store, say).run(wanted, only, workers, scheduler)


class _Session:
    """One time that a campaign is run."""

    def __init__(self, file: str, store: Store, say: Messages) -> None:
        self._file, self._store, self._say = file, store, say

    def run(self, wanted: list[Run], only: tuple[str, ...], workers: int | None, scheduler: str) -> int:
        from pvirq.cli.campaign_view import View
        from pvirq.cli.terminal import Interrupted, Interrupts
        from pvirq.lab.campaign import workers as lab
        from pvirq.lab.campaign.plan import names_one

        done = self._store.done()
        again = {pattern for pattern in only if names_one(pattern)}
        left = [run for run in wanted if run.name in again or (*_key(run), run.cell.definition) not in done]
        interrupts = Interrupts()

        def look(seconds: float) -> None:
            interrupts.check()
            if seconds:
                interrupts.wait(int(seconds * 1e9))

        status = 0
        with interrupts, View(len(left), len(wanted) - len(left), self._say) as view:
            try:
                here = workers == 0 or (workers is None and not scheduler and len(left) < 2)
                outcomes = (
                    lab.here(left, look) if here
                    else lab.on_workers(left, look, workers=min(workers or lab.cores(), len(left)), scheduler=scheduler)
                )  # fmt: skip
                if left:
                    for run, outcome in outcomes:
                        self._keep(run, outcome, run.name in again)
                        view.add(run, outcome)
            except Interrupted as interrupted:
                status = interrupted.status
            finally:
                if left:
                    outcomes.close()  # type: ignore[attr-defined]
        if status:
            self._say.error(
                f"interrupted: {view.done} of {len(left)} runs were done; the same command goes on with the rest"
            )
        return self._summary(wanted, again, status)

    def _keep(self, run: Run, outcome: Outcome, compare: bool) -> None:
        """Into the file; a run that is repeated has to be what it was."""
        if compare:
            before = self._store.get(run.name)
            if before is not None and before.definition == run.cell.definition and before.trace_hash:
                same = before.trace_hash == outcome.trace_hash
                self._say.note(f"{run.name}: the trace is {'the same as' if same else 'NOT that of'} the last time")
        command = f"pvirq campaign run {shlex.quote(self._file)} --only {run.name}"
        self._store.add(run, outcome, command)

    def _summary(self, wanted: list[Run], again: set[str], status: int) -> int:
        from pvirq.lab.campaign import report

        keys = {_key(run) for run in wanted}
        results = [
            result for result in self._store.results("1")
            if (result.kernel, result.scenario, result.faults, result.seed) in keys
        ]  # fmt: skip
        verdicts = Counter(result.verdict for result in results)
        if again and len(results) <= len(again):
            for result in results:
                click.echo(report.failure_text(result), nl=False)
        elif results:
            click.echo(report.table(report.summarise(results)), nl=False)
            for line in report.failure_lines(results):
                click.echo(line)
            click.echo(f"{len(results)} of {len(wanted)} runs: {report.totals(verdicts)}; results: {self._store.path}")
        return status or (0 if verdicts["pass"] == len(wanted) else EXIT_FAILED)


def _key(run: Run) -> tuple[str, str, str, int]:
    return run.cell.kernel, run.cell.scenario, run.cell.faults, run.seed


def _print_settings(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from pvirq.lab.campaign.spec import describe

    for title, settings in describe():
        width = max(len(key) for key, _, _ in settings)
        click.echo(title)
        for key, kind, about in settings:
            click.echo(f"  {key:{width}}  {about}\n  {'':{width}}    {kind}")
    context.exit()


@campaign.command("list")
@click.argument("file")
@_only_option
@click.option("--runs", is_flag=True, help="Each run by name, instead of how many there are of each kind.")
@click.option(
    "--settings",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_settings,
    help="What a campaign's file may have, and end.",
)
@_results_option
def list_command(file: str, only: tuple[str, ...], runs: bool, results: str | None) -> int:
    """List what FILE has to be run, and how much of it is done."""
    from pvirq.cli.messages import Messages
    from pvirq.lab.campaign.plan import Plan
    from pvirq.lab.campaign.spec import load
    from pvirq.lab.campaign.store import Store, results_path

    plan = Plan(load(file), Messages().note)
    wanted = plan.select(only)
    path = Path(results) if results else results_path(file)
    done: set[tuple[str, str, str, int, str]] = set()
    if path.exists():
        with Store(path) as store:
            done = store.done()
    finished = {run.name for run in wanted if (*_key(run), run.cell.definition) in done}
    if runs:
        for run in wanted:
            click.echo(f"{run.name}{'  done' if run.name in finished else ''}")
        return 0
    cells = Counter(run.cell.name for run in wanted)
    ready = Counter(run.cell.name for run in wanted if run.name in finished)
    width = max(map(len, cells))
    for name, count in cells.items():
        click.echo(f"{name:{width}}  {count:>7} runs  {ready[name]:>7} done")
    click.echo(f"{'':{width}}  {len(wanted):>7} runs  {len(finished):>7} done")
    return 0


@campaign.command("report")
@click.argument("results", metavar="FILE | RESULTS")
@click.option("--plot", metavar="OUT.svg|png", help="Plot verdicts, times and failing seeds into a file.")
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON.")
@click.option("--failures", is_flag=True, help="Each run that didn't pass, with its last lines.")
def report_command(results: str, plot: str | None, as_json: bool, failures: bool) -> int:
    """Print and plot the results of a campaign, also of one that goes on."""
    import json

    from pvirq.lab.campaign import report
    from pvirq.lab.campaign.store import Store, results_path

    with Store(results_path(results)) as store:
        about = store.campaign()
        found = list(store.results())
    cells = report.summarise(found)
    verdicts = Counter(result.verdict for result in found)
    if plot:
        from pvirq.lab.campaign.plots import plot as draw

        draw(about.get("name", ""), found, Path(plot))
    if as_json:
        whole = {"campaign": about, "cells": [c.to_json() for c in cells], "runs": [vars(result) for result in found]}
        click.echo(json.dumps(whole, indent=1))
    elif failures:
        for result in found:
            if result.verdict != "pass":
                click.echo(report.failure_text(result))
    elif found:
        click.echo(report.table(cells), nl=False)
        for line in report.failure_lines(found):
            click.echo(line)
    if not as_json:
        click.echo(
            f"{about.get('name', results)}: {len(found)} of {about.get('runs', 0)} runs: {report.totals(verdicts)}"
        )
    return 0 if found and verdicts["pass"] == len(found) else EXIT_FAILED


@campaign.command("trace")
@click.argument("results", metavar="FILE | RESULTS")
@click.argument("run", metavar="KERNEL/SCENARIO/FAULTS/SEED")
def trace_command(results: str, run: str) -> int:
    """Write the trace of a run to stdout: JSON lines."""
    from pvirq.lab.campaign.spec import CampaignError
    from pvirq.lab.campaign.store import Store, results_path

    with Store(results_path(results)) as store:
        result = store.find(run)
        trace = store.trace(result)
    if trace is None:
        raise CampaignError(f"{run}: no trace was kept ([campaign] trace); its command: {result.command}")
    sys.stdout.buffer.write(trace)
    sys.stdout.buffer.flush()
    return 0
