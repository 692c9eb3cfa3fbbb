"""`pvirq check`: the known races, and one's own models, searched, explained and replayed."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from pvirq.cli.messages import Messages

if TYPE_CHECKING:
    from pvirq.check import Failure, Model
    from pvirq.check.guided import Moved
    from pvirq.check.load import Check
    from pvirq.check.pct import PctResult
    from pvirq.check.result import Result

    Found = Result | PctResult

EXIT_UNEXPECTED: Final = 1
EXIT_INCOMPLETE: Final = 3
WIDTH: Final = 120  # of the columns where stdout is no terminal

EPILOG: Final = """\b
Examples:
  pvirq check                                   the races that pvirq knows
  pvirq check fifo-ready                        found with the fault, clean without?
  pvirq check fifo-ready --explain              its story, and the shortest schedule that shows it
  pvirq check --all --jobs 2                    every one of them
  pvirq check my_driver.py --explain            functions check_... of a file
  pvirq check my_driver.py::check_irq --order tso --svg race.svg
  pvirq check NAME --fault on --save race.json  keep the schedule
  pvirq check --schedule race.json              follow it again, on the model as it is now
  pvirq check NAME --random 10000 --depth 3     seeds instead of all schedules (PCT)

\b
Exit status:
  0     as it should be: faults found, cured and own models clean
  1     not so
  2     bad input: options, a model that can't be run, a schedule that doesn't fit
  3     not searched to the end: --max-states
  130   Ctrl-C
"""

_OUT: Final = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=EPILOG, short_help="Explore all schedules of event-channel protocols.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="All known races.")
@click.option(
    "--fault", type=click.Choice(["on", "off", "both"]), default="both",
    help="Of races: only with the fault, or only cured. Default: both.",
)  # fmt: skip
@click.option("--order", type=click.Choice(["sc", "tso", "weak"]), help="Another memory order than the model's own.")
@click.option("--explain", is_flag=True, help="Print the shortest schedule to a failure, a column a CPU.")
@click.option("--lines", is_flag=True, help="With --explain: where in the model's source each step is.")
@click.option("--svg", type=_OUT, metavar="OUT", help="Draw that schedule into an SVG file.")
@click.option("--mermaid", type=_OUT, metavar="OUT", help="Write it as a Mermaid sequence diagram.")
@click.option("--save", type=_OUT, metavar="OUT", help="Write it into a file for --schedule.")
@click.option("--schedule", type=click.Path(path_type=Path), metavar="FILE", help="Follow a schedule of --save's.")
@click.option("--random", "runs", type=click.IntRange(1, 1 << 40), metavar="N", help="N random schedules (PCT).")
@click.option("--depth", type=click.IntRange(1, 50), metavar="D", help="With --random: how deep a bug. Default: 3.")
@click.option("--seed", type=click.IntRange(0, 1 << 62), metavar="S", help="With --random: the first seed. Default: 0.")
@click.option("--max-states", type=click.IntRange(1), metavar="N", help="Give up after so many states.")
@click.option("--no-reduction", is_flag=True, help="Search every order, also of steps that don't touch each other.")
@click.option("--jobs", type=click.IntRange(1, 1024), metavar="N", help="Processes at once. Default: one a CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, a line each.")
@click.option("-q", "--quiet", is_flag=True, help="On stderr nothing but errors.")
def check(
    names: tuple[str, ...], everything: bool, fault: str, order: str | None, explain: bool, lines: bool,
    svg: Path | None, mermaid: Path | None, save: Path | None, schedule: Path | None, runs: int | None,
    depth: int | None, seed: int | None, max_states: int | None, no_reduction: bool, jobs: int | None,
    as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Search all schedules of small concurrent programs for one in which a property breaks.

    NAME is a known race of event channels, or FILE.py, whose functions check_... each return a pvirq.check.Model, or
    FILE.py::check_it. Without NAME the known races are listed. A race is searched with the fault, which has to be
    found, and cured, which has to be clean; a model of one's own has to be clean.

    docs/check.md tells how to write models and what the figures mean.
    """
    pictures = _Pictures(explain, lines, svg, mermaid, save)
    if schedule is not None:
        if names or everything or runs:
            raise click.UsageError("--schedule says itself what it is of")
        return _follow(schedule, pictures, as_json)
    if runs is None and (depth is not None or seed is not None):
        raise click.UsageError("--depth and --seed are for --random")
    if runs is not None and (max_states is not None or no_reduction):
        raise click.UsageError("--max-states and --no-reduction are for the search of all schedules, not for --random")
    if not names and not everything:
        return _list(as_json)
    checks = _checks(names, everything, fault)
    if (svg or mermaid or save) and len(
        {(each.name, each.fault) for each in checks if each.fault or not each.race}
    ) > 1:
        raise click.UsageError("--svg, --mermaid and --save are for one check: name one, with --fault on or off")
    ways = _Ways(order, runs, depth or 3, seed or 0, max_states, not no_reduction, jobs)
    return _Session(checks, ways, pictures, as_json, Messages(quiet)).run()


