"""/proc/interrupts of 2.6 kernels, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqReturn
from pvirq.linux.irq26 import IrqChip26, IrqDesc26, IrqLayer26
from pvirq.linux.irq2618 import IrqLayer2618
from pvirq.linux.irq2632 import IrqLayer2632
from pvirq.linux.proc import IrqStat
from pvirq.linux.proc26 import interrupts_2618, interrupts_suse

GUEST_WRITEUP = """\
           CPU0
256:     111925   Dynamic-irq  timer0
257:          0   Dynamic-irq  resched0
258:          0   Dynamic-irq  callfunc0
259:        270   Dynamic-irq  xenbus
260:       1801   Dynamic-irq  xencons
261:       3616   Dynamic-irq  blkif
262:       7756   Dynamic-irq  eth0
NMI:          0
LOC:          0
ERR:          0
MIS:          0
"""

DOM0_WRITEUP = """\
           CPU0       CPU1       CPU2       CPU3
  1:       3196          0          0          0   Phys-level      i8042
  6:          3          0          0          0   Phys-level      floppy
 16:        407          0          0          0   Phys-level      ehci_hcd:usb2, uhci_hcd:usb3, HDA Intel
439:      23348          0          0          0   Phys-level      peth0
440:   30292618     929005     656343     640930   Dynamic-percpu  timer
443:      23559       2526       1132        865   Dynamic-percpu  call1func
446:          0          0          0          0   Dynamic-level   mce
449:        804        987          0          0   Dynamic-level   blkif-backend
NMI:          0          0          0          0   Non-maskable interrupts
RES:     338983     738844     598293     605526   Rescheduling interrupts
CAL:      23582       2722       1365       1086   Function call interrupts
MCE:          0          0          0          0   Machine check exceptions
MCP:          1          1          1          1   Machine check polls
"""


def handled(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


def layer(
    version: type[IrqLayer26], cpus: int, nr_irqs: int, lines: dict[int, tuple[str, str, str, list[int]]]
) -> IrqLayer26:
    """`lines`: number -> chip, flow, actions (comma-separated), counts."""
    log: list[str] = []
    irqs = version(cpus, nr_irqs, cpu=lambda: 0, jiffies=lambda: 0, hz=100, printk=log.append)
    irqs.online = (1 << cpus) - 1

    def init(desc: IrqDesc26) -> None:
        chip, flow, _, _ = lines[desc.irq]
        desc.chip, desc.name = IrqChip26(chip), flow or None

    irqs.init_desc = init
    for irq, (_, _, actions, counts) in lines.items():
        desc = irqs.irq_to_desc_alloc(irq) if isinstance(irqs, IrqLayer2632) else irqs.desc(irq)
        desc.kstat[:] = counts
        for name in filter(None, actions.split(", ")):
            irqs.request_irq(irq, handled, IRQF_SHARED, name, object())
    return irqs


def guest() -> IrqLayer26:
    rows = ["timer0", "resched0", "callfunc0", "xenbus", "xencons", "blkif", "eth0"]
    counts = [111925, 0, 0, 270, 1801, 3616, 7756]
    lines = {
        256 + i: ("Dynamic-irq", "", row, [count]) for i, (row, count) in enumerate(zip(rows, counts, strict=True))
    }
    lines[300] = ("Dynamic-irq", "", "", [5])  # was used once: without a handler it has no row
    return layer(IrqLayer2618, 1, 512, lines)


def test_the_writeups_guest() -> None:
    assert interrupts_2618(guest(), [IrqStat()], arch="i386", style="writeup") == GUEST_WRITEUP


def test_a_2_6_18_guest_by_its_source() -> None:
    text = interrupts_2618(guest(), [IrqStat(nmi=3, apic_timer=4)], arch="i386", style="source").splitlines()
    assert text[0] == "           CPU0       "
    assert text[1] == "256:     111925     Dynamic-irq  timer0"
    assert text[-4:] == ["NMI:          3 ", "LOC:          4 ", "ERR:          0", "MIS:          0"]
    assert len(text) == 12


def test_x86_64_has_no_mis() -> None:
    irqs = guest()
    irqs.err_count = 12
    text = interrupts_2618(irqs, [IrqStat()], arch="x86_64", style="source").splitlines()
    assert text[-3:] == ["NMI:          0 ", "LOC:          0 ", "ERR:         12"]


def test_2_6_18_with_two_cpus_and_shared_lines() -> None:
    lines = {18: ("Phys-irq", "", "ehci_hcd:usb1, ata_piix", [1, 4294967297]), 8: ("Phys-irq", "", "rtc", [2, 3])}
    irqs = layer(IrqLayer2618, 2, 512, lines)
    text = interrupts_2618(irqs, [IrqStat(), IrqStat(nmi=7)], arch="x86_64", style="source").splitlines()
    assert text == [
        "           CPU0       CPU1       ",
        "  8:          2          3        Phys-irq  rtc",
        " 18:          1          1        Phys-irq  ehci_hcd:usb1, ata_piix",  # the count is of 32 bits
        "NMI:          0          7 ",
        "LOC:          0          0 ",
        "ERR:          0",
    ]


def dom0() -> IrqLayer26:
    lines = {
        1: ("Phys", "level", "i8042", [3196, 0, 0, 0]),
        6: ("Phys", "level", "floppy", [3, 0, 0, 0]),
        7: ("Phys", "level", "", [0, 0, 0, 0]),
        16: ("Phys", "level", "ehci_hcd:usb2, uhci_hcd:usb3, HDA Intel", [407, 0, 0, 0]),
        439: ("Phys", "level", "peth0", [23348, 0, 0, 0]),
        440: ("Dynamic", "percpu", "timer", [30292618, 929005, 656343, 640930]),
        443: ("Dynamic", "percpu", "call1func", [23559, 2526, 1132, 865]),
        446: ("Dynamic", "level", "mce", [0, 0, 0, 0]),
        449: ("Dynamic", "level", "blkif-backend", [804, 987, 0, 0]),
    }
    return layer(IrqLayer2632, 4, 696, lines)


DOM0_STAT = [
    IrqStat(resched=resched, call=call, mce_poll=1)
    for resched, call in ((338983, 23582), (738844, 2722), (598293, 1365), (605526, 1086))
]


def test_the_writeups_domain_0() -> None:
    assert interrupts_suse(dom0(), DOM0_STAT, mce=True, style="writeup") == DOM0_WRITEUP


def test_suse_by_its_source() -> None:
    text = interrupts_suse(dom0(), DOM0_STAT, mce=False, style="source").splitlines()
    assert text[0] == "           CPU0       CPU1       CPU2       CPU3       "
    assert text[1] == "  1:       3196          0          0          0      Phys-level     i8042"
    assert text[5] == "440:   30292618     929005     656343     640930   Dynamic-percpu    timer"
    assert text[7] == "446:          0          0          0          0   Dynamic-level     mce"
    assert text[-3:] == [
        "NMI:          0          0          0          0   Non-maskable interrupts",
        "RES:     338983     738844     598293     605526   Rescheduling interrupts",
        "CAL:      23582       2722       1365       1086   Function call interrupts",
    ]


def test_suse_shows_counted_lines_without_a_handler() -> None:
    irqs = layer(IrqLayer2632, 1, 200, {20: ("Phys", "level", "", [4]), 21: ("none", "", "", [1])})
    text = interrupts_suse(irqs, [IrqStat()], mce=False, style="source").splitlines()
    assert text[1:3] == [" 20:          4      Phys-level   ", " 21:          1      none-<NULL>  "]


def test_suse_configurations_and_wide_numbers() -> None:
    irqs = layer(IrqLayer2632, 1, 1000, {})
    text = interrupts_suse(
        irqs, [IrqStat(thermal=1, threshold=2)], mce=True, thermal=True, threshold=True, style="source"
    )
    assert text.splitlines() == [
        "            CPU0       ",
        " NMI:          0   Non-maskable interrupts",
        " RES:          0   Rescheduling interrupts",
        " CAL:          0   Function call interrupts",
        " TRM:          1   Thermal event interrupts",
        " THR:          2   Threshold APIC interrupts",
        " MCE:          0   Machine check exceptions",
        " MCP:          0   Machine check polls",
    ]


@pytest.mark.parametrize(
    "text",
    [
        lambda irqs: interrupts_2618(irqs, DOM0_STAT, arch="i386", style="source"),
        lambda irqs: interrupts_suse(irqs, DOM0_STAT, mce=True, style="source"),
    ],
)
def test_an_offline_cpu_has_no_column(text: Callable[[Any], str]) -> None:
    irqs = dom0()
    irqs.online = 0b1011
    assert text(irqs).splitlines()[0] == "           CPU0       CPU1       CPU3       "
    row = next(line for line in text(irqs).splitlines() if line.startswith("440:"))
    assert row.split()[1:4] == ["30292618", "929005", "640930"]
