"""Frames of a scenario: made by a workload, known again where they arrive, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import XenError
from pvirq.drivers.netfront import NetFront
from pvirq.drivers.skb import Skb
from pvirq.hardware.nic import NicDriver
from pvirq.linux.kthread import Body, sleep

if TYPE_CHECKING:
    from pvirq.scenario.run import Member, Run
    from pvirq.scenario.workload import Packets

ETHERTYPE: Final = b"\x88\xb5"  # for local experiments
STATION: Final = bytes.fromhex("020000fffffe")  # who is at the far end of every wire
ID_AT: Final = 14
ID_SIZE: Final = 8
FULL_NS: Final = 100_000  # how often a sender looks whether a full queue has room again


class Traffic:
    """All frames that are under way. `arrived` counts those that came as they were sent, `wrong` those that changed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next = 0
        self._under_way: dict[bytes, bytes] = {}
        self._hooked: set[object] = set()
        self.arrived = 0
        self.wrong = 0

    def start(self, workload: Packets, member: Member, rng: random.Random) -> None:
        """Set a workload off for one guest. Unexpected where it hasn't what that takes."""
        guest = member.guest
        if guest is None or not member.vifs:
            raise workload.unexpected("on", f"expected a guest with a vif: {member.name} has none")
        if workload.to:
            if workload.direction != "out":
                raise workload.unexpected("to", 'expected only with direction = "out"')
            peers = self._run.find(workload.to)
            if len(peers) != 1 or peers[0].guest is None or not peers[0].vifs:
                raise workload.unexpected("to", f"expected one guest with a vif, not {workload.to}")
            self._run.thread(member, "net", self._send(workload, member, rng, peers[0]), workload.cpu_of(member))
            return
        wire = self._wire(workload, member)
        if workload.direction == "out":
            self._run.thread(member, "net", self._send(workload, member, rng, None), workload.cpu_of(member))
        else:
            self._run.thread(member, "net", self._listen(workload, member, echo=workload.direction == "echo"), 0)
            self._run.outside(self._arrive(workload, member, rng, wire))

    def _wire(self, workload: Packets, member: Member) -> NicDriver:
        """The NIC of domain 0 on the bridge of a guest's first vif."""
        bridge = member.vifs[0].bridge
        for nic in self._run.members["dom0"].devices.values():
            if isinstance(nic, NicDriver) and nic.bridge == bridge:
                if nic not in self._hooked:
                    self._hooked.add(nic)
                    nic.wire.on_frame = self._received
                return nic
        raise workload.unexpected("direction", f'expected a device of type "nic" with bridge = "{bridge}" in dom0')

    def _frame(self, target: bytes, source: bytes, size: int, rng: random.Random) -> bytes:
        self._next += 1
        ident = self._next.to_bytes(ID_SIZE, "big")
        head = target + source + ETHERTYPE + ident
        frame = head + rng.randbytes(max(size - len(head), 0))
        self._under_way[ident] = frame
        return frame

    @property
    def lost(self) -> int:
        """Frames that have not arrived; some may still be under way."""
        return len(self._under_way)

    def _received(self, frame: bytes) -> None:
        """A frame has arrived where it was to go. One that isn't of ours is somebody else's."""
        ident = frame[ID_AT : ID_AT + ID_SIZE]
        if frame[12:14] != ETHERTYPE or ident not in self._under_way:
            return
        if frame == self._under_way.pop(ident):
            self.arrived += 1
        else:
            self.wrong += 1

    # In guests.

    def _nic(self, workload: Packets, member: Member) -> Body[NetFront]:
        """A guest's first interface, connected."""
        assert member.guest is not None
        try:
            nic = yield from member.guest.wait_nic(0)
        except XenError as error:
            raise workload.unexpected("on", f"{error.why} (see --dmesg {member.name})") from None
        return nic

    def _send(self, workload: Packets, member: Member, rng: random.Random, to: Member | None) -> Body[None]:
        nic = yield from self._nic(workload, member)
        target = STATION
        if to is not None:
            target = (yield from self._listen(workload, to, echo=False)).address
        for gap in workload.times(self._run, rng):
            yield from sleep(member.kernel, gap)
            frame = self._frame(target, nic.address, workload.size, rng)
            while not nic.transmit(frame) and not workload.every:
                yield from sleep(member.kernel, FULL_NS)  # the queue is full

    def _listen(self, workload: Packets, member: Member, *, echo: bool) -> Body[NetFront]:
        nic = yield from self._nic(workload, member)

        def receive(skb: Skb) -> None:
            self._received(skb.data)
            if echo and skb.data[12:14] == ETHERTYPE and skb.data[6:12] == STATION:
                nic.transmit(STATION + nic.address + skb.data[12:])

        if echo or nic not in self._hooked:
            self._hooked.add(nic)
            nic.on_receive = receive
        return nic

    # On the wire.

    def _arrive(self, workload: Packets, member: Member, rng: random.Random, wire: NicDriver) -> Iterator[int]:
        guest = member.guest
        assert guest is not None
        for gap in workload.times(self._run, rng):
            yield max(gap, 1)
            while not guest.has_nic(0):
                yield 1_000_000
            frame = self._frame(guest.nic(0).address, STATION, workload.size, rng)
            wire.wire.send(frame)
