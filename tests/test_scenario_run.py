"""Scenarios that run: the write-up's two tables, repeatability, and that what a workload moves really arrives."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvirq.scenario.load import load, loads
from pvirq.scenario.run import Run
from pvirq.scenario.schema import ScenarioError
from pvirq.xen.timer import NS_PER_S

DATA = Path(__file__).parent / "data/writeup"
PAGE = Path(__file__).parent.parent / "docs/model.md"
KERNELS = ("2.6.18", "suse", "pvops", "pvops-2l")


@contextmanager
def running(text: str, *overrides: str) -> Iterator[Run]:
    with Run(loads(text, "t.toml", overrides)) as run:
        run.start()
        yield run


def run_shipped(name: str, *overrides: str) -> dict[str, str]:
    """All tables of a shipped scenario after its end, by domain."""
    with Run(load(name, overrides)) as run:
        run.start()
        assert run.run()
        assert run.times_done == run.times > 1000
        assert (run.contents.wrong, run.traffic.wrong, run.traffic.lost) == (0, 0, 0)
        return {name: run.view("interrupts", member) for name, member in run.members.items()}


def without_counts(table: str) -> str:
    """A table with each count but the IRQ number made a 9 at its right end: columns count, figures don't."""
    lines = []
    for line in table.splitlines():
        if line[3:4] == ":":
            counts = re.match(r"(?: +\d+)+", line[4:])
            assert counts
            width = len(counts[0])
            line = line[:4] + re.sub(r" *\d+", lambda match: f"{9:{len(match[0])}}", counts[0]) + line[4 + width :]
        lines.append(line)
    return "\n".join(lines)


def sums(table: str) -> dict[str, int]:
    rows = re.findall(r"^ *(\w+):((?: +\d+)+)", table, re.MULTILINE)
    return {label: sum(map(int, counts.split())) for label, counts in rows}


def ranks(table: str, wanted: list[str]) -> list[str]:
    """The rows that counted anything, the busiest first."""
    counted = sums(table)
    return sorted((label for label in wanted if counted[label]), key=lambda label: -counted[label])


@pytest.fixture(scope="module")
def writeup_guest() -> dict[str, str]:
    return run_shipped("writeup-guest")


@pytest.fixture(scope="module")
def writeup_dom0() -> dict[str, str]:
    return run_shipped("writeup-dom0")


@pytest.mark.parametrize("name", ["guest", "dom0"])
def test_the_write_ups_table(name: str, request: pytest.FixtureRequest) -> None:
    listed = (DATA / f"{name}.txt").read_text()
    table = request.getfixturevalue(f"writeup_{name}")[name]
    assert without_counts(table) == without_counts(listed)
    numbers = [label for label in sums(listed) if label.isdigit() and label not in ("451", "452")]
    # The same rows are quiet, and among the others the same are busier than others.
    assert ranks(table, numbers) == ranks(listed, numbers)


def test_the_guests_counts_are_of_the_order_of_the_write_ups(writeup_guest: dict[str, str]) -> None:
    listed = sums((DATA / "guest.txt").read_text())
    for label, count in sums(writeup_guest["guest"]).items():
        assert listed[label] // 3 <= count <= listed[label] * 3


def test_the_page_shows_it_to_the_last_count(writeup_guest: dict[str, str]) -> None:
    (shown,) = re.findall(r"\$ pvirq model writeup-guest\n(.*?) +\.\.\.\n", PAGE.read_text(), re.DOTALL)
    assert writeup_guest["guest"].startswith(textwrap.dedent(shown))


def test_the_write_ups_sums(writeup_dom0: dict[str, str]) -> None:
    table = writeup_dom0["dom0"]
    rows = {
        label: list(map(int, counts.split()))
        for label, counts in re.findall(r"^ *(\w+):((?: +\d+)+)", table, re.MULTILINE)
    }
    assert rows["RES"] == rows["441"]
    assert rows["CAL"] == [a + b for a, b in zip(rows["442"], rows["443"], strict=True)]
    assert rows["MCP"] == [1, 1, 1, 1]


