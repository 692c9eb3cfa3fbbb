"""The keyboard controller, i8042, and its driver with those of the devices behind it (atkbd, psmouse).

The controller has one output buffer for both ports: while a byte waits in it the line of the port that it came from
is high, and no other byte is fetched. So each byte is one interrupt, and one that the driver doesn't read blocks both
ports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import ClassVar, Final

from pvirq.hardware import ps2
from pvirq.hardware.device import MS, US, Board, Declaration, Deferred, Driver
from pvirq.hardware.ps2 import Keyboard, KeyEvent, Mouse, MouseEvent, Ps2Device
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn
from pvirq.linux.kthread import Body, Completion, Kthread

# Status register.
STR_OBF: Final = 0x01
STR_AUXDATA: Final = 0x20
STR_TIMEOUT: Final = 0x40
# Control register.
CTR_KBDINT: Final = 0x01
CTR_AUXINT: Final = 0x02
CTR_KBDDIS: Final = 0x10
CTR_AUXDIS: Final = 0x20

KBD: Final = 0
AUX: Final = 1
# Eleven bits on the serial line at 12 kHz, the middle of what PS/2 allows.
BYTE_NS: Final = 917 * US
# After this time a controller gives a silent device up.
SILENT_NS: Final = 20 * MS
EVENTS: Final = 4096

# What the driver waits for (libps2).
ACK_TIMEOUT_NS: Final = 200 * MS
REPLY_TIMEOUT_NS: Final = 500 * MS


class I8042:
    """The controller; `devices` are what is plugged in at its two ports."""

    def __init__(self, board: Board, kbd_gsi: int, aux_gsi: int, devices: tuple[Ps2Device | None, Ps2Device | None]):
        self.devices = devices
        self._pins = board.pin(kbd_gsi, "kbd_gsi"), board.pin(aux_gsi, "aux_gsi")
        self._ctr = CTR_KBDDIS | CTR_AUXDIS
        self._data = 0
        self._status = 0
        self._fetching: int | None = None
        self._fetch = Deferred(board, self._fetched)
        self._silent = [Deferred(board, partial(self._gave_up, port)) for port in (KBD, AUX)]
        self._own: deque[tuple[int, int]] = deque()  # bytes of the controller's own: port, byte
        for device in devices:
            if device is not None:
                device.send = self._look

    # Registers.

    def read_status(self) -> int:
        return self._status

    def read_data(self) -> int:
        """Take the byte out: the line falls, the next one can be fetched."""
        if self._status & STR_OBF:
            self._status = 0
            for pin in self._pins:
                pin.lower()
            self._look()
        return self._data

    def write_ctr(self, ctr: int) -> None:
        """Command 0x60: the control register."""
        self._ctr = ctr
        if self._status & STR_OBF:
            self._output_full()
        self._look()

    def aux_loop(self, byte: int) -> None:
        """Command 0xD3: `byte` appears in the output buffer as if the mouse had sent it."""
        self._own.append((AUX, byte))
        self._look()

    def write(self, port: int, byte: int) -> None:
        """A byte to the keyboard, or (command 0xD4) to the mouse."""
        device = self.devices[port]
        if device is None:
            self._silent[port].after(SILENT_NS)
        else:
            device.receive(byte)

    # Inside.

    def _look(self) -> None:
        """Fetch the next byte, the keyboard's first, if there is room."""
        if self._status & STR_OBF or self._fetch.pending:
            return
        if self._own:
            self._output(*self._own.popleft())
            return
        for port, disabled in ((KBD, CTR_KBDDIS), (AUX, CTR_AUXDIS)):
            device = self.devices[port]
            if device is not None and device.out and not self._ctr & disabled:
                self._fetching = port
                self._fetch.after(BYTE_NS)
                return

    def _fetched(self) -> None:
        assert self._fetching is not None
        port, self._fetching = self._fetching, None
        device = self.devices[port]
        assert device is not None
        self._output(port, device.out.pop(0))

    def _gave_up(self, port: int) -> None:
        if self._status & STR_OBF:
            self._silent[port].after(BYTE_NS)
        else:
            self._output(port, ps2.RESEND, STR_TIMEOUT)

    def _output(self, port: int, byte: int, status: int = 0) -> None:
        self._data = byte
        self._status = STR_OBF | status | (STR_AUXDATA if port == AUX else 0)
        self._output_full()

    def _output_full(self) -> None:
        port = AUX if self._status & STR_AUXDATA else KBD
        if self._ctr & (CTR_AUXINT if port == AUX else CTR_KBDINT):
            self._pins[port].raise_()


