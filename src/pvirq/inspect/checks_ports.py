"""What is wrong with event channels: each check is a function from the picture to findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pvirq.inspect.finding import SHOWN, Finding, Severity, channels_of, describe, several, views_of, what_is
from pvirq.inspect.model import Channel, Kind
from pvirq.inspect.picture import DomainView, How, Link, Picture
from pvirq.inspect.source import Where

CONNECTED: Final = "4"  # XenbusStateConnected


def _is_spinlock(link: Link) -> bool:
    """The IPI that wakes a vCPU from a PV spinlock is polled for, and is pending and masked for most of its life."""
    name = link.row.name if link.row else ""
    return name.startswith(("spinlock", "qlock_kick")) or (
        not name and link.channel is not None and link.channel.kind is Kind.IPI
    )


def _lasts(picture: Picture, view: DomainView, link: Link, channel: Channel) -> bool:
    """It was so in the earlier snapshot, and no interrupt came in between."""
    earlier = picture.before.domains.get(view.domid) if picture.before else None
    old = earlier.ports.by_port.get(channel.port) if earlier and earlier.ports else None
    if old is None or (old.kind, old.pending, old.masked) != (channel.kind, channel.pending, channel.masked):
        return False
    row = None if view.earlier is None or link.row is None else view.earlier.by_irq.get(link.row.irq or 0)
    return row is None or link.row is None or row.total == link.row.total


def stuck_pending(picture: Picture) -> Iterator[Finding]:
    """Pending, not masked, and the vCPU doesn't take it."""
    for view in views_of(picture):
        by_vcpu: dict[int, list[tuple[Link, Channel]]] = {}
        for link, channel in channels_of(view):
            if channel.pending and not channel.masked and not channel.consumer:
                by_vcpu.setdefault(channel.vcpu, []).append((link, channel))
        for vcpu, links in sorted(by_vcpu.items()):
            severity, why, command, also = _vcpu_state(view, vcpu)
            if any(_lasts(picture, view, link, channel) for link, channel in links):
                severity = Severity(min(severity + 1, Severity.ERROR))
                why = why.replace("it may be on its way", "but it was pending in the earlier snapshot too")
            what = several([describe(view, link) for link, _ in links])
            evidence = tuple(where for link, _ in links[:SHOWN] for where in link.evidence) + also
            text = f"{what}: event pending and not masked, {why}."
            yield Finding(severity, "stuck-pending", text, evidence, command, view.domid)


def _vcpu_state(view: DomainView, vcpu: int) -> tuple[Severity, str, str, tuple[Where, ...]]:
    """How bad an event for a vCPU is that hasn't been taken, why, and what to do."""
    info, xl = view.vcpu_info(vcpu), view.vcpus.get(vcpu)
    state = xl.state if xl else ""
    paused = (view.xl is not None and "p" in view.xl.state) or (
        view.info is not None and (view.info.pause_count or 0) > 0
    )
    where = tuple(each.where for each in (info, xl, view.xl if paused else None) if each)
    if paused:
        return Severity.WARNING, "but the domain is paused", f"xl unpause {view.domid}", where
    if xl is not None and xl.cpu is None:
        return Severity.ERROR, f"but vCPU {vcpu} is offline", f"xl vcpu-set {view.domid} {vcpu + 1}", where
    if info is not None and not info.running and info.upcall_pending and info.upcall_masked:
        why = f"but vCPU {vcpu} isn't running and has upcalls masked: its kernel sleeps or hangs with interrupts off"
        return Severity.ERROR, why, f"xl debug-keys q; xenctx -a {view.domid} {vcpu}", where
    if (info is not None and not info.running and not info.pause_flags) or "r" in state:
        return Severity.NOTE, f"and vCPU {vcpu} is about to run: it may be on its way", "xl debug-keys e", where
    if info is not None and not info.running:
        why = f"but vCPU {vcpu} isn't running (pause_flags {info.pause_flags:x})"
        return Severity.ERROR, why, f"xl debug-keys q; xenctx -a {view.domid} {vcpu}", where
    if "b" in state:
        why = f"but vCPU {vcpu} is blocked: the event did not wake it"
        return Severity.WARNING, why, f"xl debug-keys q; xenctx -a {view.domid} {vcpu}", where
    if info is not None or state:
        return Severity.NOTE, f"and vCPU {vcpu} runs: it may be on its way", "xl debug-keys e", where
    return Severity.NOTE, "and nothing was read of the vCPU: it may be on its way", "xl debug-keys q; xl vcpu-list", ()