def _checks(names: tuple[str, ...], everything: bool, fault: str) -> list[Check]:
    from pvirq.check.load import find
    from pvirq.check.race import races

    wanted = [*(races() if everything else ()), *(name for name in names if not everything or name not in races())]
    found: list[Check] = []
    for name in dict.fromkeys(wanted):
        found += find(name, faulty=fault != "off", cured=fault != "on")
    return found


def _list(as_json: bool) -> int:
    from pvirq.check.race import races

    known = races()
    width = max((len(name) for name in known), default=0)
    for name, race in known.items():
        if as_json:
            click.echo(
                json.dumps(
                    {"name": name, "title": race.title, "where": race.where, "brought": race.brought,
                     "cured": race.cured, "story": race.story}
                )
            )  # fmt: skip
        else:
            click.echo(f"{name:{width}}  {race.title}")
    if not as_json:
        click.echo("\n`pvirq check NAME --explain` has the story of one, and finds it. FILE.py: models of your own.")
    return 0


@dataclass(frozen=True)
class _Pictures:
    """What is to be made of a schedule."""

    explain: bool
    lines: bool
    svg: Path | None
    mermaid: Path | None
    save: Path | None

    @property
    def wanted(self) -> bool:
        return self.explain or bool(self.svg or self.mermaid or self.save)

    def show(self, check: Check, model: Model, moved: list[Moved], wrong: str | None) -> None:
        from pvirq.check import schedulefile
        from pvirq.check.diagram import mermaid, svg
        from pvirq.check.explain import columns

        if self.explain:
            width = shutil.get_terminal_size((WIDTH, 24)).columns
            for line in columns(model, moved, wrong, width, self.lines):
                click.echo(line)
            click.echo()
        if self.svg:
            self.svg.write_text(svg(model, moved, wrong, check.name))
        if self.mermaid:
            self.mermaid.write_text(mermaid(model, moved, wrong))
        if self.save:
            steps = tuple((each.process, each.choice) for each in moved)
            kept = schedulefile.Schedule(check.name, check.fault, model.order, wrong, steps)
            schedulefile.write(self.save, kept, moved)


@dataclass(frozen=True)
class _Ways:
    """How to search."""

    order: str | None
    runs: int | None
    depth: int
    seed: int
    max_states: int | None
    reduce: bool
    jobs: int | None

    def model(self, check: Check) -> Model:
        model = check()
        if self.order is not None:
            model.order = self.order
        return model


def _follow(path: Path, pictures: _Pictures, as_json: bool) -> int:
    """--schedule: the exit status is 0 if it ends as it did when it was written."""
    from pvirq.check import schedulefile
    from pvirq.check.guided import follow
    from pvirq.check.load import find

    schedule = schedulefile.read(path)
    (check,) = find(schedule.check, faulty=schedule.fault, cured=not schedule.fault)[:1]
    model = check()
    model.order = schedule.order
    moved, wrong = follow(model, schedule.steps)
    pictures.show(check, model, moved, wrong)
    if as_json:
        click.echo(json.dumps({"check": check.name, "fault": check.fault, "steps": len(moved), "broken": wrong}))
    elif not pictures.explain:
        click.echo(f"{check.name}: {len(moved)} steps: {wrong or 'nothing is wrong'}")
    return 0 if wrong == schedule.broken else EXIT_UNEXPECTED