class _Port:
    """One port as the driver sees it (struct serio with struct ps2dev): replies that a command waits for."""

    def __init__(self, driver: I8042Driver, number: int) -> None:
        self.number = number
        self.on_byte: Callable[[int], None] = lambda byte: None
        self._driver = driver
        self._in_command = False
        self._replies: deque[int | None] = deque()  # None: the controller gave up waiting
        self._came: Completion[None] = Completion()

    def interrupt(self, byte: int, status: int) -> None:
        """A byte came (serio_interrupt)."""
        if self._in_command:
            self._replies.append(None if status & STR_TIMEOUT else byte)
            self._came.complete(None)
        else:
            self.on_byte(byte)

    def _reply(self, timeout_ns: int) -> Body[int | None]:
        """The next byte; None where the controller gave up, or none came in time."""
        if not self._replies:
            kernel = self._driver.kernel
            self._came = Completion()
            timer = kernel.set_timer(kernel.now() + timeout_ns, partial(self._came.complete, None))
            yield from self._came.wait()
            timer.cancel()
        return self._replies.popleft() if self._replies else None

    def command(self, command: int, *parameters: int, replies: int = 0) -> Body[bytes | None]:
        """ps2_command: the reply, or None where the device doesn't answer as it should.

        A device that answers GETID with something else than a keyboard's first byte has no second one.
        """
        self._in_command = True
        self._replies.clear()
        try:
            for byte in (command, *parameters):
                self._driver.controller.write(self.number, byte)
                if (yield from self._reply(ACK_TIMEOUT_NS)) != ps2.ACK:
                    return None
            reply = bytearray()
            while len(reply) < replies:
                got = yield from self._reply(REPLY_TIMEOUT_NS)
                if got is None:
                    return None
                reply.append(got)
                if command == ps2.CMD_GETID and reply[0] not in (0xAB, 0xAC):
                    break
            return bytes(reply)
        finally:
            self._in_command = False


