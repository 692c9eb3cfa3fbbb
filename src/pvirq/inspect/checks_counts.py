"""What counts, limits and placement tell: each check is a function from the picture to findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from pvirq.abi.event_channel import EVTCHN_2L_NR_CHANNELS, EVTCHN_FIFO_NR_CHANNELS
from pvirq.abi.xen import VIRQ_TIMER
from pvirq.inspect.finding import SHOWN, Finding, Severity, several, views_of
from pvirq.inspect.irqbalance import class_of
from pvirq.inspect.model import Interrupts, IrqRow, Kind
from pvirq.inspect.picture import PER_CPU_NAME, DomainView, Picture
from pvirq.inspect.source import Where

STORM_PER_S: Final = 50_000  # of one line
BUSY_PER_S: Final = 10_000
ONE_CPU_SHARE: Final = 0.9  # of a domain's device interrupts
ENOUGH: Final = 1_000  # interrupts before shares mean anything
FEW, MANY = 10, 100  # of other lines, on a vCPU without timer interrupts
SPURIOUS_SHARE: Final = 0.01
NEAR: Final = 0.9  # of a limit
XL_EVENT_CHANNELS: Final = 1023  # what xl gives a guest unless max_event_channels says otherwise
DYNIRQ_BASE, DYNIRQS = 256, 256  # XenLinux 2.6.18's dynamic IRQs


def _delta(
    row: IrqRow, table: Interrupts, before: Interrupts | None
) -> np.ndarray[tuple[int], np.dtype[np.uint64]] | None:
    """A row's counts since the earlier table, CPU by CPU; None where they can't be compared."""
    old = (
        None if before is None else next((r for r in before.rows if r.label == row.label and r.name == row.name), None)
    )
    if old is None or before is None or before.cpus != table.cpus or len(old.counts) != len(row.counts):
        return None
    return (row.counts - old.counts) & np.uint64(0xFFFFFFFF)  # counts are 32 bits wide and wrap


def _timers(table: Interrupts) -> dict[int, IrqRow]:
    """The timer's row of each CPU: pvops and 2.6.18 have one each, SUSE's XenLinux one for all, plain x86 LOC."""
    whole = [row for row in table.rows if len(row.counts) == len(table.cpus)]
    timers = {}
    for row in whole:
        match = PER_CPU_NAME.match(row.actions[0]) if row.actions else None
        if match and match[1] == "timer" and int(match[2]) in table.cpus:
            timers[int(match[2])] = row
        elif row.per_cpu and row.name == "timer":
            timers |= dict.fromkeys(table.cpus, row)
    local = next((row for row in whole if row.label == "LOC" and row.total), None)
    return timers or (dict.fromkeys(table.cpus, local) if local else {})


def timer_stopped(picture: Picture) -> Iterator[Finding]:
    """A vCPU without timer interrupts while others have them, or while it has others."""
    for view in views_of(picture):
        table = view.table
        if table is None or not (timers := _timers(table)):
            continue
        now = {cpu: _count_on(_delta(row, table, view.earlier), table, cpu) for cpu, row in timers.items()}
        earlier, since = view.earlier, "since the earlier snapshot"
        if any(count is None for count in now.values()):
            now, earlier, since = {cpu: table.count(row, cpu) for cpu, row in timers.items()}, None, "at all"
        busy = max(count or 0 for count in now.values())
        for cpu, count in sorted(now.items()):
            others = sum(_others(row, table, earlier, cpu) for row in table.rows if row is not timers[cpu])
            if count != 0 or (busy < ENOUGH and (earlier is None or others < FEW)):
                continue
            # A vCPU that sleeps needs no timer; one that was woken often enough would have had it by the way.
            idle = Severity.WARNING if earlier is None or others >= FEW else Severity.NOTE
            severity = Severity.ERROR if others >= MANY else idle
            had = f"another had {busy}; other lines of it {others}"
            text = f"{view.label}: vCPU {cpu} had no timer interrupt {since} ({had})."
            text += " It may have slept." if severity is Severity.NOTE else ""
            evidence = (timers[cpu].where, *(
                each.where for each in (view.ports.channels if view.ports else ())
                if each.kind is Kind.VIRQ and each.virq == VIRQ_TIMER and each.vcpu == cpu
            ))  # fmt: skip
            command = f"xl debug-keys q; xenctx -a {max(view.domid, 0)} {cpu}"
            yield Finding(severity, "timer-stopped", text, evidence, command, view.domid)


def _count_on(delta: np.ndarray[tuple[int], np.dtype[np.uint64]] | None, table: Interrupts, cpu: int) -> int | None:
    return None if delta is None else int(delta[table.cpus.index(cpu)])


def _others(row: IrqRow, table: Interrupts, earlier: Interrupts | None, cpu: int) -> int:
    """A line's interrupts on a CPU in the same time."""
    if row.irq is None or len(row.counts) != len(table.cpus):
        return 0
    return table.count(row, cpu) if earlier is None else _count_on(_delta(row, table, earlier), table, cpu) or 0