def pending_masked(picture: Picture) -> Iterator[Finding]:
    """An event waits behind a mask."""
    for view in views_of(picture):
        for link, channel in channels_of(view):
            if not (channel.pending and channel.masked) or channel.consumer or _is_spinlock(link):
                continue
            late = link.row is not None and "lateeoi" in link.row.chip
            why = "its handler still works on the last one, or the kernel delays its EOI" if late else (
                "the line is disabled, or nobody has opened the port"
            )  # fmt: skip
            command = "xl debug-keys e"
            if link.device is not None and link.side == "front" and link.device.type in ("vbd", "vif"):
                name = f"{link.device.type}-{link.device.id}"
                command = f"grep . /sys/bus/xen/devices/{name}/xenbus/*"
            elif link.row is not None:
                command = f"grep . /proc/irq/{link.row.label}/spurious"
            severity = Severity.NOTE if late else Severity.WARNING
            text = f"{describe(view, link)}: event pending but the port is masked: {why}."
            if _lasts(picture, view, link, channel):
                severity = Severity(severity + 1)
                text += " It was so in the earlier snapshot too."
            yield Finding(severity, "pending-masked", text, link.evidence, command, view.domid)


def misplaced(picture: Picture) -> Iterator[Finding]:
    """Linux has a line on one vCPU, Xen its port on another."""
    for view in views_of(picture):
        for link, channel in channels_of(view):
            cpus = picture.effective(view.domid, link.row.irq or 0) if link.row else ()
            if link.how is How.NAME and cpus and channel.vcpu not in cpus:
                where = ",".join(map(str, cpus))
                text = (
                    f"{describe(view, link)}: for Linux the line is on CPU {where}, for Xen the port on {channel.vcpu}."
                )
                text += " Were the two read at different times?"
                command = f"echo {cpus[0]} > /proc/irq/{link.row.label if link.row else 0}/smp_affinity_list"
                yield Finding(Severity.NOTE, "misplaced", text, link.evidence, command, view.domid)


# -- ports that nobody uses --------------------------------------------------------------------------------------------


def leaked_port(picture: Picture) -> Iterator[Finding]:
    """Ports for domains that are gone."""
    if not picture.complete:
        return
    alive = {domid for domid in picture.domains if domid >= 0}
    for view in views_of(picture):
        dead: dict[int, list[Link]] = {}
        for link, channel in channels_of(view):
            if channel.remote is not None and channel.remote not in alive and channel.remote < 0x7FF0:
                dead.setdefault(channel.remote, []).append(link)
        for remote, links in sorted(dead.items()):
            what = several([f"{link.channel.port}" for link in links if link.channel])
            names = sorted({link.row.name for link in links if link.row})
            holder = f", held by {several(names)}" if names else ""
            keeps = f"{view.label} keeps {len(links)} port{'s' * (len(links) > 1)} ({what})"
            text = f"{keeps} for domain {remote}, which is gone{holder}."
            command = f"xenstore-ls -f | grep '/{remote}/'"
            user = next((name.removeprefix("evtchn:") for name in names if name.startswith("evtchn:")), "")
            if user and user not in ("xenstored", "oxenstored"):  # which can't be restarted
                command = f"pkill {user}"
            elif back := next((link.device for link in links if link.side == "back" and link.device), None):
                command = f"xenstore-rm /local/domain/{view.domid}/backend/{back.type}/{remote}"
            evidence = tuple(where for link in links[:SHOWN] for where in link.evidence)
            yield Finding(Severity.WARNING, "leaked-port", text, evidence, command, view.domid)


def zombie_domain(picture: Picture) -> Iterator[Finding]:
    """Domains that are dead and not gone."""
    for view in views_of(picture):
        dying = view.info is not None and (view.info.dying or 0) > 0
        if not dying and not (view.xl is not None and "d" in view.xl.state):
            continue
        holders = [
            f"domain {other.domid} port {channel.port}"
            for other in views_of(picture) if other is not view
            for _, channel in channels_of(other) if channel.remote == view.domid
        ]  # fmt: skip
        still = f" Ports for it are still open: {several(holders)}." if holders else ""
        evidence = tuple(each.where for each in (view.info, view.xl) if each)
        text = f"{view.label} is dying and has not gone: someone holds its memory or ports.{still}"
        yield Finding(Severity.WARNING, "zombie-domain", text, evidence, "xl debug-keys q; xl debug-keys g", view.domid)


