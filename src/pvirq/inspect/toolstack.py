"""What tools in domain 0 print: lsevtchn, `xl list`, `xl vcpu-list`, xenstore-ls (with and without -f), line by line.

(tools/xcutils/lsevtchn.c, tools/xl/xl_list.c and xl_vcpu.c, tools/xenstore/xenstore_client.c.)
"""

from __future__ import annotations

import re
from typing import Final

from pvirq.inspect.model import Channel, Kind, StoreNode, XlDomain, XlVcpu
from pvirq.inspect.source import Where

LSEVTCHN: Final = re.compile(r"\s*(\d{1,7}): VCPU (\d{1,6}): (.{2,80})$")
UNBOUND: Final = re.compile(r"Interdomain \(Waiting connection\) - Remote Domain (\d{1,5})$")
CONNECTED: Final = re.compile(r"Interdomain \(Connected\) - Remote Domain (\d{1,5}), Port (\d{1,7})$")
PHYSICAL: Final = re.compile(r"Physical IRQ (\d{1,6})$")
VIRTUAL: Final = re.compile(r"Virtual IRQ (\d{1,6})$")


def lsevtchn_line(where: Where, text: str) -> Channel | None:
    """A port as `lsevtchn` prints it. What isn't known of its kind is Kind.UNKNOWN."""
    match = LSEVTCHN.match(text.rstrip())
    if match is None:
        return None
    port, vcpu, what = int(match[1]), int(match[2]), match[3]
    if found := CONNECTED.match(what):
        return Channel(where, port, vcpu, Kind.INTERDOMAIN, remote=int(found[1]), remote_port=int(found[2]))
    if found := UNBOUND.match(what):
        return Channel(where, port, vcpu, Kind.UNBOUND, remote=int(found[1]))
    if found := PHYSICAL.match(what):
        return Channel(where, port, vcpu, Kind.PIRQ, pirq=int(found[1]))
    if found := VIRTUAL.match(what):
        return Channel(where, port, vcpu, Kind.VIRQ, virq=int(found[1]))
    return Channel(where, port, vcpu, Kind.IPI if what == "IPI" else Kind.UNKNOWN)


# -- xl ----------------------------------------------------------------------------------------------------------------

XL_LIST_HEAD: Final = re.compile(r"\s*Name\s+ID\s+Mem(?:\(MiB\))?\s+VCPUs\s+State\s+Time\(s\)")
XL_LIST: Final = re.compile(
    r"\s*(\S.{0,300}?)\s{1,80}(\d{1,5})\s{1,80}(\d{1,12})\s{1,80}(\d{1,6})\s{1,80}([r-][b-][p-][a-zA-Z?-]{0,3})\s{1,80}(\d{1,12}\.\d)(?:\s|$)"
)
XL_VCPU_HEAD: Final = re.compile(r"\s*Name\s+ID\s+VCPU\s+CPU\s+State\s+Time\(s\)\s+")
XL_VCPU: Final = re.compile(
    r"\s*(\S.{0,300}?)\s{1,80}(\d{1,5})\s{1,80}(\d{1,6})\s{1,80}(\d{1,6}|-)\s{1,80}([r-][b-][p-])\s{1,80}(\d{1,12}\.\d)\s{1,80}(\S.{0,4000})$"
)


def xl_list_row(where: Where, text: str) -> XlDomain | None:
    """A row of `xl list`."""
    match = XL_LIST.match(text.rstrip())
    if match is None:
        return None
    name, domid, memory, vcpus, state, seconds = match.groups()
    return XlDomain(where, name, int(domid), int(memory), int(vcpus), state, float(seconds))


def xl_vcpu_row(where: Where, text: str) -> XlVcpu | None:
    """A row of `xl vcpu-list`."""
    match = XL_VCPU.match(text.rstrip())
    if match is None:
        return None
    name, domid, vcpu, cpu, state, seconds, affinity = match.groups()
    number = None if cpu == "-" else int(cpu)
    return XlVcpu(where, name, int(domid), int(vcpu), number, state, float(seconds), affinity)


# -- xenstore-ls -------------------------------------------------------------------------------------------------------

KEY: Final = r"[A-Za-z0-9_@:.+,-]{1,256}"
NODE: Final = re.compile(rf'( {{0,64}})({KEY}) = "(.*)"(?:\s+\(([nrwb0-9,]{{1,200}})\))?\s*(?:\.\.\.)?\s*$')
TOP: Final = ("tool", "local", "vm", "libxl", "vss", "domain", "byname", "mh", "xapi", "cluster")


def store_full(where: Where, text: str) -> StoreNode | None:
    """A line of `xenstore-ls -f`."""
    if not text.startswith("/") or ' = "' not in text:
        return None
    path = text[: text.index(' = "')]
    if len(path) > 3072 or any(ch.isspace() for ch in path):
        return None
    match = NODE.match("x" + text[len(path) :])  # the path is checked already, by something that can't take long
    return StoreNode(where, path.rstrip("/") or "/", match[3], match[4] or "") if match else None


class StoreTree:
    """Lines of `xenstore-ls` without -f: a blank for each level. Paths begin at "/" where the first key is one of its.

    A tree begins at the root with a key that is known to be there, or with any after `expect` (the command was seen).
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._root: str | None = None
        self._expected: str | None = None

    def expect(self, root: str) -> None:
        """The next line at the left begins a listing of this path ("" is the root)."""
        self._expected = root

    def end(self) -> None:
        """Other text: what follows belongs to no tree."""
        self._root = None
        self._parts = []

    def line(self, where: Where, text: str) -> StoreNode | None:
        """A node, or None."""
        match = NODE.match(text)
        if match is None:
            return None
        depth = len(match[1])
        if depth == 0 and (self._expected is not None or (self._root in (None, "") and match[2] in TOP)):
            self._root, self._expected = self._expected or "", None
        if self._root is None or depth > len(self._parts):
            return None
        self._parts[depth:] = [match[2]]
        return StoreNode(where, self._root + "/" + "/".join(self._parts), match[3], match[4] or "")
