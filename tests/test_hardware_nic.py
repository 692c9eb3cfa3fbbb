"""The network card: frames both ways, its wire's time, causes and their masking, rings that are full."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardwarelib import COUNTS_DISABLED, FORGETS_DISABLED, KERNELS, Rig
from pvirq.hardware.nic import FRAME_GAP, FRAME_MAX, RING, RXDMT0, NicDriver
from pvirq.linux.irq import IRQ_NONE
from pvirq.xen.timer import NS_PER_S

LATENCY = 50_000
FRAME = bytes(range(100))
ON_WIRE = (100 + FRAME_GAP) * 8  # ns at 1 Gbit/s


class NicRig(Rig):
    def __init__(self, kernel: str = "pvops", **parameters: object) -> None:
        super().__init__([{"type": "nic", "name": "peth0", "latency_ns": LATENCY, "itr_ns": 0, **parameters}], kernel)
        self.nic = self.platform.device("peth0", NicDriver)
        self.received: list[bytes] = []
        self.nic.on_receive = self.received.append
        self.sleep(1_000_000)  # the link's interrupt
        self.before = self.named("peth0")

    @property
    def interrupts(self) -> int:
        return self.named("peth0") - self.before


@pytest.fixture(params=[(kernel, gsi) for kernel in KERNELS for gsi in (-1, 17)], ids=str)
def rig(request: pytest.FixtureRequest) -> Iterator[NicRig]:
    kernel, gsi = request.param
    rig = NicRig(kernel, gsi=gsi)
    yield rig
    rig.close()


def forgets(rig: NicRig) -> bool:
    """Is a message that comes while its IRQ is disabled lost?"""
    return rig.kernel_name in FORGETS_DISABLED and rig.irq_of("peth0") != 17


def test_coming_up(rig: NicRig) -> None:
    """One interrupt: the link is there."""
    assert (rig.before, rig.nic.link) == (1, True)
    rig.nic.card.set_link(False)
    rig.run()
    assert (rig.interrupts, rig.nic.link) == (1, False)
    rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert not rig.received


def test_out(rig: NicRig) -> None:
    seen: list[tuple[bytes, int]] = []
    rig.nic.wire.on_frame = lambda frame: seen.append((frame, rig.clock.now()))
    start = rig.clock.now()
    assert rig.nic.transmit(FRAME)
    rig.sleep(NS_PER_S)
    assert seen == [(FRAME, start + ON_WIRE + LATENCY)]
    assert list(rig.nic.wire.frames) == [FRAME]
    assert (rig.interrupts, rig.nic.tx_packets) == (1, 1)


def test_in(rig: NicRig) -> None:
    when: list[int] = []
    rig.nic.on_receive = lambda frame: when.append(rig.clock.now())
    start = rig.clock.now()
    rig.nic.wire.send(FRAME)
    rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert when == [start + ON_WIRE + LATENCY, start + 2 * ON_WIRE + LATENCY]
    assert (rig.interrupts, rig.nic.rx_packets) == (2, 2)


def test_both_ways_at_once(rig: NicRig) -> None:
    """Full duplex: an answer to each."""
    rig.nic.on_receive = lambda frame: rig.received.append(frame) or rig.nic.transmit(frame[::-1])  # type: ignore[func-returns-value]
    frames = [bytes([i]) * 64 for i in range(50)]
    for frame in frames:
        rig.nic.wire.send(frame)
    rig.sleep(NS_PER_S)
    assert rig.received == frames
    assert list(rig.nic.wire.frames) == [frame[::-1] for frame in frames]


def test_frames_while_the_line_is_off_are_one_interrupt(rig: NicRig) -> None:
    irq = rig.irq_of("peth0")
    rig.kernel.irq.disable_irq(irq)
    for _ in range(100):
        rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert not rig.received
    rig.kernel.irq.enable_irq(irq)
    rig.run()
    if forgets(rig):
        assert (len(rig.received), rig.interrupts) == (0, 1)
    else:
        assert (len(rig.received), rig.interrupts) == (100, 1 + (rig.kernel_name in COUNTS_DISABLED))


def test_without_buffers_frames_are_missed(rig: NicRig) -> None:
    rig.kernel.irq.disable_irq(rig.irq_of("peth0"))
    for _ in range(RING + 9):
        rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert rig.nic.card.missed == 10
    rig.kernel.irq.enable_irq(rig.irq_of("peth0"))
    if forgets(rig):
        rig.nic.card.write_ics(RXDMT0)  # as e1000's watchdog does
    rig.run()
    assert len(rig.received) == RING - 1
    rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert len(rig.received) == RING


def test_a_full_transmit_ring(rig: NicRig) -> None:
    room: list[int] = []
    rig.nic.on_room = lambda: room.append(1)
    assert [rig.nic.transmit(FRAME) for _ in range(RING)] == [True] * (RING - 1) + [False]
    assert (rig.nic.full, rig.nic.dropped) == (True, 1)
    rig.sleep(NS_PER_S)
    assert (rig.nic.full, room, len(rig.nic.wire.frames)) == (False, [1], RING - 1)


def test_a_frame_of_no_size(rig: NicRig) -> None:
    for size in (0, 13, FRAME_MAX + 1):
        with pytest.raises(ValueError, match=f"a frame of {size} bytes: expected 14 to 9018"):
            rig.nic.transmit(bytes(size))
        with pytest.raises(ValueError, match=f"a frame of {size} bytes"):
            rig.nic.wire.send(bytes(size))


def test_a_driver_that_goes(rig: NicRig) -> None:
    rig.nic.remove()
    rig.nic.wire.send(FRAME)
    assert not rig.nic.transmit(FRAME)
    rig.sleep(NS_PER_S)
    assert not rig.received
    rig.nic.bind()
    rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert rig.received == [FRAME]


def test_not_ours(rig: NicRig) -> None:
    """An interrupt of another device on the line: the cause register is empty."""
    assert rig.nic._interrupt(0, rig.nic) == IRQ_NONE


@pytest.mark.parametrize("kernel", KERNELS)
def test_throttling(kernel: str) -> None:
    """At most one interrupt in itr_ns, which loses nothing."""
    rig = NicRig(kernel, itr_ns=100_000)
    moments: list[int] = []
    rig.nic.on_receive = lambda frame: moments.append(rig.clock.now())
    for _ in range(500):
        rig.nic.wire.send(FRAME)
    rig.sleep(NS_PER_S)
    assert len(moments) == 500
    distinct = sorted(set(moments))
    assert all(b - a == 100_000 for a, b in pairwise(distinct))
    assert rig.interrupts == len(distinct)
    assert rig.interrupts == -(-(499 * ON_WIRE) // 100_000) + 1
    rig.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_watchdog(kernel: str) -> None:
    """Where it is asked for, an interrupt every so often while the link is up."""
    rig = NicRig(kernel, watchdog_ns=2 * NS_PER_S)
    rig.sleep(20 * NS_PER_S)
    assert rig.interrupts == 10
    rig.nic.card.set_link(False)
    rig.sleep(20 * NS_PER_S)
    assert rig.interrupts == 11
    rig.close()


@settings(max_examples=30, deadline=None)
@given(
    st.booleans(),
    st.integers(0, 200_000),
    st.lists(st.tuples(st.booleans(), st.integers(14, 2000), st.integers(0, 20_000)), max_size=150),
)
def test_any_traffic(line: bool, itr_ns: int, steps: list[tuple[bool, int, int]]) -> None:
    """Every frame arrives, in order, and no more interrupts come than there are frames' ends."""
    rig = NicRig(itr_ns=itr_ns, gsi=17 if line else -1)
    sent: dict[bool, list[bytes]] = {True: [], False: []}
    for i, (out, size, pause) in enumerate(steps):
        frame = i.to_bytes(2, "big") * (size // 2)
        sent[out].append(frame)
        if out:
            assert rig.nic.transmit(frame)
        else:
            rig.nic.wire.send(frame)
        rig.sleep(pause)
    rig.sleep(NS_PER_S)
    assert (list(rig.nic.wire.frames), rig.received) == (sent[True], sent[False])
    assert rig.interrupts <= len(steps)
    assert bool(rig.interrupts) == bool(steps)
    rig.close()
