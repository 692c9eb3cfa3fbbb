"""Joins what was read into one picture: whose each table and list is, and which device each port serves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from pvirq.inspect.linker import VIF_BACK, Linker
from pvirq.inspect.model import (
    Channel,
    ChannelList,
    Interrupts,
    Kind,
    Snapshot,
    StoreNode,
)
from pvirq.inspect.picture import Device, DomainView, Picture

EVENT_NODE: Final = re.compile(
    r"/local/domain/(\d{1,5})/device/([a-z0-9_-]{1,32})/(\d{1,9})(?:/queue-(\d{1,4}))?/event-channel(?:-(tx|rx|req|evt|in))?$"
)
OWN_NODE: Final = re.compile(r"/local/domain/(\d{1,5})/(store|console)/port$")
NAME_NODE: Final = re.compile(r"/local/domain/(\d{1,5})/name$")


def join(snapshot: Snapshot, earlier: Snapshot | None = None, seconds: float | None = None) -> Picture:
    """One picture of a snapshot; with an `earlier` one of the same machine, also how things have changed.

    Where one snapshot has several tables of a domain, the first is the earlier state and the last the present one.
    `seconds` is the time in between, where the snapshots don't tell it.
    """
    channels, superseded = _last_dump(snapshot.channels)
    store = _last_listing(snapshot.store)
    known = {each.domid for each in channels if each.domid is not None}
    listed = {each.domid for each in snapshot.xl_domains} | {each.domid for each in snapshot.domains}
    named: dict[int, str] = {}
    for node in store:
        if match := NAME_NODE.match(node.path):
            named[int(match[1])] = node.value
    named |= {each.domid: each.name for each in snapshot.xl_domains}
    picture = Picture(snapshot, {}, complete=bool(listed or known), earlier=earlier, interval=seconds)
    picture.superseded = superseded
    for domid in sorted(known | listed | set(named)):
        picture.domains[domid] = DomainView(domid, named.get(domid, ""))
    _give_ports(picture, channels, known | listed | set(named))
    _give_tables(picture, snapshot.interrupts)
    if earlier is not None:
        picture.before = join(earlier)
        _give_earlier(picture, earlier)
    for info in snapshot.domains:
        picture.domains[info.domid].info = info
    for domain in snapshot.xl_domains:
        picture.domains[domain.domid].xl = domain
    for vcpu in snapshot.xl_vcpus:
        picture.domains.setdefault(vcpu.domid, DomainView(vcpu.domid, vcpu.name)).vcpus[vcpu.vcpu] = vcpu
    picture.devices = _devices(picture, store)
    for view in picture.domains.values():
        view.links = Linker(picture, view).links()
    return picture


# -- whose is it -------------------------------------------------------------------------------------------------------


def _last_dump(lists: tuple[ChannelList, ...]) -> tuple[list[ChannelList], tuple[ChannelList, ...]]:
    """What `lsevtchn` printed and the last of several dumps of the 'e' key; and the older dumps, which are of the past.

    A dump has each domain once: one that comes again, or another file, begins another dump.
    """
    kept = [each for each in lists if each.domid is None]
    dump: list[ChannelList] = []
    seen: set[int] = set()
    older: list[ChannelList] = []
    for each in lists:
        if each.domid is None:
            continue
        if dump and (each.where.file != dump[0].where.file or each.domid in seen):
            older += dump
            dump, seen = [], set()
        dump.append(each)
        seen.add(each.domid)
    return kept + dump, tuple(older)


def _last_listing(nodes: tuple[StoreNode, ...]) -> list[StoreNode]:
    """The nodes of the last of several listings of xenstore: a node that comes again begins another.

    A listing of a part only, without /local/domain, is added to the one before it.
    """
    before: dict[str, StoreNode] = {}
    current: dict[str, StoreNode] = {}
    for node in nodes:
        if node.path in current:
            before = current if "/local/domain" in current else before | current
            current = {}
        current[node.path] = node
    return list((current if "/local/domain" in current else before | current).values())


def _give_ports(picture: Picture, channels: Iterable[ChannelList], known: set[int]) -> None:
    """Event channels to domains: the 'e' key says whose they are, lsevtchn's file or what it agrees with does."""
    views = picture.domains
    channels = list(channels)
    for ports in channels:
        if ports.domid is not None:
            views[ports.domid].ports = ports
    pending: list[ChannelList] = []
    for ports in channels:
        if ports.domid is None:
            domid = _by_hint(ports.hint, views, known)
            if domid is None:
                pending.append(ports)
            else:
                _set_ports(views, domid, ports)
    for ports in pending:
        domid = _by_ends(ports, views)
        if domid is None:
            domid = _only_guest(views, known, lambda view: view.ports is None) if 0 in views else 0
        _set_ports(views, domid if domid is not None else min([0, *views]) - 1, ports)


