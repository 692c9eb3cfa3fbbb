"""The way between Python and crossing.c, which does without Python what a guest does most.

crossing.bin is crossing.c compiled (`make crossing`): machine code that stands anywhere. What it works on are two kinds
of struct, which Python sees as 64-bit items: one of the engine's, and for each vCPU one whose first items are its
owner's, by their names in `pvirq.engine.protocol`.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from pvirq.engine.notes import Calls
from pvirq.engine.protocol import SLOT_ITEMS, Slot

if TYPE_CHECKING:
    from pvirq.engine.unicorn_state import CpuState

# struct cpu: what it finds where, ...
(
    SLOT, ENV, OBJECT, MEMORY, MEMORY_BYTES, ON_SYSCALL, ON_INTERRUPT, COMPUTE_FLAGS, UPDATE_CR3, FLUSH, FLUSH_PAGE,
    DESCRIPTORS, FAST, DIRTY, JUMPS, CODE, ERROR_CODE, IS_INT, OLD_EXCEPTION, TSC_OFFSET,
    # ... and what it shares with `UnicornEngine`.
    CR3_ASIDE, CODE_SEEN, CODE_BEFORE, FLUSHES, PAGES,
) = range(25)  # fmt: skip
PAGE: Final = 25  # the last `LAST_PAGES` that were flushed
LAST_PAGES: Final = 32
DONE: Final = PAGE + LAST_PAGES
FAILURES: Final = DONE + 1
CALLS: Final = FAILURES + 1
CPU_ITEMS: Final = CALLS + 1

# struct vcpu, behind its owner's items.
THERE: Final = SLOT_ITEMS
TLB: Final = THERE + 15
TLB_PART: Final = (696 + 16) // 8
STATE: Final = TLB + 2 * TLB_PART
STATE_BYTES: Final = 5608  # general, segment, control, FPU and SSE state; the TLB lies before it, caches behind
VCPU_BYTES: Final = STATE * 8 + STATE_BYTES + 32768
# In a part of a TLB: its size - 64, the pointer to its entries of 64 bytes, and to what belongs to each, of 16.
TLB_MASK_AT, TLB_ENTRIES_AT, TLB_IO_AT = 696, 704, 688

_CODE: Final = resources.files("pvirq.engine").joinpath("crossing.bin").read_bytes()

_libc: Final = ctypes.CDLL(None)
_libc.calloc.restype = ctypes.c_void_p
_libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Crossing:
    """One engine's part of it: `cpu` are the items of its struct, `on_syscall` and `on_interrupt` addresses of hooks.

    Each of those takes `data` as its last argument.
    """

    def __init__(self, state: CpuState, memory: int, memory_bytes: int) -> None:
        self._code = mmap.mmap(-1, len(_CODE), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code[:] = _CODE
        base = ctypes.addressof(ctypes.c_uint8.from_buffer(self._code))
        self.on_syscall, self.on_interrupt, exchange, reload, change_runstate, upcall, *noting = (
            base + at for at in struct.unpack_from("<9I", _CODE)
        )
        self._noting = noting
        self._calls: Calls | None = None
        self._struct = (ctypes.c_uint64 * CPU_ITEMS)()
        self.data = ctypes.addressof(self._struct)
        self.cpu = memoryview(self._struct).cast("B").cast("Q")
        self.cpu[ENV], self.cpu[OBJECT], self.cpu[MEMORY], self.cpu[MEMORY_BYTES] = (
            state.env, state.cpu, memory, memory_bytes,
        )  # fmt: skip
        for item, address in state.addresses().items():
            self.cpu[item] = address
        # Of the struct above, a slot's address, and what else they take.
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        self.exchange: Callable[[int, int, int], None] = ctypes.PYFUNCTYPE(None, *[pointer] * 3)(exchange)
        self.reload: Callable[[int, int], int] = ctypes.PYFUNCTYPE(ctypes.c_int, pointer, pointer)(reload)
        self.change_runstate: Callable[[int, int, int, int, bool], int] = ctypes.PYFUNCTYPE(
            ctypes.c_int, pointer, pointer, u64, u64, ctypes.c_int
        )(change_runstate)
        self.upcall: Callable[[int, int, int, int], int] = ctypes.PYFUNCTYPE(ctypes.c_int, pointer, pointer, u64, u64)(
            upcall
        )
        self._slots: list[tuple[Slot, object]] = []

    def call(self, item: int, callback: Any) -> None:
        """What isn't ordinary goes to `callback`: a ctypes function, for `ON_SYSCALL` or `ON_INTERRUPT`."""
        self.cpu[item] = ctypes.cast(callback, ctypes.c_void_p).value or 0

    def calls(self, fail: Callable[[BaseException], None]) -> Calls:
        """What is noted without Python; see `Calls`."""
        if self._calls is None:
            self._calls = Calls(self.data, *self._noting, fail=fail)
            self.cpu[CALLS] = self._calls.address
        return self._calls

    def slot(self, unused: bytes) -> Slot:
        """A struct vcpu with a TLB of its own, but the first, which has the CPU's; `unused` is a part of a TLB."""
        room = (ctypes.c_uint64 * (VCPU_BYTES // 8))()
        items = memoryview(room).cast("B").cast("Q")
        for at in (TLB, TLB + TLB_PART) if self._slots else ():
            part = bytearray(unused)
            entries = int.from_bytes(part[TLB_MASK_AT:TLB_ENTRIES_AT], "little") // 64 + 1
            struct.pack_into("<Q", part, TLB_IO_AT, _libc.calloc(entries, 16))
            struct.pack_into("<Q", part, TLB_ENTRIES_AT, _libc.calloc(entries, 64))
            items[at : at + TLB_PART] = memoryview(part).cast("Q")
        slot = Slot(items, ctypes.addressof(room))
        self._slots.append((slot, room))
        return slot

    def close(self, current: Slot | None) -> None:
        """Free what slots have but the current one, whose TLB is the CPU's now."""
        for slot, _ in self._slots:
            for at in (TLB, TLB + TLB_PART) if slot is not current else ():
                _libc.free(slot.items[at + TLB_IO_AT // 8])
                _libc.free(slot.items[at + TLB_ENTRIES_AT // 8])
            slot.items.release()
        self._slots.clear()
        self.cpu.release()
