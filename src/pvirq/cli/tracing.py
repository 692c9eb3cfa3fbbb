"""The --trace option of commands that run a host."""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from pvirq.cli.invocation import current

if TYPE_CHECKING:
    from pvirq.host import Host

PERFETTO: Final = ".pftrace"

option: Final = click.option(
    "--trace", metavar="FILE",
    help=f"Write a trace of every event, in lines of JSON; for Perfetto where FILE ends in {PERFETTO}.",
)  # fmt: skip


@contextmanager
def traced(host: Host, file: str | None, **inputs: bytes | Path) -> Iterator[None]:
    """A trace of what `host` does within, in `file` at the end; None: no trace.

    What the command was, and the digests of its `inputs`, go into the file's first line. In `pvirq replay` there is no
    file, but the recorded trace to be compared: RecordedError for other inputs, Different. OSError, and what `convert`
    raises.
    """
    from pvirq.lab.trace import Trace  # not at start-up: most commands have none

    invocation = current()
    if file is None:
        yield
        return
    digests = {name: _digest(data) for name, data in inputs.items()}
    if invocation is not None and invocation.against is not None:
        invocation.against.check_inputs(digests)
        with Trace(host, against=invocation.against):
            yield
        invocation.against.finish()
        return
    header = {} if invocation is None else {"command": list(invocation.command), "inputs": digests}
    if not file.endswith(PERFETTO):
        with Trace(host, file, header=header):
            yield
        return
    convert = _converter()
    Path(file).open("wb").close()  # what can't be written had better be known before
    with tempfile.TemporaryDirectory(prefix="pvirq-trace-") as scratch:
        lines = Path(scratch) / "trace.jsonl"
        try:
            with Trace(host, lines, header=header):
                yield
        finally:
            convert(lines, file)


def _digest(data: bytes | Path) -> str:
    """sha256 of bytes or of a file, which is read only where there is a trace."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converter() -> Callable[[Path, str], None]:
    """What writes Perfetto's format, when it is sure that it can."""
    perfetto: Any = importlib.import_module("pvirq.lab.traceview.perfetto")
    perfetto.check_perfetto()
    convert: Callable[[Path, str], None] = perfetto.convert
    return convert