def storm(picture: Picture) -> Iterator[Finding]:
    """Lines with more interrupts than any device has reason for; and Xen's in-flight ones that a guest owes an EOI."""
    seconds = picture.seconds
    for view in views_of(picture):
        for row in view.table.rows if view.table and seconds else ():
            delta = _delta(row, view.table, view.earlier) if view.table else None
            if delta is None or row.irq is None:
                continue
            rate = int(delta.sum()) / (seconds or 1)
            if rate >= BUSY_PER_S:
                severity = Severity.ERROR if rate >= STORM_PER_S else Severity.WARNING
                text = f"{view.label} IRQ {row.label} ({row.name}): {rate:,.0f} interrupts a second."
                link = view.by_irq.get(row.irq)
                if link is not None and link.peer is not None:
                    text += f" They come from domain {link.peer[0]}, port {link.peer[1]}."
                yield Finding(
                    severity,
                    "storm",
                    text,
                    link.evidence if link else (row.where,),
                    f"xl pause {link.peer[0]}" if link and link.peer and link.peer[0] else "",
                    view.domid,
                )
    for irq in picture.snapshot.xen_irqs:
        owing = [guest for guest in irq.guests if guest.masked and irq.in_flight]
        if owing:
            who = several([f"domain {guest.domid} (pirq {guest.pirq})" for guest in owing])
            owes = f"{who} has it masked and hasn't acknowledged it"
            text = f"Xen's IRQ {irq.irq} ({irq.type}) is in flight {irq.in_flight}: {owes}."
            yield Finding(Severity.WARNING, "storm", text, (irq.where,), "xl debug-keys i")


def one_cpu(picture: Picture) -> Iterator[Finding]:
    """All device interrupts on one vCPU."""
    for view in views_of(picture):
        table = view.table
        if table is None or len(table.cpus) < 2:
            continue
        total = np.zeros(len(table.cpus), np.uint64)
        rows: list[tuple[int, IrqRow]] = []
        for row in table.rows:
            if row.irq is None or row.per_cpu or len(row.counts) != len(table.cpus) or PER_CPU_NAME.match(row.name):
                continue
            counts = _delta(row, table, view.earlier)
            counts = row.counts if counts is None else counts
            total += counts
            if counts.any():
                rows.append((int(counts.sum()), row))
        whole = int(total.sum())
        if whole < ENOUGH or len(rows) < 2:
            continue
        cpu = int(total.argmax())
        share = int(total[cpu]) / whole
        if share < ONE_CPU_SHARE:
            continue
        rows.sort(key=lambda pair: -pair[0])
        names = several([f"{row.name} (IRQ {row.label})" for _, row in rows])
        takes = f"vCPU {table.cpus[cpu]} of {len(table.cpus)} takes {share:.0%} of all device interrupts"
        text = f"{view.label}: {takes}: {names}."
        busiest = rows[1][1] if len(rows) > 1 else rows[0][1]
        target = table.cpus[(cpu + 1) % len(table.cpus)]
        command = f"echo {target} > /proc/irq/{busiest.label}/smp_affinity_list"
        yield Finding(
            Severity.WARNING, "one-cpu", text, tuple(row.where for _, row in rows[:SHOWN]), command, view.domid
        )