def test_an_smp_guest_has_rows_for_each_cpu() -> None:
    table = run_shipped("writeup-guest", "guest.vcpus=2")["guest"]
    rows = re.findall(r"^(\d+):(?: +\d+){2}   Dynamic-irq  (\w+)$", table, re.MULTILINE)
    names = ["timer0", "resched0", "callfunc0", "timer1", "resched1", "callfunc1", "xenbus", "xencons", "blkif", "eth0"]
    assert rows == [(str(256 + i), name) for i, name in enumerate(names)]


def test_as_the_source_has_it_the_timer_comes_last() -> None:
    table = run_shipped("writeup-guest", "guest.vcpus=2", "guest.style=source")["guest"]
    names = re.findall(r"^\d+:(?: +\d+){2}     Dynamic-irq  (\w+)$", table, re.MULTILINE)
    assert names[:6] == ["timer0", "resched0", "callfunc0", "resched1", "callfunc1", "timer1"]


def test_repeatable_by_seed(writeup_dom0: dict[str, str]) -> None:
    assert run_shipped("writeup-dom0") == writeup_dom0
    other = run_shipped("writeup-dom0", "seed=2")
    assert other != writeup_dom0
    assert without_counts(other["dom0"]) == without_counts(writeup_dom0["dom0"])


WORLD = """
[dom0]
kernel = "pvops"
platform = "writeup"
[[domain]]
name = "g"
kernel = "2.6.18"
vcpus = 2
disk = [{ name = "xvda", on = "ata1", size = "1M" }, { name = "xvdb", size = "1M" }]
vif = [{}]
[[domain]]
name = "h"
vif = [{}]
"""


def table_of(run: Run, name: str) -> dict[str, int]:
    """Sums of a domain's rows by the name of the last handler."""
    text = run.view("interrupts", run.members[name])
    found: dict[str, int] = {}
    for line in text.splitlines():
        match = re.match(r" *\d+:((?: +\d+)+) .* (\S+)$", line)
        if match:
            found[match[2]] = found.get(match[2], 0) + sum(map(int, match[1].split()))
    return found