@dataclass
class _Session:
    """Searches, and what is printed of them."""

    checks: list[Check]
    ways: _Ways
    pictures: _Pictures
    as_json: bool
    messages: Messages

    def run(self) -> int:
        status = 0
        for check, result in self._results():
            wrong = self._judge(check, result)
            if wrong:
                status = EXIT_UNEXPECTED if EXIT_UNEXPECTED in (status, wrong) else wrong
            self._print(check, result, wrong)
        return status

    def _results(self) -> Iterator[tuple[Check, Found]]:
        """What came of each check, in their order: a check a process, or a check's random runs shared out."""
        from pvirq.check.cores import cores, in_order

        jobs = min(self.ways.jobs or cores(), len(self.checks))
        if self.ways.runs is not None:
            yield from ((check, self._random(check)) for check in self.checks)
        elif jobs == 1:
            yield from ((check, self._search(check)) for check in self.checks)
        else:
            for check in self.checks:
                self.ways.model(check)  # what is wrong with a file is said before anything is searched
            done = 0
            self.messages.begin("searching")
            quiet = replace(self, messages=Messages(quiet=True))
            tick = lambda: self.messages.tick(f"{done} of {len(self.checks)}, ")  # noqa: E731
            for check, result in zip(self.checks, in_order(quiet._search, self.checks, jobs, tick), strict=True):
                self.messages.clear()
                yield check, result
                done += 1
            self.messages.end()

    def _search(self, check: Check) -> Found:
        from pvirq.check import explore
        from pvirq.check.shortest import shorten

        self.messages.begin(f"searching {check.name}")
        found = explore(
            self.ways.model(check), reduce=self.ways.reduce, max_states=self.ways.max_states,
            on_progress=lambda result: self.messages.tick(f"{result.states:,} states, "),
        )  # fmt: skip
        if found.failure is not None and self.pictures.wanted:
            self.messages.begin(f"{check.name}: looking for the shortest schedule")
            found = replace(found, failure=shorten(self.ways.model(check), found.failure, same=False))
        self.messages.end()
        return found

    def _random(self, check: Check) -> Found:
        from pvirq.check.cores import cores
        from pvirq.check.pct import pct
        from pvirq.check.shortest import shorten

        self.messages.begin(f"running {check.name}")
        assert self.ways.runs is not None
        found = pct(
            self.ways.model(check), depth=self.ways.depth, jobs=self.ways.jobs or cores(),
            seeds=range(self.ways.seed, self.ways.seed + self.ways.runs),
            on_progress=lambda result: self.messages.tick(f"{result.runs:,} schedules, "),
        )  # fmt: skip
        if self.pictures.wanted:
            for seed, failure in found.failures.items():
                found.failures[seed] = shorten(self.ways.model(check), failure, same=False)
        self.messages.end()
        return found

    def _judge(self, check: Check, result: Found) -> int:
        """The exit status that a result makes."""
        if _failure(result) is not None:
            return 0 if check.fault else EXIT_UNEXPECTED
        if self.ways.runs is None and not _complete(result):
            return EXIT_INCOMPLETE
        return EXIT_UNEXPECTED if check.fault else 0

    def _print(self, check: Check, result: Found, wrong: int) -> None:
        failure = _failure(result)
        if self.as_json:
            click.echo(json.dumps(self._values(check, result, wrong)))
        else:
            if check.race is None or check.fault or len({each.fault for each in self.checks}) == 1:
                click.echo(f"{check.name}: {check.title}" if check.title else check.name)
                if check.race is not None and self.pictures.explain:
                    click.echo(_story(check))
            head = "" if check.race is None else "with the fault: " if check.fault else "cured: "
            for line in textwrap.wrap(f"{head}{_words(result, wrong)}", WIDTH - 4, subsequent_indent="  "):
                click.echo(f"  {line}")
        if failure is not None and self.pictures.wanted:
            from pvirq.check.guided import follow

            model = self.ways.model(check)
            if self.pictures.explain and not self.as_json:
                click.echo()
            self.pictures.show(check, model, *follow(model, failure.schedule))

    def _values(self, check: Check, result: Found, wrong: int) -> dict[str, Any]:
        values = asdict(result)
        failure = _failure(result)
        failures = values.pop("failures", {})
        values.pop("failure", None)
        return {
            "check": check.name, "fault": check.fault if check.race else None, "as_expected": not wrong,
            "broken": failure.message if failure else None, "schedule": failure.schedule if failure else None,
            **({"seed": min(failures, default=None)} if self.ways.runs is not None else {}), **values,
        }  # fmt: skip


def _failure(result: Found) -> Failure | None:
    from pvirq.check.result import Result

    return result.failure if isinstance(result, Result) else next(iter(result.failures.values()), None)


def _complete(result: Found) -> bool:
    from pvirq.check.result import Result

    return isinstance(result, Result) and result.complete


def _words(result: Found, wrong: int) -> str:
    """What came of a search, in a sentence or two."""
    from pvirq.check.result import Result

    failure = _failure(result)
    found = f"{'BROKEN' if wrong else 'found'}: {failure.message} ({len(failure.schedule)} steps)." if failure else ""
    if isinstance(result, Result):
        size = f"{result.states:,} states, {result.steps:,} steps, {result.seconds:.1f} s"
        size += "".join(f"; {note}" for note in result.notes)
        if failure is not None:
            return f"{found} Searched: {size}"
        if not result.complete:
            return f"nothing found, but not searched to the end: {size}"
        return f"{'NOT FOUND, all is clean' if wrong else 'clean'}: {size}"
    size = f"{result.runs:,} schedules of up to {result.longest:,} steps"
    if result.cut:
        size += f"; {result.cut:,} of them were cut off there, since they go on and on"
    if failure is not None:
        return f"{found} Seed {min(result.failures)}, after {size}"
    return (
        f"nothing found in {size}; each had a chance of 1 in {1 / result.bound:,.0f} or more to meet a given bug of "
        f"depth {result.depth}"
    )


def _story(check: Check) -> str:
    race = check.race
    assert race is not None
    facts = [("where", race.where), ("brought", race.brought), ("cured", race.cured)]
    lines = [f"  {name:8} {text}" for name, text in facts if text]
    lines += [
        "",
        *textwrap.wrap(" ".join(race.story.split()), WIDTH - 4, initial_indent="  ", subsequent_indent="  "),
        "",
    ]
    return "\n".join(lines)
