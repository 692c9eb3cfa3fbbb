"""`pvirq model --watch`: the tables of a running scenario, live in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pvirq.cli.terminal import Interrupts
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.scenario.run import Run

REFRESH_S: Final = 0.25


class Watch:
    """Shows `text()` again and again while the scenario runs; what has changed since the last time stands out.

    `speed` is how many virtual seconds go into a real one at most. It ends with the workload.
    """

    def __init__(self, run: Run, text: Callable[[], str], speed: float) -> None:
        self._run = run
        self._speed = speed
        self._text = text
        self._before: list[str] = []
        self._console = Console(highlight=False)

    def show(self, interrupts: Interrupts) -> None:
        """Until the workload is done. Interrupted by a signal, with the terminal as it was before."""
        host = self._run.host
        begin, began = time.monotonic(), host.clock.now()
        live = Live(self._picture(), console=self._console, auto_refresh=False, transient=True)
        try:
            live.start(refresh=True)
            done = False
            while not done:
                until = time.monotonic() + REFRESH_S
                target = began + int((until - begin) * self._speed * NS_PER_S)
                done = self._run.run(target)
                live.update(self._picture(), refresh=True)
                interrupts.wait(max(int((until - time.monotonic()) * NS_PER_S), 0))
                interrupts.check()
        finally:
            live.stop()

    def _picture(self) -> Group:
        run = self._run
        seconds = run.host.clock.now() / NS_PER_S
        head = Text(f"{seconds:10.2f} s   {run.times_done} of {run.times} done   Ctrl-C leaves", style="reverse")
        height, width = self._console.height, self._console.width
        lines = self._text().split("\n")
        body = Text(no_wrap=True, overflow="ellipsis")
        for i, line in enumerate(lines[: height - 2]):
            changed = i >= len(self._before) or self._before[i] != line
            body.append(line[:width] + "\n", style="bold" if changed and self._before else "")
        self._before = lines
        return Group(head, body)