@pytest.mark.parametrize("dom0", KERNELS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_read_costs_three_interrupts(dom0: str, kernel: str) -> None:
    """The guest's disk, one at a time: its backend's IRQ, the disk's in domain 0, its frontend's in the guest."""
    work = '[[workload]]\non = "g"\nkind = "disk"\ncount = 100\n'
    with running(WORLD + work, f"dom0.kernel={dom0}", f"g.kernel={kernel}") as run:
        assert run.run()
        g, zero = table_of(run, "g"), table_of(run, "dom0")
        # One read is that of the partition table, as each disk appears.
        assert g["blkif"] == 102
        channels = run.view("interrupts", run.members["dom0"]).count("blkif-backend")
        assert channels == (4 if dom0[:5] == kernel[:5] == "pvops" else 2)  # a queue for each CPU
        assert zero["blkif-backend"] == 102 + channels  # binding a channel raises it
        line_14 = re.search(r"^ *14:((?: +\d+)+)", run.view("interrupts", run.members["dom0"]), re.MULTILINE)
        assert line_14
        assert sum(map(int, line_14[1].split())) == 101


def test_what_was_written_comes_back() -> None:
    work = '[[workload]]\non = "g"\nkind = "disk"\nop = "mixed"\ncount = 300\nsize = "{}"\ndisk = "{}"\n'
    text = WORLD + work.format("4K", "xvda") + work.format("512", "xvdb") + work.format("64K", "xvdb")
    with running(text) as run:
        assert run.run()
        assert run.contents.known > 100
        assert run.contents.wrong == 0
        # And it is compared at all.
        disk = run.members["g"].guest.disk("xvdb")  # type: ignore[union-attr]
        store = run.host.backends.devices.find(run.host.backends.devices.number("/dev/loop1-1") or "")
        store.data[:] = bytes(len(store.data))  # type: ignore[union-attr]
        run.thread(run.members["g"], "again", run.contents.read(disk, 0, disk.sectors), 0)
        assert run.run()
        assert run.contents.wrong > 100


@pytest.mark.parametrize("direction", ["out", "in", "echo"])
def test_frames_arrive_as_they_were_sent(direction: str) -> None:
    work = f'[[workload]]\non = "g"\nkind = "net"\ndirection = "{direction}"\ncount = 200\nevery = "1ms"\nsize = 900\n'
    with running(WORLD + work, "duration=1s") as run:
        assert run.run()
        assert (run.traffic.arrived, run.traffic.wrong, run.traffic.lost) == (200, 0, 0)
        nic = run.members["dom0"].devices["peth0"]
        wanted = {"out": (200, 0), "in": (0, 200), "echo": (200, 200)}[direction]
        assert (nic.tx_packets, nic.rx_packets) == wanted  # type: ignore[attr-defined]


def test_frames_between_guests_stay_off_the_wire_once_it_is_known_where_they_go() -> None:
    there = '[[workload]]\non = "g"\nkind = "net"\nto = "h"\ncount = 50\nevery = "1ms"\n'
    back = '[[workload]]\non = "h"\nkind = "net"\nto = "g"\ncount = 50\nevery = "1ms"\n'
    with running(WORLD + there + back, "duration=1s") as run:
        assert run.run()
        assert (run.traffic.arrived, run.traffic.wrong, run.traffic.lost) == (100, 0, 0)
        assert run.members["dom0"].devices["peth0"].tx_packets == 1  # type: ignore[attr-defined]


def test_compute_ticks_and_idle_does_not() -> None:
    text = WORLD + '[[workload]]\non = "g"\nkind = "compute"\ncpu = 1\ntime = "2s"\n'
    with running(text, "duration=10s") as run:
        before = table_of(run, "g")
        assert run.run()
        after = table_of(run, "g")
        assert run.host.clock.now() >= 10 * NS_PER_S
        assert after["timer1"] - before["timer1"] == 200
        assert after["timer0"] == before["timer0"]


def test_console_both_ways() -> None:
    text = '[[workload]]\non = "g"\nkind = "console"\nwhat = "{}"\ntext = "{}\\n"\ncount = 5\nevery = "1ms"\n'
    with running(WORLD + text.format("prints", "out") + text.format("typed", "in")) as run:
        guest = run.members["g"].guest
        assert guest is not None
        assert run.run()
        assert guest.console.output == b"out\n" * 5
        assert bytes(guest.xencons.input) == b"in\n" * 5


def test_hotplug_and_affinity() -> None:
    text = WORLD + (
        '[[workload]]\non = "g"\nkind = "affinity"\nirq = "xenbus"\ncpu = 1\n'
        '[[workload]]\non = "g"\nkind = "hotplug"\ncpu = 1\nto = "offline"\nstart = "1s"\n'
        '[[workload]]\non = "g"\nkind = "xenstore"\nop = "write"\ncount = 12\nstart = "10ms"\n'
    )
    with running(text) as run:
        assert not run.run(NS_PER_S // 2)
        table = run.view("interrupts", run.members["g"])
        row = re.search(r"(\d+) +(\d+) +Dynamic-irq  xenbus", table)
        assert row
        assert int(row[2]) >= 10
        assert run.run()
        assert "CPU1" not in run.view("interrupts", run.members["g"])


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ('on = "x"\nkind = "compute"\ntime = "1s"', "t.toml:15: expected domains of this scenario, not x"),
        ('on = "g"\nkind = "compute"\ntime = "1s"\ncpu = 2', "t.toml:18: expected a CPU of g, 0 to 1"),
        ('on = "h"\nkind = "disk"', "t.toml:14: expected a disk of h: it has none"),
        ('on = "g"\nkind = "disk"\ndisk = "xvdc"', "t.toml:17: expected a disk of g: xvda, xvdb"),
        ('on = "g"\nkind = "disk"\nsize = 600', "t.toml:17: expected a multiple of 512"),
        ('on = "dom0"\nkind = "net"', "t.toml:15: expected a guest with a vif: dom0 has none"),
        ('on = "g"\nkind = "net"\nto = "dom0"', "t.toml:17: expected one guest with a vif, not dom0"),
        ('on = "g"\nkind = "device"\ndevice = "rtc0"', "t.toml:17: expected a device of g: it has none"),
        ('on = "dom0"\nkind = "device"\ndevice = "rtc"', "t.toml:17: expected a device of dom0: i8042, floppy, rtc0"),
        (
            'on = "dom0"\nkind = "device"\ndevice = "rtc0"\naction = "ring"',
            "t.toml:18: expected what can be done with rtc0: alarm",
        ),
        ('on = "g"\nkind = "affinity"\nirq = 99\ncpu = 0', "t.toml:17: g: "),
        ('on = "g"\nkind = "hotplug"\ncpu = 0\nto = "offline"', "t.toml:17: g: EBUSY"),
        ('on = "g"\nkind = "xenstore"\nkey = "/vm"\nop = "write"', "t.toml:17: g: /vm: EACCES"),
        ('on = "dom0"\nkind = "device"\ndevice = "usb1"\naction = "transfer"', "t.toml:17: usb1: "),
    ],
)
def test_errors_while_running_name_the_line(work: str, message: str) -> None:
    with pytest.raises(ScenarioError) as error, running(WORLD + "[[workload]]\n" + work) as run:
        run.run()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[dom0]\nplatform = "pc"', "t.toml:2: unknown machine 'pc': expected one of none, recorded, writeup"),
        ('[[dom0.device]]\ntype = "mouse"', "t.toml:2: unknown device type 'mouse': expected one of acpi"),
        ('[[dom0.device]]\ntype = "rtc"\n[[dom0.device]]\ntype = "rtc"\nname = "rtc"', "t.toml:5: name 'rtc' is taken"),
        ('[[dom0.device]]\ntype = "rtc"\ngsi = "8"', "t.toml:3: gsi of rtc is '8': expected a whole number"),
        (
            '[dom0]\nplatform = "writeup"\n[[dom0.device]]\ntype = "rtc"',
            "t.toml:3: expected either a platform or devices",
        ),
        ('[dom0]\nkernel = "pvops"\nstyle = "writeup"', 't.toml:3: expected "source" for the kernel "pvops"'),
        (
            '[[domain]]\nname = "g"\ndisk = [{name = "xvda", on = "ata9"}]',
            't.toml:3: expected "memory" or a disk of dom0',
        ),
        ('[[domain]]\nname = "g"\ndisk = [{name = "disk1"}]', "t.toml:3: 'disk1' is no virtual device"),
    ],
)
def test_errors_while_building_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        Run(loads(text, "t.toml"))
    assert str(error.value).startswith(message)


