"""Machines as tables: the recorded one against its recording, the write-up's rows, and what a bad table says."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardwarelib import KERNELS, Rig
from pvirq.abi.errno import XenError
from pvirq.abi.event_channel import EVTCHNSTAT_interdomain, EVTCHNSTAT_ipi, EVTCHNSTAT_pirq, EVTCHNSTAT_virq
from pvirq.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from pvirq.hardware.device import HardwareError
from pvirq.hardware.disk import BlockDriver
from pvirq.hardware.i8042 import I8042Driver
from pvirq.hardware.nic import NicDriver
from pvirq.hardware.platform import MACHINES, TYPES, build, declare, device_help
from pvirq.linux.irq import IrqError
from pvirq.xen import evtchn
from pvirq.xen.timer import NS_PER_S

DATA = Path(__file__).parent / "data" / "linux-2vcpu"

WRITEUP_ROWS = {
    1: "i8042",
    6: "floppy",
    8: "rtc0",
    12: "i8042",
    14: "ata_piix",
    15: "ata_piix",
    16: "ehci_hcd:usb2, uhci_hcd:usb3, uhci_hcd:usb6, HDA Intel",  # snd_hda_intel:card0 in Linux 6.1
    17: "uhci_hcd:usb4, uhci_hcd:usb7",
    18: "ehci_hcd:usb1, uhci_hcd:usb5, uhci_hcd:usb8, ata_piix",
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def lsevtchn(rig: Rig) -> str:
    lines = []
    for port in range(1, 64):
        try:
            status = evtchn.status(rig.kernel.domain, DOMID_SELF, port)
        except XenError:
            break
        kind = {
            EVTCHNSTAT_interdomain: f"Interdomain (Connected) - Remote Domain {status.dom}, Port {status.port}",
            EVTCHNSTAT_pirq: f"Physical IRQ {status.pirq}",
            EVTCHNSTAT_virq: f"Virtual IRQ {status.virq}",
            EVTCHNSTAT_ipi: "IPI",
        }.get(status.status)
        if kind:
            lines.append(f"{port:4}: VCPU {status.vcpu}: {kind}\n")
    return "".join(lines)


def test_the_recorded_machine() -> None:
    """Numbers, chips, triggers and names of all rows; ports, what is bound to them, and their CPUs."""
    rig = Rig("recorded")
    store = rig.kernel.evtchn_user("xenstored")
    store.bind_virq(VIRQ_DOM_EXC)
    store.bind_interdomain(0, rig.kernel.events.store_port)
    rig.run()
    recorded = (DATA / "0-before.dom0.interrupts").read_text()
    assert rig.rows() == {
        int(match[1]): " ".join(match[2].split())
        for match in re.finditer(r"^ *(\d+):(?: +\d+)+ +(\S.*)$", recorded, re.MULTILINE)
    }
    assert lsevtchn(rig) == (DATA / "0-before.lsevtchn-0").read_text()
    rig.close()


def test_idle_input_lines_have_the_recorded_counts() -> None:
    """The drivers' probes: a keyboard's nine bytes; of the mouse, whose driver was not loaded, three."""
    rig = Rig("recorded")
    rig.sleep(NS_PER_S)
    recorded = (DATA / "0-before.dom0.interrupts").read_text()
    for irq, count in ((1, 9), (8, 0), (9, 0), (12, 3)):
        assert re.search(rf"^ *{irq}: +0 +{count} ", recorded, re.MULTILINE)
        assert rig.count(irq) == count
    rig.close()


def test_the_writeups_machine(kernel: str) -> None:
    rig = Rig("writeup", kernel, vcpus=4)
    assert not [line for line in rig.kernel.log if "probe of" in line]
    descs = rig.kernel.irq.descs
    rows = {irq: ", ".join(action.name for action in descs[irq].actions) for irq in range(24) if irq in descs}
    expected = {**WRITEUP_ROWS, 8: "rtc" if kernel == "2.6.18" else "rtc0"}
    if kernel.startswith("pvops"):
        expected[16] = expected[16].replace("HDA Intel", "snd_hda_intel:card0")
    assert {irq: row for irq, row in rows.items() if row} == expected
    # An MSI's IRQ: from the top of the physical ones in old kernels, a free one after the GSIs in others.
    assert rig.irq_of("peth0") == {"suse": 439, "2.6.18": 255, "pvops": 52, "pvops-2l": 56}[kernel]
    rig.sleep(5 * NS_PER_S)
    # Idle lines: no mouse is there to answer, and no disk in the floppy drive.
    assert (rig.count(12), rig.count(6), rig.count(8)) == (4, 3, 0)
    rig.close()


def test_every_use_of_every_device(kernel: str) -> None:
    """Each costs an interrupt of its row, but where nothing can come of it."""
    table = [{"type": kind} for kind in TYPES]
    rig = Rig(table, kernel)
    assert all(driver.bound for driver in rig.platform.devices.values())
    rng = random.Random(1)
    for name, driver in rig.platform.devices.items():
        for action in driver.uses:
            rig.sleep(10 * NS_PER_S)
            irqs = [irq for irq, _ in driver._irqs]
            before = sum(rig.count(irq) for irq in irqs)
            driver.use(action, rng)
            rig.sleep(10 * NS_PER_S)
            if (name, action) not in {("floppy", "insert"), ("floppy", "eject")}:
                assert sum(rig.count(irq) for irq in irqs) > before, (name, action)
    with pytest.raises(HardwareError, match=r"unknown action 'dance' of rtc: expected alarm"):
        rig.platform["rtc"].use("dance", rng)
    rig.close()


USES = [(row["name"] if "name" in row else row["type"], row["type"]) for row in MACHINES["writeup"].devices]
ACTIONS = [(str(name), action) for name, kind in USES for action in TYPES[str(kind)].driver.uses]
ACTIONS += [(str(irq), f"to CPU {cpu}") for irq in WRITEUP_ROWS for cpu in range(4)]
ACTIONS += [("cpu", f"{way} {cpu}") for way in ("off", "on") for cpu in (1, 2, 3)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KERNELS),
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3_000_000)), max_size=60),
    st.integers(0, 1 << 32),
)
def test_every_interrupt_is_counted_once(kernel: str, steps: list[tuple[tuple[str, str], int]], seed: int) -> None:
    """Whatever happens on the write-up's PC, and wherever its IRQs go: what its lines and messages sent is what its
    rows say, none is lost, and in the end all are served.

    But where a level line is moved: kernels before 6.1 then tell Xen of its end before its handlers have run, and
    forget what it sends once more.
    """
    rig = Rig("writeup", kernel, vcpus=4)
    rng = random.Random(seed)
    for (name, action), pause in steps:
        # As a transfer where nothing is plugged in, or a CPU that is off already.
        with contextlib.suppress(ValueError, IrqError):
            if action.startswith("to CPU"):
                rig.kernel.irq.set_affinity(int(name), 1 << int(action[-1]))
            elif name == "cpu":
                (rig.kernel.cpu_down if action[:3] == "off" else rig.kernel.cpu_up)(int(action[-1]))
            else:
                rig.platform[name].use(action, rng)
        rig.sleep(pause)
    rig.sleep(60 * NS_PER_S)
    lines = rig.hypervisor.ioapic.lines
    moves = any("CPU" in action or name == "cpu" for (name, action), _ in steps)
    for gsi in WRITEUP_ROWS:
        assert (lines[gsi].lost, lines[gsi].asserted) == (0, False), gsi
        if gsi >= 16 and moves and not kernel.startswith("pvops"):
            assert rig.count(gsi) <= lines[gsi].sent <= 2 * rig.count(gsi), gsi
        else:
            assert rig.count(gsi) == lines[gsi].sent, gsi
    assert rig.platform.device("peth0", NicDriver).pci.sent == rig.named("peth0")
    rig.close()


def test_removal_gives_everything_back(kernel: str) -> None:
    rig = Rig("writeup", kernel)
    before = {irq: ", ".join(a.name for a in rig.kernel.irq.descs[irq].actions) for irq in WRITEUP_ROWS}
    for driver in rig.platform.devices.values():
        driver.remove()
    assert not any(desc.actions for irq, desc in rig.kernel.irq.descs.items() if irq < 24)
    assert "Physical IRQ" not in lsevtchn(rig)
    for driver in rig.platform.devices.values():
        driver.bind()
        assert driver.bound
    rows = {irq: ", ".join(a.name for a in rig.kernel.irq.descs[irq].actions) for irq in WRITEUP_ROWS}
    assert rows == before
    rig.close()


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        ({}, "type", "no type: expected one of acpi, ahci, ata_piix,"),
        ({"type": "fdc"}, "type", "unknown device type 'fdc': expected one of acpi,"),
        ({"type": "rtc", "irq": 8}, "irq", "unknown parameter 'irq' of rtc: expected one of name, gsi, row"),
        ({"type": "rtc", "gsi": "8"}, "gsi", "gsi of rtc is '8': expected a whole number"),
        ({"type": "rtc", "gsi": True}, "gsi", "gsi of rtc is True: expected a whole number"),
        ({"type": "i8042", "mouse": 1}, "mouse", "mouse of i8042 is 1: expected true or false"),
        ({"type": "nic", "name": ""}, "name", "name: expected a text that is not empty"),
    ],
)
def test_a_bad_row(row: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(HardwareError) as error:
        declare(row)
    assert str(error.value).startswith(message)
    assert error.value.key == key


@pytest.fixture
def bare() -> Iterator[Rig]:
    rig = Rig("none")
    yield rig
    rig.close()


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        ({"type": "rtc", "gsi": 24}, "gsi", "gsi 24: expected 0 to 23, an input of the I/O APIC"),
        ({"type": "rtc", "gsi": -1}, "gsi", "gsi -1: expected 0 to 23"),
        ({"type": "hda", "gsi": -2}, "gsi", "gsi -2: expected 0 to 23"),
        ({"type": "i8042", "aux_gsi": 99}, "aux_gsi", "gsi 99: expected 0 to 23"),
        ({"type": "nic", "slot": "1f.2"}, "slot", "slot '1f.2' of nic: expected bus:device.function"),
        ({"type": "nic", "slot": "00:01.0"}, "slot", "slot 00:01.0 of nic is taken by first"),
        ({"type": "nic", "bits_per_s": 0}, "bits_per_s", "bits_per_s 0: expected 1 or more"),
        ({"type": "ata_piix", "seek_ns": -1}, "seek_ns", "seek_ns -1: expected 0 or more"),
        ({"type": "ata_piix", "size_mib": -2}, "size_mib", "size_mib -2: expected a number above 0, or -1"),
        ({"type": "ata_piix", "size_mib": 1, "file": "/no/such/disk"}, "file", "/no/such/disk: No such file"),
        ({"type": "ahci", "file": "/no/disk"}, "file", "/no/disk: No such file or directory; a disk of a new file"),
        ({"type": "ahci", "file": "/dev/null"}, "file", "a disk of 0 bytes: expected a multiple of 512"),
        ({"type": "virtio-blk", "queues": 65}, "queues", "queues 65: expected 0 to 64"),
        ({"type": "rtc", "name": "first"}, "name", "name 'first' is taken by another device"),
    ],
)
def test_a_table_that_cant_be(bare: Rig, row: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(HardwareError) as error:
        build([{"type": "nic", "name": "first"}, row], bare.kernel)
    assert str(error.value).startswith(message)
    assert (error.value.device, error.value.key) == (1, key)
    assert not bare.rows().get(8)
    assert not bare.hypervisor.irqs.bus


def test_slots(bare: Rig) -> None:
    """A device without a slot gets the next whole device of bus 0."""
    table = [
        {"type": "nic", "name": "a", "slot": "00:01.3"},
        {"type": "nic", "name": "b"},
        {"type": "nic", "name": "c", "slot": "1f:1f.7"},
    ]
    platform = build(table, bare.kernel)
    assert [nic.pci.sbdf for nic in platform.all(NicDriver)] == [0x000B, 0x0010, 0x1FFF]
    assert list(bare.hypervisor.irqs.bus) == [0x000B, 0x0010, 0x1FFF]
    more = build([{"type": "nic"}], bare.kernel)
    assert more.device("nic", NicDriver).pci.sbdf == 0x0018
    with pytest.raises(HardwareError, match=r"slot 00:02.0 of d is taken by another device"):
        build([{"type": "nic", "name": "d", "slot": "00:02.0"}], bare.kernel)
    many = [{"type": "nic", "name": f"e{i}"} for i in range(40)]
    with pytest.raises(HardwareError, match=r"no slot of bus 0 is free for e28: give it one"):
        build(many, bare.kernel)


def test_unknown_machine(bare: Rig) -> None:
    with pytest.raises(HardwareError, match="unknown machine 'vax': expected one of none, recorded, writeup"):
        build("vax", bare.kernel)


def test_a_kernel_that_is_up_probes_at_once(bare: Rig) -> None:
    platform = build([{"type": "rtc"}], bare.kernel)
    assert platform["rtc"].bound
    assert bare.rows()[8].endswith("rtc0")
    assert list(platform) == ["rtc"]


def test_devices_by_kind(bare: Rig) -> None:
    platform = build([{"type": "nic", "name": "a"}, {"type": "nic", "name": "b"}, {"type": "i8042"}], bare.kernel)
    assert [nic.name for nic in platform.all(NicDriver)] == ["a", "b"]
    assert platform.device("i8042", I8042Driver) is platform["i8042"]
    with pytest.raises(HardwareError, match="no such device 'i8042': expected one of a, b"):
        platform.device("i8042", NicDriver)
    with pytest.raises(HardwareError, match="no such device 'sda': expected none: it has none"):
        platform.device("sda", BlockDriver)


def test_help_tells_of_every_type() -> None:
    rows = {row.name: row for row in device_help()}
    assert list(rows) == list(TYPES)
    for row in rows.values():
        assert row.about.endswith(".")
        assert len(row.about) < 120
    assert rows["rtc"].parameters == ["gsi=8", 'row=""']
    assert "kbd_gsi=1" in rows["i8042"].parameters
    assert list(rows["i8042"].uses) == ["key", "move"]
    assert all(machine.help for machine in MACHINES.values())
