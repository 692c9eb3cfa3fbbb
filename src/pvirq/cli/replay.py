"""`pvirq replay`: a recorded run once more, and whether it is the same."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from pvirq.cli.invocation import Invocation

EXIT_DIFFERENT = 1
REPEATABLE_ALWAYS = ("model",)  # commands whose runs are the same without a seed


@click.command()
@click.argument("trace", type=click.Path(dir_okay=False))
@click.option("-v", "--verbose", is_flag=True, help="Show what the run prints.")
def replay(trace: str, verbose: bool) -> int:
    """Run again what a trace was recorded of, and compare.

    TRACE is what `pvirq boot --seed NUMBER --trace TRACE ...` wrote, or `restore` or `model`; lines of JSON. The same
    command is run, with the files that it names, relative to this directory. At the first event that differs the run
    ends, and both are shown with what came before.

    A program's own trace is compared by the program: Trace(host, against=Recorded(path)).

    \b
    Exit status:
      0    the same run, to its end
      1    it differs
      2    not a trace, or none that a command recorded; another kernel or initrd than then
    """
    from pvirq.cli.main import invoke
    from pvirq.cli.messages import Messages
    from pvirq.lab.replay import Different, Recorded, RecordedError

    with Recorded(trace) as recorded, contextlib.ExitStack() as stack:
        command = recorded.header.get("command")
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise RecordedError(f"{trace}: not recorded by a command of pvirq's: run its program again")
        if recorded.header.get("seed") is None and command[:1] not in ([name] for name in REPEATABLE_ALWAYS):
            raise RecordedError(f"{trace}: recorded without --seed: such a run can't be repeated")
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        try:
            invoke(command, Invocation(command, recorded))
        except Different as different:
            stack.close()
            click.echo(different.report())
            return EXIT_DIFFERENT
        Messages().note(f"{trace}: the same run, {recorded.line - 1} events")
        return 0
