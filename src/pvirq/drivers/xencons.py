"""A modelled guest's console driver (hvc_xen.c of Linux 6.1, xencons_ring.c before): bytes through a shared page."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from pvirq.abi.errno import XenError
from pvirq.drivers.console import IN_CONS, IN_SIZE, OUT, OUT_PROD, OUT_SIZE
from pvirq.linux.kernel import Kernel
from pvirq.xen import evtchn

U32: Final = 0xFFFFFFFF
INPUT_MAX: Final = 4096  # what a terminal keeps while nobody reads


class XenCons:
    """hvc0: `write` puts bytes on the ring, `on_input` is called with what was typed, in process context."""

    def __init__(self, kernel: Kernel[Any], page: memoryview, port: int) -> None:
        """`page` is the ring in place, `port` this kernel's end of its channel."""
        self._kernel = kernel
        self._page = page
        self._words = page[IN_CONS : OUT_PROD + 4].cast("I")  # in_cons, in_prod, out_cons, out_prod
        self._port = port
        self._out: deque[bytes] = deque()
        self.input = bytearray()
        """What was typed and nobody has taken; bytes beyond the last INPUT_MAX are lost."""
        self.on_input: Callable[[bytes], None] | None = None
        kernel.events.on_console = self.service

    def _notify(self) -> None:
        with contextlib.suppress(XenError):
            evtchn.send(self._kernel.domain, self._port)

    def write(self, data: bytes) -> None:
        """Output; what the ring can't hold goes out when the other end has made room."""
        if data:
            self._out.append(bytes(data))
            self._flush()

    def service(self) -> None:
        """What the console's interrupt wakes: take input, go on with output that waits (hvc_poll)."""
        words, page = self._words, self._page
        cons, prod = words[0], words[1]
        size = prod - cons & U32
        if size > IN_SIZE:  # nonsense
            size = 0
        if size:
            at = cons % IN_SIZE
            data = bytes(page[at : min(at + size, IN_SIZE)])
            data += bytes(page[: size - len(data)])
            words[0] = prod
            self._notify()
            self._received(data)
        self._flush()

    def _received(self, data: bytes) -> None:
        if self.on_input is not None:
            self.on_input(data)
            return
        self.input += data
        del self.input[:-INPUT_MAX]

    def _flush(self) -> None:
        words, page, sent = self._words, self._page, False
        while self._out:
            cons, prod = words[2], words[3]
            used = prod - cons & U32
            if used >= OUT_SIZE:
                break
            data = self._out[0]
            at = prod % OUT_SIZE
            count = min(len(data), OUT_SIZE - used, OUT_SIZE - at)
            page[OUT + at : OUT + at + count] = data[:count]
            words[3] = prod + count & U32
            sent = True
            if count == len(data):
                self._out.popleft()
            else:
                self._out[0] = data[count:]
        if sent:
            self._notify()