class I8042Driver(Driver):
    """The controller's driver, atkbd and, where it is loaded, psmouse.

    `events` are the last that came of keyboard and mouse; `on_event` is told of each. `ready` is done when all ports
    have been probed.
    """

    module = "i8042"
    uses = {"key": "press and release a letter's key", "move": "move the mouse a little"}

    def __init__(self, board: Board, name: str, controller: I8042, gsis: tuple[int, int], psmouse: bool) -> None:
        super().__init__(board, name)
        self.controller = controller
        self._board = board
        self._gsis = gsis
        self._psmouse = psmouse
        self._ports = _Port(self, KBD), _Port(self, AUX)
        self._testing = False
        self._packet = bytearray()
        self.events: deque[KeyEvent | MouseEvent] = deque(maxlen=EVENTS)
        self.on_event: Callable[[KeyEvent | MouseEvent], None] = lambda event: None
        self.ready: Completion[None] = Completion()
        self._probing: Kthread[None] | None = None

    def probe(self) -> None:
        """i8042_probe: the mouse's line first, tried with a looped byte, then the keyboard's; then what is on them.

        The real one requests the line for the test, waits, frees it and requests it again; here it keeps it.
        """
        while self.controller.read_status() & STR_OBF:
            self.controller.read_data()
        gsi = self._gsis[AUX]
        irq = self.kernel.events.register_gsi(gsi, level=False, active_low=False)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, "i8042")
        self._testing = True
        self.controller.write_ctr(CTR_AUXINT | CTR_KBDDIS)
        self.controller.aux_loop(0xA5)
        irq = self.kernel.events.register_gsi(self._gsis[KBD], level=False, active_low=False)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, "i8042")
        self.controller.write_ctr(CTR_AUXINT | CTR_KBDINT)
        self._probing = Kthread(self.kernel, "kseriod", self._probe_ports())

    def remove(self) -> None:
        if self._probing is not None:
            self._probing.stop()
            self._probing = None
        super().remove()
        self.controller.write_ctr(CTR_KBDDIS | CTR_AUXDIS)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """i8042_interrupt: one byte at most."""
        status = self.controller.read_status()
        if not status & STR_OBF:
            return IRQ_NONE
        byte = self.controller.read_data()
        if self._testing and status & STR_AUXDATA:
            self._testing = False
            return IRQ_HANDLED
        self._ports[AUX if status & STR_AUXDATA else KBD].interrupt(byte, status)
        return IRQ_HANDLED

    def _probe_ports(self) -> Body[None]:
        """Each driver tries each port: atkbd both, psmouse the mouse's (the keyboard's is of another type)."""
        kbd, aux = self._ports
        if (yield from self._atkbd(kbd)):
            kbd.on_byte = self._key_byte
        if (yield from self._atkbd(aux)):
            aux.on_byte = self._key_byte
        elif self._psmouse:
            yield from self._probe_psmouse()
        self.ready.complete(None)

    def load_psmouse(self) -> None:
        """The module is loaded: it probes the mouse's port."""
        self._probing = Kthread(self.kernel, "kseriod", self._probe_psmouse())

    def _probe_psmouse(self) -> Body[None]:
        port = self._ports[AUX]
        if (yield from self._ps2mouse(port)):
            port.on_byte = self._mouse_byte

    @staticmethod
    def _atkbd(port: _Port) -> Body[bool]:
        """atkbd_connect: ask who is there, set it up."""
        found = yield from port.command(ps2.CMD_GETID, replies=2)
        if found is None:
            # Some keyboards know no ID, but all have LEDs.
            if (yield from port.command(ps2.CMD_SETLEDS, 0)) is None:
                return False
        elif len(found) < 2:
            return False
        else:
            yield from port.command(ps2.CMD_DISABLE)
        yield from port.command(ps2.CMD_SETLEDS, 0)
        yield from port.command(ps2.CMD_SETRATE, 0)
        yield from port.command(ps2.CMD_ENABLE)
        return True

    @staticmethod
    def _ps2mouse(port: _Port) -> Body[bool]:
        """psmouse_connect, with psmouse.proto=bare: it looks for no mouse of more than three bytes."""
        found = yield from port.command(ps2.CMD_GETID, replies=1)
        if not found or found[0] not in (0, 3, 4, 0xFF):
            return False
        yield from port.command(ps2.CMD_DEFAULTS)
        yield from port.command(ps2.CMD_DEFAULTS)  # psmouse_extensions begins anew
        yield from port.command(ps2.CMD_RESET, replies=2)
        yield from port.command(ps2.CMD_ENABLE)
        return True

    def _key_byte(self, byte: int) -> None:
        key = ps2.KEY_NAMES.get(byte & ~ps2.BREAK)
        if key is not None:
            self._event(KeyEvent(self.kernel.now(), key, not byte & ps2.BREAK))

    def _mouse_byte(self, byte: int) -> None:
        packet = self._packet
        packet.append(byte)
        if len(packet) == 3:
            flags, dx, dy = packet
            packet.clear()
            event = MouseEvent(self.kernel.now(), dx - (flags << 4 & 0x100), dy - (flags << 3 & 0x100), flags & 7)
            self._event(event)

    def _event(self, event: KeyEvent | MouseEvent) -> None:
        self.events.append(event)
        self.on_event(event)

    # The user at the other side.

    def _use(self, action: str, rng: Random) -> None:
        if action == "key":
            self.type(rng.choice("abcdefghijklmnopqrstuvwxyz"))
        elif self.mouse is None:
            raise ValueError(f"{self.name} has no mouse")
        else:
            self.mouse.move(rng.randint(-20, 20), rng.randint(-20, 20))

    @property
    def keyboard(self) -> Keyboard | None:
        device = self.controller.devices[KBD]
        return device if isinstance(device, Keyboard) else None

    @property
    def mouse(self) -> Mouse | None:
        device = self.controller.devices[AUX]
        return device if isinstance(device, Mouse) else None

    def type(self, text: str, interval_ns: int = 150 * MS) -> int:
        """Somebody types: a keystroke each `interval_ns`, down for half of it. Returns when it is over, in ns from now.

        ValueError for what can't be typed, or without a keyboard.
        """
        keyboard = self.keyboard
        if keyboard is None:
            raise ValueError(f"{self.name} has no keyboard")
        strokes = ps2.keys_of(text)
        clock, now = self._board.clock, self._board.clock.now()
        for i, (key, shift) in enumerate(strokes):
            down, up = now + i * interval_ns, now + i * interval_ns + interval_ns // 2
            if shift:
                clock.at(down, partial(keyboard.make, "shift"))
            clock.at(down, partial(keyboard.make, key))
            clock.at(up, partial(keyboard.release, key))
            if shift:
                clock.at(up, partial(keyboard.release, "shift"))
        return len(strokes) * interval_ns


@dataclass(frozen=True)
class I8042Declaration(Declaration):
    """A keyboard controller with a keyboard and perhaps a PS/2 mouse, whose driver (psmouse) may not be loaded."""

    kbd_gsi: int = 1
    aux_gsi: int = 12
    keyboard: bool = True
    mouse: bool = True
    psmouse: bool = True
    behind: ClassVar[tuple[str, ...]] = ("hvc_console",)
    driver: ClassVar[type[Driver]] = I8042Driver

    def make(self, board: Board) -> I8042Driver:
        devices = Keyboard() if self.keyboard else None, Mouse() if self.mouse else None
        controller = I8042(board, self.kbd_gsi, self.aux_gsi, devices)
        return I8042Driver(board, self.name, controller, (self.kbd_gsi, self.aux_gsi), self.psmouse)