def lateeoi(picture: Picture) -> Iterator[Finding]:
    """Devices whose events Linux holds back, because too many of them were for nothing."""
    counters: dict[tuple[str, str], dict[str, int]] = {}
    places: dict[tuple[str, str], list[Where]] = {}
    for counter in picture.snapshot.counters:
        key = (counter.hint, counter.device)
        counters.setdefault(key, {})[counter.name] = counter.value
        places.setdefault(key, []).append(counter.where)
    before: dict[tuple[str, str, str], int] = {}
    for counter in picture.earlier.counters if picture.earlier else ():
        before[counter.hint, counter.device, counter.name] = counter.value
    for (hint, device), values in sorted(counters.items()):
        delayed, spurious, events = (
            values.get(name, 0) for name in ("jiffies_eoi_delayed", "spurious_events", "events")
        )
        grown = delayed - before.get((hint, device, "jiffies_eoi_delayed"), delayed)
        if delayed:
            severity = Severity.WARNING if grown or (events and spurious / events >= SPURIOUS_SHARE) else Severity.NOTE
            growing = f", {grown} of them since the earlier snapshot" if grown else ""
            text = f"{device}: Linux held back events for {delayed} jiffies{growing}: "
            text += f"{spurious} of {events} were spurious."
            threshold = max(2 * values.get("spurious_threshold", 1), 2)
            command = f"echo {threshold} > {_sys_path(device)}/xenbus/spurious_threshold"
            yield Finding(severity, "lateeoi", text, tuple(places[hint, device]), command)
        elif spurious:
            share = spurious / events if events else 1.0
            severity = Severity.WARNING if share >= SPURIOUS_SHARE and spurious >= 100 else Severity.NOTE
            text = f"{device}: {spurious} of {events} events found no work (none was held back)."
            yield Finding(severity, "lateeoi", text, tuple(places[hint, device]))


def _sys_path(device: str) -> str:
    return f"/sys/bus/{'xen-backend' if device.count('-') > 1 else 'xen'}/devices/{device}"


def spurious_irq(picture: Picture) -> Iterator[Finding]:
    """Interrupts that no handler wanted, and the error rows of x86."""
    few: list[tuple[int, int, Where]] = []
    for file in picture.snapshot.irq_files:
        words = file.value.replace("|", " ").split() if file.name == "spurious" else []
        unhandled = words[words.index("unhandled") + 1] if "unhandled" in words[:-1] else "0"
        count = int(unhandled) if unhandled.isdecimal() and len(unhandled) < 15 else 0
        if count >= ENOUGH:
            text = f"IRQ {file.irq}: {count} interrupts were handled by nobody; "
            text += "Linux disables a line of which 99,900 in 100,000 are."
            yield Finding(Severity.WARNING, "spurious-irq", text, (file.where,), f"cat /proc/irq/{file.irq}/spurious")
        elif count:
            few.append((file.irq, count, file.where))
    if few:
        what = several([f"IRQ {irq} ({count})" for irq, count, _ in few])
        text = f"Some interrupts were handled by nobody: {what}."
        yield Finding(Severity.NOTE, "spurious-irq", text, tuple(where for _, _, where in few[:SHOWN]))
    for view in views_of(picture):
        for row in view.table.rows if view.table else ():
            if row.label.upper() in ("ERR", "MIS", "SPU") and row.total > 0:
                what = {"ERR": "errors", "MIS": "mismatched level interrupts", "SPU": "spurious interrupts"}[
                    row.label.upper()
                ]
                text = f"{view.label}: {row.total} {what} of the interrupt controller ({row.label})."
                yield Finding(Severity.NOTE, "spurious-irq", text, (row.where,), domid=view.domid)


