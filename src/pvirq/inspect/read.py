"""Reads texts of any of the known forms, by their contents, into a Snapshot.

Each line is looked at by itself, with a memory of what its section began with: so lines of other programs in between do
no harm, several dumps may stand in one log, and a log is read as a stream. What no parser takes is kept as `Unread`:
neighbouring lines together, their text up to KEPT bytes in all, and beyond RANGES runs the last one grows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pvirq.inspect import interrupts, procirq, toolstack, xendumps
from pvirq.inspect.model import (
    Channel,
    ChannelList,
    DirectVector,
    DomainInfo,
    Interrupts,
    IoapicPin,
    IrqFile,
    IrqLimit,
    Snapshot,
    StoreNode,
    Unread,
    VcpuInfo,
    XenbusCounter,
    XenIrq,
    XlDomain,
    XlVcpu,
)  # fmt: skip
from pvirq.inspect.source import (
    InspectError,
    Line,
    Where,
    files_under,
    lines_of,
    lines_of_text,
    messages,
    open_text,
    without_prefix,
)  # fmt: skip

KEPT: Final = 1 << 20
RANGES: Final = 10_000
LONG: Final = 1 << 15  # no line but a row of /proc/interrupts is longer
Q_OTHER_KEPT: Final = 1000  # lines of a domain's that say nothing of interrupts
ROWS: Final = 1 << 17  # of a table: Linux has fewer IRQs
SMALL_FILE: Final = 1 << 16
BLANK_HEADING: Final = 8  # blanks, at least: a heading's width with no CPU in it
RUN_KEPT: Final = 1 << 14  # bytes of lines that follow one another

NAME_HINT: Final = re.compile(r"(?:^|[^a-z])(?:dom(?:ain)?|d)[-_ .]?(\d{1,5}|u)(?![a-z0-9])", re.IGNORECASE)
DIRECTORY_HINT: Final = re.compile(r"dom(?:ain)?[-_.]?(\d{1,5}|u)", re.IGNORECASE)
COMMAND: Final = re.compile(r"(?:^|[\s/$#>])(lsevtchn|xenstore-ls)(?:\s+-\w+)*(?:\s+(\S{1,300}))?\s*$")
TITLE: Final = re.compile(
    r"\s*(?:domain (\d{1,5})|([A-Za-z0-9_.-]{1,64}): (?:/proc/interrupts|lsevtchn)(?: \w{1,10})?):?\s*$"
)
NR_IRQS: Final = re.compile(r"NR_IRQS: ?\d{1,9},? nr_irqs: ?(\d{1,9})")
# Something of this is in each line by which a section begins, and in those that stand alone.
BEGINS: Final = re.compile(
    r'CPU|IRQ|Apic|irq|xenbus|0x|= "|nformation|pressed|Name|lsevtchn|xenstore-ls|/proc/|domain '
)


def hint_of_name(name: str) -> str:
    """Whose a file is by its name, or a directory's that it is in: a domain's number, "domU", or ""."""
    *directories, base = name.replace(os.sep, "/").split("/")
    match = re.search(r"lsevtchn[-_. ]{0,2}(?:dom)?(\d{1,5}|u)\b", base, re.IGNORECASE) or NAME_HINT.search(base)
    match = match or next(filter(None, map(DIRECTORY_HINT.fullmatch, reversed(directories))), None)
    if match is None:
        return ""
    return "domU" if match[1].lower() == "u" else str(int(match[1]))


class Reader:
    """Takes lines, then `snapshot()`. `read_files` and `read_text` are what most want."""

    def __init__(self) -> None:
        self._interrupts: list[Interrupts] = []
        self._channels: list[ChannelList] = []
        self._items: dict[type, list[Any]] = {
            kind: []
            for kind in (
                XenIrq,
                IoapicPin,
                DirectVector,
                DomainInfo,
                XlDomain,
                XlVcpu,
                StoreNode,
                IrqFile,
                IrqLimit,
                XenbusCounter,
                IrqLimit,
            )
        }
        self._unread: list[Unread] = []
        self._run: _Run | None = None
        self._kept = 0
        self._begin("")

    def _begin(self, hint: str) -> None:
        """A file begins: no section is open."""
        self._hint = hint  # the file's
        self._title = ""  # of the section
        self._table: interrupts.TableBuilder | None = None
        self._ls: tuple[Where, str, list[Channel]] | None = None
        self._e: tuple[Where, int, list[Channel], tuple[int, ...]] | None = None
        self._q: DomainInfo | None = None
        self._q_vcpus: list[VcpuInfo] = []
        self._q_other: list[str] = []
        self._pin: tuple[int, int] | None = None
        self._blank: Where | None = None  # perhaps the heading of a table without CPUs
        self._xl = ""
        self._tree = toolstack.StoreTree()

    @property
    def _open(self) -> bool:
        """Within a section whose lines may look like anything."""
        return bool(self._blank or self._table or self._ls or self._e or self._q or self._xl or self._pin)

    # -- what it takes -------------------------------------------------------------------------------------------------

    def file(self, path: str | os.PathLike[str], hint: str = "") -> None:
        """Read a file, or "-" for standard input. InspectError where it can't be read."""
        name = os.fspath(path)
        stream, binary = open_text(path)
        hint = hint or hint_of_name(name)
        try:
            if binary:
                self._leave(name, 0, "", "no text")
                return
            if procirq.is_path(name):
                text = "\n".join(line.text for line in lines_of(stream, name))[:SMALL_FILE]
                found = procirq.from_path(name, text, hint)
                if found is not None:
                    self._items[type(found)].append(found)
                elif text:
                    self._leave(name, 1, text)
                return
            self.lines(lines_of(stream, name), hint)
        finally:
            if name != "-":
                stream.close()

    def text(self, text: str, name: str, hint: str = "") -> None:
        """Read a text; `name` stands for a file's."""
        self.lines(lines_of_text(text, name), hint or hint_of_name(name))

    def lines(self, lines: Iterable[Line], hint: str = "") -> None:
        """Read the lines of one file."""
        self._begin(hint)
        try:
            for line in lines:
                self._line(line)
        finally:
            self._close_all()

    def leave(self, file: str, reason: str) -> None:
        """Say of a file that it wasn't read."""
        self._leave(file, 0, "", reason)

    def snapshot(self, name: str = "", seconds: float | None = None) -> Snapshot:
        """All that was read up to now."""
        self._end_run()
        items = self._items
        return Snapshot(
            name, seconds, tuple(self._interrupts), tuple(self._channels), tuple(items[XenIrq]),
            tuple(items[IoapicPin]), tuple(items[DirectVector]), tuple(items[DomainInfo]), tuple(items[XlDomain]),
            tuple(items[XlVcpu]), tuple(items[StoreNode]), tuple(items[IrqFile]), tuple(items[XenbusCounter]),
            tuple(items[IrqLimit]),
            tuple(self._unread),
        )  # fmt: skip

    # -- one line ------------------------------------------------------------------------------------------------------

    def _line(self, line: Line) -> None:
        if line.cut:
            self._leave(line.where.file, line.where.line, line.text[:200], "cut: too long")
            return
        if not line.text.strip(" \t"):
            self._blank = line.where if len(line.text) >= BLANK_HEADING else None
            return
        if not self._open and not BEGINS.search(line.text):
            self._leave(line.where.file, line.where.line, line.text)
            return
        for text, from_xen in messages(line.text):
            if self._take(line.where, text, from_xen):
                continue
            plain = without_prefix(text)
            if plain == text or not self._take(line.where, plain, from_xen):
                self._not_taken(line.where, text)

    def _take(self, where: Where, text: str, from_xen: bool) -> bool:
        """Give a message to whichever parser knows it."""
        if not from_xen:
            if (cpus := interrupts.heading(text)) is not None:
                self._begin_table(where, cpus)
                return True
            if self._blank is not None and interrupts.is_bare_row(text):
                self._begin_table(self._blank, ())
            self._blank = None
            if (
                self._table is not None
                and interrupts.is_row(text, len(self._table.cpus))
                and len(self._table.lines) < ROWS
            ):
                self._table.lines.append((where, text))
                return True
        if len(text) > LONG:
            return False
        return self._take_xen(where, text) or (not from_xen and self._take_tool(where, text))

    def _begin_table(self, where: Where, cpus: tuple[int, ...]) -> None:
        self._close_all()
        self._table = interrupts.TableBuilder(where, cpus, self._title or self._hint)

    def _take_tool(self, where: Where, text: str) -> bool:
        channel = toolstack.lsevtchn_line(where, text)
        if channel is not None:
            if self._ls is not None and (self._title or channel.port <= self._ls[2][-1].port):
                self._close_ls()  # ports only go up
            if self._ls is None:
                self._close_table()
                self._ls = (where, self._title or self._hint, [])
                self._title = ""
            self._ls[2].append(channel)
            return True
        if text.startswith("/") or "irq" in text or "xenbus" in text:
            node = toolstack.store_full(where, text)
            found: list[Any] = [node] if node else list(procirq.from_line(where, text, self._hint))
            for item in found:
                self._items[type(item)].append(item)
            if found:
                return True
        if match := NR_IRQS.search(text[:500]):
            self._items[IrqLimit].append(IrqLimit(where, int(match[1])))
            return True
        if toolstack.XL_LIST_HEAD.match(text):
            self._xl = "list"
            return True
        if toolstack.XL_VCPU_HEAD.match(text):
            self._xl = "vcpu-list"
            return True
        if self._xl:
            row = toolstack.xl_list_row(where, text) if self._xl == "list" else toolstack.xl_vcpu_row(where, text)
            if row is not None:
                self._items[type(row)].append(row)
                return True
        node = self._tree.line(where, text) if ' = "' in text else None
        if node is not None:
            self._items[StoreNode].append(node)
            return True
        return False

    def _take_xen(self, where: Where, text: str) -> bool:
        if match := xendumps.E_DOMAIN.match(text):
            self._close_e()
            self._e = (where, int(match[1]), [], ())
            return True
        if self._e is not None:
            channel = xendumps.debug_e_port(where, text)
            if channel is not None:
                self._e[2].append(channel)
                return True
            if match := xendumps.E_POLLING.match(text):
                self._e = (*self._e[:3], xendumps.cpu_list(match[1]))
                return True
        if "IRQ" in text or "Apic" in text or "0x" in text:
            irq = xendumps.debug_i_irq(where, text)
            direct = None if irq else xendumps.debug_i_direct(where, text)
            if irq or direct:
                self._items[XenIrq if irq else DirectVector].append(irq or direct)
                return True
            if match := xendumps.I_PIN_OF.match(text):
                self._pin = (int(match[1]), int(match[2]))
                return True
            pin = xendumps.debug_i_pin(where, text, *self._pin) if self._pin else None
            if pin is not None:
                self._items[IoapicPin].append(pin)
                return True
        return self._take_q(where, text) or (xendumps.E_KNOWN.match(text) or xendumps.I_KNOWN.match(text)) is not None

    def _take_q(self, where: Where, text: str) -> bool:
        if xendumps.Q_BEGIN.match(text):
            return True
        if match := xendumps.Q_DOMAIN.match(text):
            self._close_q()
            self._q = DomainInfo(where, int(match[1]))
            return True
        if self._q is None:
            return False
        domain = self._q
        if match := xendumps.Q_STATE.match(text):
            self._q = replace(domain, dying=int(match[1]), pause_count=int(match[2]))
        elif match := xendumps.Q_HANDLE.match(text):
            self._q = replace(domain, handle=match[1])
        elif vcpu := xendumps.debug_q_vcpu(where, text):
            self._q_vcpus.append(vcpu)
        elif self._q_vcpus and (match := xendumps.Q_PAUSE.match(text)):
            self._q_vcpus[-1] = replace(self._q_vcpus[-1], pause_count=int(match[1]), pause_flags=int(match[2], 16))
        elif xendumps.Q_VCPUS.match(text):
            pass
        elif len(self._q_other) < Q_OTHER_KEPT and xendumps.Q_OTHER.match(text):
            self._q_other.append(text.strip()[:500])
        else:
            return False
        return True

    def _not_taken(self, where: Where, text: str) -> None:
        """Perhaps a title or a command, which say whose the next section is; kept in any case."""
        if len(text) < 400:
            if match := TITLE.match(text):
                self._close_all()
                self._title = match[1] or match[2]
            elif match := COMMAND.search(text):
                self._close_all()
                if match[1] == "lsevtchn":
                    self._title = match[2] if match[2] and match[2].isdecimal() else "0"
                else:
                    root = match[2] or ""
                    self._tree.expect(root.rstrip("/") if root.startswith("/") or not root else root)
        self._leave(where.file, where.line, text)

    # -- sections end --------------------------------------------------------------------------------------------------

    def _close_all(self) -> None:
        self._close_table()
        self._close_ls()
        self._close_e()
        self._close_q()
        self._tree.end()
        self._xl = ""

    def _close_table(self) -> None:
        if self._table is not None:
            table, bad = self._table.finish()
            self._interrupts.append(table)
            for where, text, reason in bad:
                self._leave(where.file, where.line, text[:200], reason)
            self._table = None
            self._title = ""

    def _close_ls(self) -> None:
        if self._ls is not None:
            where, hint, channels = self._ls
            self._channels.append(ChannelList(where, "lsevtchn", tuple(channels), hint=hint))
            self._ls = None

    def _close_e(self) -> None:
        if self._e is not None:
            where, domid, channels, polling = self._e
            self._channels.append(ChannelList(where, "debug-e", tuple(channels), domid, polling=polling))
            self._e = None

    def _close_q(self) -> None:
        if self._q is not None:
            domain = replace(self._q, vcpus=tuple(self._q_vcpus), other=tuple(self._q_other))
            self._items[DomainInfo].append(domain)
            self._q, self._q_vcpus, self._q_other = None, [], []

    def _leave(self, file: str, first: int, text: str, reason: str = "not understood") -> None:
        """Keep what wasn't understood; neighbouring lines become one."""
        run = self._run
        full = len(self._unread) >= RANGES
        if run is not None and run.file == file and run.reason == reason and (first <= run.last + 1 or full):
            run.last = max(run.last, first)
        else:
            self._end_run()
            self._run = run = _Run(file, first, first, reason)
        if text and self._kept < KEPT and run.size < RUN_KEPT:
            text = text[:4000]
            self._kept += len(text)
            run.size += len(text)
            run.texts.append(text)

    def _end_run(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            self._unread.append(Unread(run.file, run.first, run.last, "\n".join(run.texts), run.reason))


@dataclass
class _Run:
    """Lines one after another that nobody took."""

    file: str
    first: int
    last: int
    reason: str
    texts: list[str] = field(default_factory=list)
    size: int = 0


def read_text(text: str, name: str = "text", *, hint: str = "", seconds: float | None = None) -> Snapshot:
    """Read a text of any of the known forms. `hint`: whose it is (a domain's number), where it doesn't say."""
    reader = Reader()
    reader.text(text, name, hint)
    return reader.snapshot(name, seconds)


def read_files(paths: Sequence[str | os.PathLike[str]], *, seconds: float | None = None) -> Snapshot:
    """Read files and whole directories ("-": standard input) into one picture.

    InspectError: one can't be read; of a directory's files, such a one is named in `unread`, as are those in which
    nothing is understood.
    """
    reader = Reader()
    for path in paths:
        files = files_under(path)
        for file in files:
            try:
                reader.file(file)
            except InspectError as error:
                if files == [os.fspath(path)]:
                    raise
                reader.leave(file, str(error))
    return reader.snapshot(", ".join(os.fspath(path) for path in paths), seconds)


__all__ = ["InspectError", "Reader", "hint_of_name", "read_files", "read_text"]
