"""Files of /proc/irq/N and of split-driver devices in sysfs, from their paths or from text with a path in each line.

Texts are those of `grep . /proc/irq/*/*` ("PATH:VALUE"), "PATH=VALUE" and "PATH = VALUE" (where "|" may stand for a
newline), and "irq N smp_affinity=... list=... eff=...".
"""

from __future__ import annotations

import re
from typing import Final

from pvirq.inspect.model import IrqFile, XenbusCounter
from pvirq.inspect.source import Where

IRQ_NAMES: Final = (
    "smp_affinity", "smp_affinity_list", "effective_affinity", "effective_affinity_list", "affinity_hint", "node",
    "spurious",
)  # fmt: skip
COUNTERS: Final = ("event_channels", "events", "spurious_events", "spurious_threshold", "jiffies_eoi_delayed")

IRQ_PATH: Final = re.compile(rf"(?:.{{0,2000}}/)?irq/(\d{{1,9}})/({'|'.join(IRQ_NAMES)})$")
IRQ_TEXT: Final = re.compile(rf"(?:\S{{0,200}}/)?irq/(\d{{1,9}})/({'|'.join(IRQ_NAMES)})\s?[:=]\s?(.{{0,4000}})$")
IRQ_LINE: Final = re.compile(r"\s*irq (\d{1,9}) (smp_affinity=.{0,8000})$")
IRQ_SHORT: Final = {
    "smp_affinity": "smp_affinity", "list": "smp_affinity_list", "eff": "effective_affinity_list",
}  # fmt: skip
XENBUS_PATH: Final = re.compile(rf"(?:.{{0,2000}}/)?([^/\s]{{1,64}})/xenbus/({'|'.join(COUNTERS)})$")
XENBUS_TEXT: Final = re.compile(
    rf"(?:\S{{0,400}}/)?([^/\s]{{1,64}})/xenbus/({'|'.join(COUNTERS)})\s?[:=]\s?(\d{{1,20}})\s*$"
)


def is_path(path: str) -> bool:
    """Whether a file is one of these by its place in a directory."""
    path = path.replace("\\", "/")
    return IRQ_PATH.match(path) is not None or XENBUS_PATH.match(path) is not None


def from_path(path: str, text: str, hint: str) -> IrqFile | XenbusCounter | None:
    """What such a file holds; None where that isn't what belongs there."""
    path, value, where = path.replace("\\", "/"), text.strip(), Where(path, 1)
    if match := IRQ_PATH.match(path):
        return IrqFile(where, int(match[1]), match[2], value, hint)
    match = XENBUS_PATH.match(path)
    if match and value.isascii() and value.isdecimal() and len(value) <= 20:
        return XenbusCounter(where, match[1], match[2], int(value), hint)
    return None


def from_line(where: Where, text: str, hint: str) -> list[IrqFile | XenbusCounter]:
    """What a line of such a text says; nothing where it is none."""
    if match := IRQ_TEXT.match(text):
        return [IrqFile(where, int(match[1]), match[2], match[3].strip("| "), hint)]
    if match := XENBUS_TEXT.match(text):
        return [XenbusCounter(where, match[1], match[2], int(match[3]), hint)]
    if match := IRQ_LINE.match(text):
        pairs = (pair.partition("=") for pair in match[2].split())
        irq = int(match[1])
        return [IrqFile(where, irq, IRQ_SHORT[name], value, hint) for name, _, value in pairs if name in IRQ_SHORT]
    return []
