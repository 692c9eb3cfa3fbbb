"""xenconsoled: the daemon of domain 0 behind every guest's console ring (tools/console/daemon/io.c)."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain

# struct xencons_interface: in[1024], out[2048], then four free-running u32 indexes.
IN_SIZE: Final = 1024
OUT: Final = 1024
OUT_SIZE: Final = 2048
IN_CONS, IN_PROD, OUT_CONS, OUT_PROD = 3072, 3076, 3080, 3084
U32: Final = 0xFFFFFFFF

# How much of a guest's output is kept when nobody takes it.
BACKLOG: Final = 1 << 20
ECHO_MAX: Final = 4096


def note_input(domain: Domain, data: bytes) -> None:
    """Tell instruments that somebody types at a domain's console."""
    probes = domain.hypervisor.probes
    if probes.on_noted is not None:
        probes.note("input", to=domain.domid, data=base64.b64encode(data).decode())


class Console:
    """One guest's console: what it wrote, and what it is still to read.

    `output` keeps the last BACKLOG bytes; `total` counts all there were. Listeners get each piece as it comes.
    """

    def __init__(self) -> None:
        """Without a ring, as for a domain 0, until `attach`."""
        self._page = memoryview(bytearray(4096))
        self._notify: Callable[[], None] = lambda: None
        self.on_input: Callable[[bytes], None] | None = None  # told of what is sent
        self._input = bytearray()
        # What came one way and has not been seen coming the other (see `_merge`).
        self._ring_only = bytearray()
        self._direct_only = bytearray()
        self._listeners: list[Callable[[bytes], None]] = []
        self.output = bytearray()
        self.total = 0

    def attach(self, page: memoryview, notify: Callable[[], None]) -> None:
        """Serve the ring in `page`, a frame in place; `notify` raises the guest's event channel."""
        self._page, self._notify = page, notify

    def _index(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._page, at)[0])

    def service(self) -> None:
        """React to the guest's event: take its output, give it pending input. A hostile index loses data, no more."""
        consumed, produced = self._index(OUT_CONS), self._index(OUT_PROD)
        size = produced - consumed & U32
        moved = False
        if size > OUT_SIZE:
            # The guest's index is nonsense: as xenconsoled, take nothing that isn't there.
            size = 0
        if size:
            start = consumed % OUT_SIZE
            first = bytes(self._page[OUT + start : OUT + min(start + size, OUT_SIZE)])
            rest = bytes(self._page[OUT : OUT + size - len(first)])
            struct.pack_into("<I", self._page, OUT_CONS, produced)
            self._emit(self._merge(first + rest, self._ring_only, self._direct_only))
            moved = True
        if self._fill() or moved:
            self._notify()

    def put_direct(self, data: bytes) -> None:
        """Output of the guest's that came by HYPERVISOR_console_io."""
        self._emit(self._merge(data, self._direct_only, self._ring_only))

    @staticmethod
    def _merge(data: bytes, mine: bytearray, other: bytearray) -> bytes:
        """What of `data` is new: early in their lives, guests say the same both ways, not knowing which is heard."""
        plain = data.replace(b"\r", b"")
        if other:
            if other.startswith(plain):
                del other[: len(plain)]
                return b""
            if plain.startswith(bytes(other)):
                plain = data = plain[len(other) :]
            other.clear()
        mine += plain
        if len(mine) > ECHO_MAX:
            mine.clear()
        return data

    def _emit(self, data: bytes) -> None:
        if not data:
            return
        self.total += len(data)
        self.output += data
        if len(self.output) > BACKLOG:
            del self.output[: len(self.output) - BACKLOG]
        for listener in list(self._listeners):
            listener(data)

    def _fill(self) -> bool:
        consumed, produced = self._index(IN_CONS), self._index(IN_PROD)
        room = IN_SIZE - (produced - consumed & U32)
        if room <= 0 or not self._input:
            return False
        data = self._input[:room]
        del self._input[: len(data)]
        for i, byte in enumerate(data):
            self._page[(produced + i) % IN_SIZE] = byte
        struct.pack_into("<I", self._page, IN_PROD, produced + len(data) & U32)
        return True

    def send(self, data: bytes) -> None:
        """Type `data` at the guest; what the ring can't hold waits."""
        if self.on_input is not None:
            self.on_input(data)
        self._input += data
        if self._fill():
            self._notify()

    def on_output(self, listener: Callable[[bytes], None]) -> Callable[[], None]:
        """Call `listener` with each piece of output; the result takes it away again."""
        self._listeners.append(listener)

        def remove() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return remove

    def text(self) -> str:
        """What is kept of the output, decoded for people."""
        return self.output.decode("utf-8", "replace").replace("\r\n", "\n")

    def close(self) -> None:
        """Let go of the guest's memory."""
        self.attach(memoryview(bytearray(4096)), lambda: None)
        self._listeners.clear()
