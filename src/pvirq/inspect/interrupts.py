"""/proc/interrupts of every kind (kernel/irq/proc.c, arch/x86/kernel/irq.c, arch/arm64; 2.6.18 to now).

A heading names the CPUs that are online. A row is a label and a colon, a count for each of them, and what is behind
the line. Counts are ten columns wide behind a blank, which is what lets whole tables be read at once; anything else is
read row by row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from pvirq.inspect.model import XEN_CHIPS, Counts, Interrupts, IrqRow
from pvirq.inspect.source import Where

HEADING: Final = re.compile(r"\s*CPU\d{1,5}(?:\s+CPU\d{1,5})*\s*$")
# A line's number, or the capitals of a row of the architecture's; "Err" is arm64's. A blank follows in all versions.
LABEL: Final = re.compile(r"\s*(\d{1,10}|[A-Z][A-Z0-9]{1,7}|Err):(?=\s)")
NO_LABELS: Final = frozenset(("CPU", "PID", "RIP", "RSP", "RAX", "CR2", "CR3", "XEN"))  # of other text
CELL: Final = 11
LARGEST: Final = (1 << 64) - 1
DIGITS: Final = 10  # of a 32-bit count: wider cells run into one another

FLOWS: Final = "edge|level|fasteoi|percpu|virq|ipi|event|evtchn|pirq|msi|msi-x|ioapic-edge|ioapic-level"
JOINED: Final = re.compile(rf"(.+?)-({FLOWS})$")
XEN_JOINED: Final = re.compile(rf"({'|'.join(XEN_CHIPS)})-(\S+)$")
TAIL: Final = re.compile(
    r"(?P<chip>\S+)"
    r"(?:\s+(?P<hwirq>\d+)(?=\s|-|$))?"
    r"(?:\s+(?P<trigger>Level|Edge)(?=\s|-|$))?"
    r"(?:\s*-(?P<flow>\S+))?"
    r"(?:\s+(?P<actions>\S.*))?$"
)


def heading(text: str) -> tuple[int, ...] | None:
    """The CPUs of a heading; None where it isn't one."""
    if not HEADING.match(text):
        return None
    cpus = tuple(int(name[3:]) for name in text.split())
    return cpus if len(set(cpus)) == len(cpus) else None


def is_row(text: str, cpus: int) -> bool:
    """Whether it can be a row of a table with so many CPUs."""
    match = LABEL.match(text)
    if match is None or match[1] in NO_LABELS:
        return False
    rest = text[match.end() : match.end() + 64].lstrip()
    if not rest:
        return False
    return rest[0].isdecimal() or (cpus == 0 and is_bare_row(text))


def is_bare_row(text: str) -> bool:
    """Whether it is a line's row without any count, as below a heading without CPUs."""
    match = LABEL.match(text)
    rest = text[match.end() :].lstrip() if match else ""
    return match is not None and match[1].isdecimal() and rest[:1].isalpha() and not rest.startswith("VCPU ")


@dataclass
class TableBuilder:
    """Collects the rows of a table; `finish` reads their counts all at once."""

    where: Where
    cpus: tuple[int, ...]
    hint: str = ""
    lines: list[tuple[Where, str]] = field(default_factory=list)

    def finish(self) -> tuple[Interrupts, list[tuple[Where, str, str]]]:
        """The table, and the lines that can't be rows after all, each with the reason."""
        width = CELL * len(self.cpus)
        wide: list[int] = []
        cells: list[str] = []
        labels = []
        for i, (_, text) in enumerate(self.lines):
            match = LABEL.match(text)
            assert match is not None  # is_row
            labels.append(match)
            part = text[match.end() : match.end() + width]
            behind = text[match.end() + width : match.end() + width + 1]
            if width and len(part) == width and part.isascii() and behind in ("", " "):
                wide.append(i)
                cells.append(part)
        matrix, good = _fixed("".join(cells), len(wide), len(self.cpus))
        counts: dict[int, Counts] = {i: matrix[k] for k, i in enumerate(wide) if good[k]}
        rows, bad = [], []
        for i, (where, text) in enumerate(self.lines):
            end = labels[i].end()
            if i in counts:
                tail = text[end + width :]
                numbers = counts[i]
            else:
                try:
                    numbers, tail = _split_counts(text[end:], len(self.cpus))
                except ValueError as error:
                    bad.append((where, text, str(error)))
                    continue
            row = _row(where, labels[i][1], numbers, tail)
            if row.irq is None and len(numbers) not in (1, len(self.cpus)):
                bad.append((where, text, "no row of counts"))
                continue
            if row.irq is not None and len(numbers) < len(self.cpus):
                bad.append((where, text, f"{len(numbers)} counts for {len(self.cpus)} CPUs"))
            rows.append(row)
        return Interrupts(self.where, self.cpus, tuple(rows), self.hint), bad


