"""PS/2 keyboard and mouse: what they answer, and what they say of themselves.

Keyboard bytes are scan code set 1, as the controller's translation makes them of set 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ACK: Final = 0xFA
RESEND: Final = 0xFE
SELF_TEST_PASSED: Final = 0xAA
CMD_RESET: Final = 0xFF
CMD_DEFAULTS: Final = 0xF6
CMD_DISABLE: Final = 0xF5  # and defaults
CMD_ENABLE: Final = 0xF4
CMD_GETID: Final = 0xF2
CMD_SETRATE: Final = 0xF3  # a keyboard's typematic rate, a mouse's sample rate
CMD_SETLEDS: Final = 0xED

WITH_PARAMETER: Final = {CMD_SETRATE, CMD_SETLEDS}
KEYBOARD_ID: Final = b"\xab\x83"
BREAK: Final = 0x80  # or'ed to the make code when the key goes up
FIFO: Final = 16  # bytes that a device keeps while the controller has no room for them

_ROWS: Final = {0x02: "1234567890-=", 0x10: "qwertyuiop[]", 0x1E: "asdfghjkl;'`", 0x2B: "\\zxcvbnm,./"}
_SHIFTED: Final = dict(zip('!@#$%^&*()_+{}:"~|<>?', "1234567890-=[];'`\\,./", strict=True))
KEYS: Final[dict[str, int]] = {
    **{key: first + i for first, keys in _ROWS.items() for i, key in enumerate(keys)},
    "esc": 0x01, "backspace": 0x0E, "\t": 0x0F, "\n": 0x1C, "ctrl": 0x1D, "shift": 0x2A, "alt": 0x38, " ": 0x39,
    **{f"f{n}": 0x3A + n for n in range(1, 11)},
}  # fmt: skip
"""Make codes by key: the character without shift, or a name."""
KEY_NAMES: Final = {code: key for key, code in KEYS.items()}


def keys_of(text: str) -> list[tuple[str, bool]]:
    """The keystrokes that write `text`: keys, and whether with shift. ValueError for a character without a key."""
    strokes = []
    for character in text:
        key = _SHIFTED.get(character, character.lower())
        if key not in KEYS:
            raise ValueError(f"no key writes {character!r}")
        strokes.append((key, key != character))
    return strokes


class Ps2Device(ABC):
    """A device at one port of the controller. `send` is called when it has a byte for the controller to fetch."""

    def __init__(self) -> None:
        self.out: list[int] = []
        self.enabled = False
        self.overruns = 0
        self.send: Callable[[], None] = lambda: None
        self._command: int | None = None

    def receive(self, byte: int) -> None:
        """A byte from the host: a command, or the parameter of one."""
        if self._command is not None:
            self._command = None
            self.out.append(ACK)
        else:
            self.out.append(ACK)
            if byte in WITH_PARAMETER:
                self._command = byte
            elif byte == CMD_GETID:
                self.out += self._id()
            elif byte == CMD_RESET:
                self.enabled = False
                self.out += self._reset()
            elif byte in (CMD_ENABLE, CMD_DISABLE):
                self.enabled = byte == CMD_ENABLE
        self.send()

    def say(self, data: bytes) -> None:
        """Something happened to the device. Lost where it is disabled; what its FIFO can't take is an overrun."""
        if not self.enabled:
            return
        if len(self.out) + len(data) > FIFO:
            self.overruns += 1
            return
        self.out += data
        self.send()

    @abstractmethod
    def _id(self) -> bytes: ...

    @abstractmethod
    def _reset(self) -> bytes:
        """What it says once it has tested itself."""


class Keyboard(Ps2Device):
    def _id(self) -> bytes:
        return KEYBOARD_ID

    def _reset(self) -> bytes:
        return bytes((SELF_TEST_PASSED,))

    def make(self, key: str) -> None:
        """A key goes down. KeyError for one that there isn't."""
        self.say(bytes((KEYS[key],)))

    def release(self, key: str) -> None:
        """A key goes up."""
        self.say(bytes((KEYS[key] | BREAK,)))


class Mouse(Ps2Device):
    """A mouse of the three-byte protocol."""

    def _id(self) -> bytes:
        return b"\0"

    def _reset(self) -> bytes:
        return bytes((SELF_TEST_PASSED,)) + self._id()

    def move(self, dx: int, dy: int, buttons: int = 0) -> None:
        """`dy` is positive upwards; buttons: 1 left, 2 right, 4 middle. ValueError beyond -256 to 255."""
        if not (-256 <= dx <= 255 and -256 <= dy <= 255 and 0 <= buttons <= 7):
            raise ValueError(f"mouse: {dx}, {dy}, {buttons} is no single movement")
        self.say(bytes((0x08 | buttons | (dx < 0) << 4 | (dy < 0) << 5, dx & 0xFF, dy & 0xFF)))


@dataclass(frozen=True)
class KeyEvent:
    """What the keyboard's driver made of its bytes."""

    when: int
    key: str
    pressed: bool


@dataclass(frozen=True)
class MouseEvent:
    """What the mouse's driver made of its bytes."""

    when: int
    dx: int
    dy: int
    buttons: int
