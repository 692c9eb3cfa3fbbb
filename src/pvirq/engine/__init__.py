"""CPUs that execute guest code. Nothing of Xen is known here.

`open_engine(name, ...)` makes one; `ENGINES` names those there are. The protocol that they meet is in
`pvirq.engine.protocol`, and no module outside this package names an emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pvirq.engine.protocol import EngineError

if TYPE_CHECKING:
    from pvirq.engine.protocol import Engine, GuestHandler

__all__ = ["DEFAULT_ENGINE", "ENGINES", "EngineError", "open_engine"]

DEFAULT_ENGINE = "unicorn"


def _unicorn(memory: memoryview, handler: GuestHandler, repeatable: bool) -> Engine:
    from pvirq.engine.unicorn import UnicornEngine

    return UnicornEngine(memory, handler, repeatable)


ENGINES: dict[str, Callable[[memoryview, GuestHandler, bool], Engine]] = {"unicorn": _unicorn}


def open_engine(name: str, memory: memoryview, handler: GuestHandler, *, repeatable: bool = False) -> Engine:
    """A CPU over `memory` (machine address 0 is its first byte) that reports to `handler`.

    Its counter counts what it executes, so two runs of the same code over the same memory are the same, to the
    instruction at which they end. With `repeatable` that holds however much is executed, for more memory.

    EngineError, one line, for an unknown name or an engine that can't work here.
    """
    make = ENGINES.get(name)
    if make is None:
        raise EngineError(f"no engine {name!r}: choose one of {', '.join(ENGINES)}")
    return make(memory, handler, repeatable)