def _fixed(text: str, rows: int, cpus: int) -> tuple[Counts, list[bool]]:
    """Counts in cells of a fixed width, and which rows really were that: digits to the right, blanks before them."""
    if not rows:
        return np.zeros((0, cpus), np.uint64), []
    grid = np.frombuffer(text.encode("ascii"), np.uint8).reshape(rows, cpus, CELL)
    digits = grid - ord("0")  # wraps for blanks: 240
    is_digit = digits < 10
    good = ((is_digit | (grid == ord(" "))).all(axis=(1, 2))) & (~is_digit[:, :, 0]).all(axis=1)
    good &= is_digit[:, :, CELL - 1].all(axis=1) & (is_digit[:, :, 1:] >= is_digit[:, :, :-1]).all(axis=(1, 2))
    digits *= is_digit
    # Two halves of five digits fit 32 bits, in which numpy is quicker.
    high = np.zeros((rows, cpus), np.uint32)
    low = np.zeros((rows, cpus), np.uint32)
    for k in range(5):
        high *= np.uint32(10)
        high += digits[:, :, 1 + k]
        low *= np.uint32(10)
        low += digits[:, :, 6 + k]
    numbers = high.astype(np.uint64)
    numbers *= np.uint64(100_000)
    numbers += low
    numbers.flags.writeable = False
    return numbers, [bool(each) for each in good]


def _split_counts(text: str, cpus: int) -> tuple[Counts, str]:
    """As many counts as there are CPUs from the beginning of a text, and the rest. ValueError."""
    found: list[str] = []
    at, length = 0, len(text)
    while len(found) < cpus:
        while at < length and text[at] in " \t":
            at += 1
        end = at
        while end < length and "0" <= text[end] <= "9":
            end += 1
        if end == at or (end < length and text[end] not in " \t"):
            break  # a name, also one that begins with digits
        found.append(text[at:end])
        at = end
    if len(found) < cpus and any(len(each) > DIGITS for each in found):
        apart = [piece for each in found for piece in _apart(each)]
        if len(apart) <= cpus:
            found = apart
    numbers = [int(each) if len(each) <= 20 else LARGEST + 1 for each in found]
    if any(number > LARGEST for number in numbers):
        raise ValueError("a count of more than 64 bits")
    array = np.array(numbers, np.uint64)
    array.flags.writeable = False
    return array, text[at:]


def _apart(digits: str) -> list[str]:
    """Counts that fill their cells and have run together: all but the first are ten digits."""
    first = len(digits) % DIGITS
    return [digits[:first]] * bool(first) + [digits[i : i + DIGITS] for i in range(first, len(digits), DIGITS)]


def _row(where: Where, label: str, counts: Counts, tail: str) -> IrqRow:
    text = tail.strip()
    if not (label.isascii() and label.isdecimal()):
        return IrqRow(where, label, None, counts, text)
    irq = int(label)
    match = TAIL.match(text)
    if match is None:
        return IrqRow(where, label, irq, counts, text)
    chip, flow = match["chip"], match["flow"] or ""
    if not flow and chip not in XEN_CHIPS and (joined := XEN_JOINED.match(chip) or JOINED.match(chip)):
        chip, flow = joined[1], joined[2]
    names = tuple(match["actions"].split(", ")) if match["actions"] else ()
    return IrqRow(
        where, label, irq, counts, text, chip, match["hwirq"] or "", match["trigger"] or "", flow,
        tuple(name.strip() for name in names),
    )  # fmt: skip
