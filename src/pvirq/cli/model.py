"""`pvirq model`: run a scenario of modelled domains and print their interrupts."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

import click

from pvirq.cli import tracing

if TYPE_CHECKING:
    from pvirq.cli.messages import Messages
    from pvirq.cli.terminal import Interrupts
    from pvirq.scenario.run import Member, Run
    from pvirq.scenario.schema import Scenario

EPILOG: Final = """\b
Examples:
  pvirq model --list                         the scenarios that ship, kernels, devices, workloads
  pvirq model writeup-guest                  a guest's /proc/interrupts, from 256 up
  pvirq model writeup-dom0 -m dom0           which port is which IRQ in domain 0
  pvirq model writeup-guest --set guest.vcpus=2 --before
  pvirq model my.toml -i dom0 -i guest -l guest --seed 7
  pvirq model my.toml --watch                the counts as they grow

\b
Exit status:
  0     the scenario ran to its end; --watch was left
  2     bad input: options or the scenario; one line says file, line and what was expected
  130   Ctrl-C
"""


@click.command(epilog=EPILOG, short_help="Run a scenario of modelled domains and print their interrupts.")
@click.argument("scenario", required=False)
@click.option("-i", "--interrupts", multiple=True, metavar="DOMAIN", help="Print the /proc/interrupts of a domain.")
@click.option("-l", "--lsevtchn", multiple=True, metavar="DOMAIN", help="Print the lsevtchn of a domain.")
@click.option("-m", "--map", "maps", multiple=True, metavar="DOMAIN", help="Print which port is which IRQ in a domain.")
@click.option("-d", "--dmesg", multiple=True, metavar="DOMAIN", help="Print what a domain's kernel said.")
@click.option("--before", is_flag=True, help="Print the same before the workload begins, too.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Another seed than the scenario's.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Change a setting of the scenario: dom0.vcpus=8, NAME.vcpus=2 of a domain, duration=10s.",
)  # fmt: skip
@click.option("--watch", is_flag=True, help="Show the tables live, in this terminal; Ctrl-C leaves.")
@click.option(
    "--speed", type=click.FloatRange(min=0, min_open=True), metavar="N", default=1.0,
    help="With --watch: virtual seconds in a real one, at most. Default: 1.",
)  # fmt: skip
@tracing.option
@click.option("--list", "listing", is_flag=True, help="List what there is for scenarios, and end.")
@click.option("-q", "--quiet", is_flag=True, help="On stderr nothing but errors.")
def model(
    scenario: str | None, interrupts: tuple[str, ...], lsevtchn: tuple[str, ...], maps: tuple[str, ...],
    dmesg: tuple[str, ...], before: bool,
    seed: int | None, settings: tuple[str, ...], watch: bool, speed: float, trace: str | None, listing: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Run a scenario of modelled domains: kernels whose interrupt layer is Python, on real event channels.

    SCENARIO is a TOML file, or the name of a scenario that ships. It says which domains there are, their kernels,
    devices and workload; each count in what is printed is an interrupt that happened. DOMAIN is a name of the
    scenario's, "dom0", or "*" for all.

    Without -i, -l, -m and -d it prints the /proc/interrupts of the domains that the scenario wants shown.
    """
    from pvirq.cli.messages import Messages
    from pvirq.scenario.load import load

    if listing:
        from pvirq.cli.model_list import listing_text

        click.echo(listing_text(), nl=False)
        return 0
    if scenario is None:
        raise click.UsageError("expected a SCENARIO: a TOML file or a name; --list tells them")
    if watch and not sys.stdout.isatty():
        raise click.UsageError("--watch needs a terminal on stdout")
    overrides = [*settings, *([] if seed is None else [f"seed={seed}"])]
    loaded = load(scenario, overrides)
    wanted = [("interrupts", interrupts), ("lsevtchn", lsevtchn), ("map", maps), ("dmesg", dmesg)]
    return _Session(loaded, wanted, Messages(quiet)).run(before=before, speed=speed if watch else 0, trace=trace)


class _Session:
    """One scenario's run: what to print of it, and when."""

    def __init__(self, scenario: Scenario, wanted: list[tuple[str, tuple[str, ...]]], messages: Messages) -> None:
        self._scenario = scenario
        self._wanted = wanted
        self._messages = messages
        self._views: list[tuple[str, Member]] = []

    def run(self, *, before: bool, speed: float, trace: str | None) -> int:
        """Run it and print; with a `speed` live, at so many virtual seconds in a real one."""
        from pvirq.cli.terminal import Interrupted, Interrupts

        with Interrupts() as interrupts:
            try:
                self._run(interrupts, before, speed, trace)
            except Interrupted as interrupted:
                return interrupted.status
            finally:
                self._messages.end()
        return 0

    def _run(self, interrupts: Interrupts, before: bool, speed: float, trace: str | None) -> None:
        from pvirq.cli.terminal import Interrupted
        from pvirq.scenario.run import Run
        from pvirq.scenario.schema import ScenarioError

        messages, name = self._messages, self._scenario.source.file

        def on_turn() -> None:
            messages.tick()
            interrupts.check()

        messages.begin(f"building {name}")
        with Run(self._scenario, on_built=on_turn) as run, tracing.traced(run.host, trace):
            run.host.on_turn = on_turn
            self._views = self._find_views(run)
            run.connect()
            messages.end()
            if before:
                sys.stdout.write(self.text(run, "before") + "\n")
            run.start()
            if speed:
                from pvirq.cli.model_watch import Watch

                with contextlib.suppress(Interrupted):  # then the tables as they are
                    Watch(run, lambda: self.text(run, ""), speed).show(interrupts)
            else:
                messages.begin(f"running {name}")
                try:
                    run.run()
                except ScenarioError:
                    messages.end()
                    if any(names for _, names in self._wanted):
                        sys.stdout.write(self.text(run, "then"))  # what was asked for may tell why
                    raise
                messages.end()
            sys.stdout.write(self.text(run, "after" if before else ""))

    def _find_views(self, run: Run) -> list[tuple[str, Member]]:
        views = []
        for view, names in self._wanted:
            for name in names:
                found = run.find(name)
                if not found:
                    known = ", ".join(list(run.members)[:8])
                    raise click.UsageError(f"no domain {name!r} in {self._scenario.source.file}; there are {known}")
                views += [(view, member) for member in found]
        if not views:
            shown = self._scenario.show or ["*"]
            views = [("interrupts", member) for name in shown for member in run.find(name)]
        return views

    def text(self, run: Run, when: str) -> str:
        """All that is to be printed; each part with a line that says what it is, where there are several."""
        texts = []
        for view, member in self._views:
            title = f"{member.name}: {_TITLES[view]}{f' {when}' if when else ''}\n"
            texts.append((title if len(self._views) > 1 or when else "") + run.view(view, member))
        return "\n".join(texts)


_TITLES: Final = {"interrupts": "/proc/interrupts", "lsevtchn": "lsevtchn", "map": "ports and IRQs", "dmesg": "dmesg"}