def _set_ports(views: dict[int, DomainView], domid: int, ports: ChannelList) -> None:
    view = views.setdefault(domid, DomainView(domid))
    if view.ports is None or view.ports.source == "lsevtchn":  # the 'e' key says more
        view.ports = ports


def _by_hint(hint: str, views: dict[int, DomainView], known: set[int]) -> int | None:
    if hint.isdecimal():
        return int(hint)
    if hint == "domU":
        return _only_guest(views, known, lambda view: True)
    return next((domid for domid, view in views.items() if hint and view.name == hint), None)


def _only_guest(views: dict[int, DomainView], known: set[int], wanted: object) -> int | None:
    guests = [
        domid for domid in known if domid != 0 and domid in views and (not callable(wanted) or wanted(views[domid]))
    ]
    return guests[0] if len(guests) == 1 else None


def _by_ends(ports: ChannelList, views: dict[int, DomainView]) -> int | None:
    """The domain whose ports these are by their other ends, or by what the 'e' key says of the same ports."""
    votes: dict[int, int] = {}
    for view in views.values():
        if view.ports is None:
            continue
        same = sum(_same(channel, view.ports.by_port.get(channel.port)) for channel in ports.channels)
        if same == len(ports.channels):
            votes[view.domid] = votes.get(view.domid, 0) + same
        for channel in ports.channels:
            other = view.ports.by_port.get(channel.remote_port or 0) if channel.remote == view.domid else None
            if other is not None and other.remote_port == channel.port and other.remote is not None:
                votes[other.remote] = votes.get(other.remote, 0) + 1
    return max(votes, key=votes.__getitem__) if votes else None


def _same(a: Channel, b: Channel | None) -> bool:
    return b is not None and (a.kind, a.vcpu, a.remote, a.remote_port) == (b.kind, b.vcpu, b.remote, b.remote_port)


def _is_dom0(table: Interrupts) -> bool:
    """By handlers that only domain 0 has."""
    names = [name for row in table.rows if row.irq is not None for name in row.actions]
    backend = any(name.startswith("evtchn:") or name == "blkif-backend" or VIF_BACK.match(name) for name in names)
    return backend or any(row.chip in ("xen-pirq", "Phys", "Phys-irq") for row in table.rows)


def _give_tables(picture: Picture, tables: Iterable[Interrupts]) -> None:
    """Tables to domains; of several of one domain the first is the earlier state."""
    views = picture.domains
    known = {domid for domid in views if domid >= 0}
    unknown: dict[tuple[str, str], int] = {}  # several tables of one file are of one guest
    for table in tables:
        domid = _by_hint(table.hint, views, known)
        if domid is None and not table.hint.isdecimal():
            if _is_dom0(table):
                domid = 0
            else:
                domid = _only_guest(views, known, lambda view: view.table is None)
                if domid is None and len(views) == 1 and 0 in views and views[0].ports is not None:
                    domid = 0
        if domid is None:
            owner = (table.where.file, table.hint)
            free = [each for each, view in views.items() if each < 0 and view.table is None]
            domid = unknown.setdefault(owner, max(free, default=min([0, *views]) - 1))
        view = views.setdefault(domid, DomainView(domid))
        if view.table is not None and view.earlier is None:
            view.earlier = view.table
        view.table = table


def _give_earlier(picture: Picture, earlier: Snapshot) -> None:
    before = Picture(earlier, {domid: DomainView(domid, view.name) for domid, view in picture.domains.items()}, True)
    for view in before.domains.values():
        view.ports = picture.domains[view.domid].ports
    _give_tables(before, earlier.interrupts)
    for domid, view in before.domains.items():
        if domid in picture.domains and view.table is not None:
            picture.domains[domid].earlier = view.table


# -- devices -----------------------------------------------------------------------------------------------------------


def _devices(picture: Picture, store: Iterable[StoreNode]) -> dict[tuple[int, int], tuple[Device, str]]:
    """The device of each port that xenstore names, and of the port at its other end."""
    found: dict[tuple[int, int], tuple[Device, str]] = {}
    for node in store:
        device = _device_of(node)
        if device is None or not node.value.isdecimal() or len(node.value) > 7:
            continue
        port = int(node.value)
        found[device.frontend, port] = (device, "front")
    for view in picture.domains.values():
        for channel in view.ports.channels if view.ports else ():
            if channel.kind is Kind.INTERDOMAIN and channel.remote is not None:
                front = found.get((channel.remote, channel.remote_port or 0))
                if front is not None and front[1] == "front" and (view.domid, channel.port) not in found:
                    found[view.domid, channel.port] = (front[0], "back")
    return found


def _device_of(node: StoreNode) -> Device | None:
    if match := EVENT_NODE.match(node.path):
        domid, kind, number, queue, direction = match.groups()
        return Device(int(domid), kind, int(number), None if queue is None else int(queue), direction or "", node.where)
    if match := OWN_NODE.match(node.path):
        return Device(int(match[1]), match[2], where=node.where)
    return None
