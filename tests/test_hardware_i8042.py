"""Keyboard and mouse: a byte an interrupt, one output buffer for both, and the drivers' probes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardwarelib import FORGETS_DISABLED, KERNELS, Rig
from pvirq.hardware import ps2
from pvirq.hardware.i8042 import BYTE_NS, I8042Driver
from pvirq.hardware.ps2 import Keyboard, KeyEvent, Mouse, MouseEvent
from pvirq.xen.timer import NS_PER_S


@pytest.fixture(params=KERNELS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig([{"type": "i8042"}], request.param)
    rig.sleep(NS_PER_S)
    yield rig
    rig.close()


def driver(rig: Rig) -> I8042Driver:
    return rig.platform.device("i8042", I8042Driver)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("parameters", "keyboard", "mouse"),
    [
        # A keyboard answers GETID, DISABLE, SETLEDS, SETREP and ENABLE with 3 + 1 + 2 + 2 + 1 bytes; the mouse's
        # line has the test's byte and what is said to those that look for a keyboard (2), then for a mouse: GETID,
        # DEFAULTS twice, RESET, ENABLE.
        ({"psmouse": False}, 9, 3),
        ({}, 9, 3 + 2 + 1 + 1 + 3 + 1),
        # Nobody there: the controller gives up, once for each command.
        ({"mouse": False}, 9, 4),
        ({"mouse": False, "psmouse": False}, 9, 3),
        ({"keyboard": False, "psmouse": False}, 2, 3),
    ],
)
def test_what_probing_costs(kernel: str, parameters: dict[str, object], keyboard: int, mouse: int) -> None:
    rig = Rig([{"type": "i8042", **parameters}], kernel)
    assert not driver(rig).ready.done
    rig.sleep(NS_PER_S)
    assert driver(rig).ready.done
    assert (rig.count(1), rig.count(12)) == (keyboard, mouse)
    rig.close()


def test_a_keystroke_is_two_bytes(rig: Rig) -> None:
    i8042 = driver(rig)
    before = rig.count(1)
    start = rig.clock.now()
    i8042.type("a", interval_ns=100_000_000)
    rig.sleep(NS_PER_S)
    assert rig.count(1) == before + 2
    assert list(i8042.events) == [
        KeyEvent(start + BYTE_NS, "a", True),
        KeyEvent(start + 50_000_000 + BYTE_NS, "a", False),
    ]


def test_typing(rig: Rig) -> None:
    i8042 = driver(rig)
    before = rig.count(1)
    rig.sleep(i8042.type("Hi\n") + BYTE_NS * 2)
    pressed = [event.key for event in i8042.events if isinstance(event, KeyEvent) and event.pressed]
    assert pressed == ["shift", "h", "i", "\n"]
    assert rig.count(1) == before + 2 * 4
    with pytest.raises(ValueError, match="no key writes 'é'"):
        i8042.type("é")


def test_a_movement_is_three_bytes(rig: Rig) -> None:
    i8042 = driver(rig)
    before = rig.count(12)
    assert i8042.mouse is not None
    seen: list[object] = []
    i8042.on_event = seen.append
    i8042.mouse.move(-3, 200, buttons=1)
    rig.sleep(NS_PER_S)
    assert rig.count(12) == before + 3
    (event,) = i8042.events
    assert isinstance(event, MouseEvent)
    assert (event.dx, event.dy, event.buttons) == (-3, 200, 1)
    assert seen == [event]


def test_both_share_one_buffer(rig: Rig) -> None:
    """While the kernel doesn't take a byte of the mouse's, the keyboard's can't come. Nothing is lost, but where the
    kernel forgets the edge: then both are blocked for good."""
    i8042 = driver(rig)
    keyboard, mouse = i8042.keyboard, i8042.mouse
    assert keyboard is not None
    assert mouse is not None
    rig.kernel.irq.disable_irq(12)
    mouse.move(1, 1)
    rig.sleep(NS_PER_S)
    keyboard.make("x")
    before = rig.count(1)
    rig.sleep(NS_PER_S)
    assert rig.count(1) == before
    rig.kernel.irq.enable_irq(12)
    rig.sleep(NS_PER_S)
    if rig.kernel_name in FORGETS_DISABLED:
        assert (list(i8042.events), rig.count(1)) == ([], before)
        return
    assert [type(event) for event in i8042.events] == [KeyEvent, MouseEvent]
    assert rig.count(1) == before + 1


def test_a_disabled_device_says_nothing() -> None:
    mouse = Mouse()
    mouse.move(1, 1)
    assert not mouse.out
    mouse.receive(ps2.CMD_ENABLE)
    mouse.move(1, 1)
    assert mouse.out == [ps2.ACK, 0x08, 1, 1]


def test_a_full_fifo_overruns() -> None:
    keyboard = Keyboard()
    keyboard.enabled = True
    for _ in range(20):
        keyboard.make("a")
    assert (len(keyboard.out), keyboard.overruns) == (ps2.FIFO, 4)


@given(st.integers(-256, 255), st.integers(-256, 255), st.integers(0, 7))
def test_every_movement_can_be_said(dx: int, dy: int, buttons: int) -> None:
    mouse = Mouse()
    mouse.enabled = True
    mouse.move(dx, dy, buttons)
    flags, x, y = mouse.out
    assert (x - (flags << 4 & 0x100), y - (flags << 3 & 0x100), flags & 7) == (dx, dy, buttons)


def test_a_movement_that_cant_be_said() -> None:
    with pytest.raises(ValueError, match="no single movement"):
        Mouse().move(256, 0)


def test_make_codes() -> None:
    """Some of set 1, as every PC keyboard has them."""
    assert {key: ps2.KEYS[key] for key in ("esc", "1", "q", "\n", "a", "`", "\\", "z", " ", "f1", "f10")} == {
        "esc": 0x01, "1": 0x02, "q": 0x10, "\n": 0x1C, "a": 0x1E, "`": 0x29, "\\": 0x2B, "z": 0x2C, " ": 0x39,
        "f1": 0x3B, "f10": 0x44,
    }  # fmt: skip
    assert len(ps2.KEY_NAMES) == len(ps2.KEYS)