def test_many_guests_of_one_kind() -> None:
    text = (
        '[[domain]]\nname = "web"\ncount = 20\nvcpus = 2\n[[workload]]\non = "web-1*"\nkind = "compute"\ntime = "1s"\n'
    )
    with running(text) as run:
        assert [name for name in run.members if name != "dom0"] == [f"web-{i}" for i in range(1, 21)]
        assert run.run()
        ticked = [name for name in run.members if name != "dom0" and table_of(run, name)["timer0"] >= 100]
        assert ticked == [f"web-{i}" for i in (1, *range(10, 20))]


def disks(count: int) -> str:
    names = [f"xvd{a}{b}" for a in "abcdef" for b in "abcdefghijklmnopqrstuvwx"][:count]
    listed = ", ".join(f'{{ name = "{name}", size = "4K" }}' for name in names)
    work = f'[[workload]]\non = "g"\nkind = "disk"\ndisk = "{names[-1]}"\ncount = 10\n'
    return f'[[domain]]\nname = "g"\ndisk = [{listed}]\n{work}'


def test_many_disks_with_extended_numbers() -> None:
    with running(disks(60)) as run:
        assert run.run()
        assert run.view("interrupts", run.members["g"]).count("blkif") == 60


def test_a_device_that_cannot_connect_is_an_error_that_says_where_to_look() -> None:
    """xenstored lets a domain have 1,000 nodes: too few for so many frontends."""
    with pytest.raises(ScenarioError) as error, running(disks(140)) as run:
        run.run()
    assert str(error.value) == "t.toml:7: xvdft of g doesn't connect (see --dmesg g)"
    assert "ENOSPC" in run.view("dmesg", run.members["g"])
