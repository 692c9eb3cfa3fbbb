"""/proc/interrupts: widths, offline CPUs, counts that wrap, for any number of CPUs and lines."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.linux.irq import IRQ_HANDLED, IrqChip, IrqLayer
from pvirq.linux.proc import IrqStat, header, irq_row, irq_rows, x86_rows


def layer_of(cpus: int, online: int, *, nr_irqs: int = 512) -> IrqLayer:
    layer = IrqLayer(cpus, cpu=lambda: 0, jiffies=lambda: 0, hz=100, printk=print, nr_irqs=nr_irqs)
    layer.online = online
    return layer


def line(layer: IrqLayer, irq: int, name: str = "dev") -> None:
    chip = IrqChip("xen-dyn", irq_ack=lambda desc: None, irq_mask=lambda desc: None, irq_unmask=lambda desc: None)
    layer.set_chip_and_handler_name(layer.alloc_desc(irq), chip, layer.handle_edge_irq, "event")
    layer.request_irq(irq, lambda irq, dev_id: IRQ_HANDLED, 0, name)


@given(st.integers(1, 300), st.data())
def test_columns_are_in_line(cpus: int, data: st.DataObject) -> None:
    """Every row of counts has its digits under the heading's columns, one for each CPU that is online."""
    online = data.draw(st.integers(1, (1 << cpus) - 1))
    layer = layer_of(cpus, online)
    line(layer, 7)
    layer.descs[7].kstat[:] = data.draw(st.lists(st.integers(0, 1 << 40), min_size=cpus, max_size=cpus))
    numbers = [cpu for cpu in range(cpus) if online >> cpu & 1]
    head = header(layer)
    assert head == "           " + "".join(f"CPU{cpu}".ljust(11) for cpu in numbers) + "\n"
    row = irq_row(layer, layer.descs[7])
    assert row.startswith("  7: ")
    assert row.endswith("   xen-dyn    -event     dev\n")
    cells = [row[5 + 11 * i : 16 + 11 * i] for i in range(len(numbers))]
    assert [int(cell) for cell in cells] == [layer.descs[7].kstat[cpu] % (1 << 32) for cpu in numbers]
    assert all(len(cell) == 11 and cell.endswith(" ") for cell in cells)
    tail = x86_rows(layer, [IrqStat(resched=cpu) for cpu in range(cpus)], mce=False)
    match = re.search(r"^RES: (.*)  Rescheduling interrupts$", tail, re.MULTILINE)
    assert match
    assert [int(count) for count in match[1].split()] == numbers


def test_no_cpu_online() -> None:
    layer = layer_of(2, 0)
    line(layer, 3)
    assert header(layer) == " " * 11 + "\n"
    assert irq_row(layer, layer.descs[3]) == "  3:   xen-dyn    -event     dev\n"


def test_counts_wrap() -> None:
    """An unsigned int's. A line without a handler whose counts have all wrapped to 0 is as one that never fired."""
    layer = layer_of(2, 3)
    line(layer, 3)
    layer.descs[3].kstat[:] = [(1 << 32) + 5, (1 << 32) - 1]
    assert irq_row(layer, layer.descs[3]).startswith("  3:          5 4294967295  ")
    layer.descs[3].kstat[:] = [1 << 32, 0]
    assert irq_row(layer, layer.descs[3]).startswith("  3:          0          0  ")
    layer.free_irq(3)
    assert irq_row(layer, layer.descs[3]) == ""
    tail = x86_rows(layer, [IrqStat(nmi=1 << 32), IrqStat(nmi=(1 << 32) + 7)], mce=True, err=(1 << 32) + 1)
    assert tail.startswith("NMI:          0          7   Non-maskable interrupts\n")
    assert "ERR:          1\n" in tail


def test_offline_cpus_have_no_column_and_do_not_make_a_row() -> None:
    layer = layer_of(3, 0b101)
    line(layer, 3)
    layer.descs[3].kstat[:] = [0, 9, 0]
    assert irq_row(layer, layer.descs[3]).startswith("  3:          0          0   xen-dyn")
    layer.free_irq(3)
    assert irq_row(layer, layer.descs[3]) == ""
    layer.online = 7
    assert irq_row(layer, layer.descs[3]) == "  3:          0          9          0   xen-dyn    -event   \n"


@pytest.mark.parametrize(
    ("nr_irqs", "width"), [(0, 3), (440, 3), (999, 3), (1000, 4), (9_999, 4), (10_000, 5), (524_544, 6)]
)
def test_the_number_column_is_as_wide_as_numbers_can_be(nr_irqs: int, width: int) -> None:
    layer = layer_of(1, 1, nr_irqs=nr_irqs)
    line(layer, 0)
    rows = header(layer) + irq_rows(layer) + x86_rows(layer, [IrqStat()], mce=True)
    lines = rows.splitlines()
    assert lines[0] == " " * (width + 8) + "CPU0       "
    assert lines[1] == f"{'0':>{width}}:          0   xen-dyn {'':{width}}-event     dev"
    assert all(text[width] == ":" and text[width + 1 : width + 12] == "          0" for text in lines[2:])


def test_rows_are_in_order_of_their_numbers() -> None:
    layer = layer_of(1, 1)
    for irq in (30, 4, 999, 17):
        line(layer, irq, f"dev{irq}")
    assert layer.nr_irqs == 1000
    assert re.findall(r"dev\d+", irq_rows(layer)) == ["dev4", "dev17", "dev30", "dev999"]


def test_a_line_without_chip_has_a_row_once_it_fired() -> None:
    layer = layer_of(1, 1)
    layer.alloc_desc(5)
    layer.generic_handle_irq(5)
    assert irq_rows(layer) == "  5:          1      none    \n"