def unbound_port(picture: Picture) -> Iterator[Finding]:
    """Ports that wait for the other end."""
    alive = set(picture.domains)
    for view in views_of(picture):
        waiting = [
            (link, channel) for link, channel in channels_of(view)
            if channel.kind is Kind.UNBOUND and not channel.consumer
            and (channel.remote in alive or not picture.complete)
        ]  # fmt: skip
        for link, channel in waiting:
            device = link.device
            if device is not None and link.side == "front":
                waits = f"the frontend waits for domain {channel.remote}, whose backend hasn't connected"
                text = f"{describe(view, link)}: {waits}."
                back = f"/local/domain/{channel.remote}/backend/{device.type}/{view.domid}/{device.id}"
                evidence = link.evidence + _states(picture, view.domid, device.type, device.id)
                yield Finding(Severity.WARNING, "unbound-port", text, evidence, f"xenstore-ls -f {back}", view.domid)
        plain = [(link, channel) for link, channel in waiting if not (link.device and link.side == "front")]
        if plain:
            what = several([f"{channel.port} (for domain {channel.remote})" for _, channel in plain])
            text = f"{view.label} has {len(plain)} port{'s' * (len(plain) > 1)} that nobody has bound yet: {what}."
            evidence = tuple(where for link, _ in plain[:SHOWN] for where in link.evidence)
            yield Finding(Severity.NOTE, "unbound-port", text, evidence, "", view.domid)


def _states(picture: Picture, domid: int, kind: str, number: int) -> tuple[Where, ...]:
    node = picture.snapshot.paths.get(f"/local/domain/{domid}/device/{kind}/{number}/state")
    return (node.where,) if node else ()


def device_port(picture: Picture) -> Iterator[Finding]:
    """A device's frontend names a port that isn't one end of a channel."""
    for (domid, port), (device, side) in sorted(picture.devices.items()):
        view = picture.domains.get(domid)
        if side != "front" or view is None or view.ports is None or device.where is None:
            continue
        channel = view.ports.by_port.get(port)
        if channel is not None and channel.kind in (Kind.INTERDOMAIN, Kind.UNBOUND):
            continue
        state = picture.snapshot.paths.get(f"/local/domain/{domid}/device/{device.type}/{device.id}/state")
        if state is not None and state.value != CONNECTED:
            continue  # it may have been one
        now = "is closed" if channel is None else f"is {what_is(channel)}"
        where = (device.where,) + ((channel.where,) if channel else (view.ports.where,))
        text = f"{view.label} {device.name}: xenstore says port {port}, but that port {now}: no event will arrive."
        command = {"vbd": f"xl block-detach {domid} {device.id}", "vif": f"xl network-detach {domid} {device.id}"}.get(
            device.type, ""
        )
        yield Finding(Severity.ERROR, "device-port", text, where, command, domid)


def one_sided(picture: Picture) -> Iterator[Finding]:
    """The other end doesn't know of the channel."""
    for view in views_of(picture):
        broken: dict[int, list[tuple[Link, str, Where]]] = {}
        for link, channel in channels_of(view):
            other = picture.domains.get(channel.remote) if channel.remote is not None else None
            if channel.kind is not Kind.INTERDOMAIN or other is None or other.ports is None:
                continue
            end = other.ports.by_port.get(channel.remote_port or 0)
            if end is not None and (end.consumer or (end.remote, end.remote_port) == (view.domid, channel.port)):
                continue
            if end is None and other.ports.source == "lsevtchn" and view.ports and view.ports.source != "lsevtchn":
                continue  # Xen's own, which it leaves out
            now = "isn't open" if end is None else f"is {what_is(end)}"
            where = end.where if end else other.ports.where
            text = f"{channel.port} (to port {channel.remote_port}, which {now})"
            broken.setdefault(other.domid, []).append((link, text, where))
        for domid, found in sorted(broken.items()):
            what = several([text for _, text, _ in found])
            text = f"{view.label}: channels to domain {domid} that it has no end of: port {what}."
            evidence = tuple(where for link, _, end in found[:SHOWN] for where in (*link.evidence, end))
            text += " Were the two listed at different times?"
            yield Finding(Severity.NOTE, "one-sided", text, evidence, "xl debug-keys e", view.domid)