# -- limits and placement ----------------------------------------------------------------------------------------------


def near_limit(picture: Picture) -> Iterator[Finding]:
    """Ports or dynamic IRQs that are nearly used up."""
    for view in views_of(picture):
        if view.ports is not None and view.ports.channels:
            highest = max(view.ports.channels, key=lambda channel: channel.port)
            limits = (
                [(EVTCHN_2L_NR_CHANNELS, "the two-level ABI's")]
                if not _is_fifo(view)
                else [(EVTCHN_FIFO_NR_CHANNELS, "the FIFO ABI's")]
            )
            if view.domid != 0:
                limits.insert(0, (XL_EVENT_CHANNELS + 1, "xl's max_event_channels (1023 unless configured)"))
            for limit, whose in limits:
                if NEAR * limit <= highest.port < limit:
                    text = f"{view.label} uses ports up to {highest.port}, near {whose} limit of {limit - 1}: "
                    text += "new devices will fail to connect."
                    command = (
                        "max_event_channels = 4095 in the domain's configuration"
                        if view.domid
                        else "fewer devices, or a kernel with FIFO events"
                    )
                    yield Finding(Severity.WARNING, "near-limit", text, (highest.where,), command, view.domid)
        old = (
            [row for row in view.table.rows if row.chip == "Dynamic-irq" and row.irq is not None] if view.table else []
        )
        used = sum(1 for row in old if row.irq is not None and DYNIRQ_BASE <= row.irq < DYNIRQ_BASE + DYNIRQS)
        if used >= NEAR * DYNIRQS:
            text = f"{view.label} uses {used} of the {DYNIRQS} dynamic IRQs of its kernel."
            yield Finding(Severity.WARNING, "near-limit", text, (old[-1].where,), "", view.domid)
    for room in picture.snapshot.irq_limits:
        for view in views_of(picture):
            used = len([row for row in view.table.rows if row.irq is not None]) if view.table else 0
            if view.table is not None and used >= NEAR * room.nr_irqs:
                text = f"{view.label} shows {used} IRQs; its kernel began with room for {room.nr_irqs}."
                yield Finding(Severity.NOTE, "near-limit", text, (room.where, view.table.where), "", view.domid)


def _is_fifo(view: DomainView) -> bool:
    """By the ABI's own state of a port: "-" or a link, where the two-level one has a selector bit."""
    return any(
        channel.state not in ("", "0", "1", "in flux") for channel in (view.ports.channels if view.ports else ())
    )


def not_balanced(picture: Picture) -> Iterator[Finding]:
    """Lines that irqbalance takes for something else, and what becomes of them."""
    for view in views_of(picture):
        table = view.table
        if table is None or len(table.cpus) < 2:
            continue
        groups: dict[str, list[IrqRow]] = {}
        for row in table.rows:
            reason = class_of(row).reason if row.irq is not None and row.total else ""
            if reason:
                groups.setdefault(reason, []).append(row)
        for reason, rows in sorted(groups.items()):
            rows.sort(key=lambda row: -row.total)
            names = several([f"{row.name or row.chip} (IRQ {row.label})" for row in rows])
            lines = f"{len(rows)} line{'s' * (len(rows) > 1)} that had interrupts"
            text = f"{view.label}: irqbalance won't balance {lines}, {reason}: {names}."
            command = (
                f"echo {table.cpus[-1]} > /proc/irq/{rows[0].label}/smp_affinity_list" if not rows[0].per_cpu else ""
            )
            yield Finding(
                Severity.NOTE, "not-balanced", text, tuple(row.where for row in rows[:SHOWN]), command, view.domid
            )
