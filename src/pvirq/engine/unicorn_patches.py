"""Three functions of the emulator's with a few instructions of ours in front: they count blocks and PAUSEs, and give
the time that the count stands for.

Unicorn calls a function at the start of each block of translated code, to see whether the run was to end. Counting
there costs next to nothing, and it is exact: the count of a run depends on nothing but the guest's code and data. So a
run can be ended after so many blocks, at the same instruction each time; and where the CPU's time-stamp counter is
that count too, the guest can't tell two runs apart.

The patches are the process's: each instance of Unicorn runs through them, also those that aren't ours. What they work
on lies in each CPU's own state, where machine checks would be reported that never come here; to an instance that
never looks there nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from typing import Final

# In struct CPUX86State: status, address and more of the sixth machine check bank (mce_banks).
COUNT: Final = 6800  # blocks until the run ends, and one more; goes on below zero where no end was set
CLOCK: Final = 6808  # what `COUNT` was set to and all blocks before that; 0: time is the machine's
PAUSES: Final = 6816  # PAUSEs until the run ends
TICK_SHIFT: Final = 3  # ticks of the time-stamp counter per block: 8, so with one a ns it is about as fast as for real

_ENV: Final = 0x8A50  # the CPU's state in its object

_JUMP: Final = b"\xff\x25\x00\x00\x00\x00"  # jmp [rip]; the address follows
# How the functions begin. What is taken away by the patch is done in ours.
_CHECK: Final = bytes.fromhex("4c8b87b8010000 418b80408a0000")  # mov r8, [rdi + 0x1b8]; mov eax, [r8 + 0x8a40]
_PAUSE: Final = bytes.fromhex("55 31d2 4863ee be77000000 53 4889fb")
_TSC_BYTES: Final = 16  # a jump to cpu_get_ticks, and what fills up to the next function

_lock = threading.Lock()
_installed: list[mmap.mmap] = []


def install(check_exit_request: int, pause: int, get_tsc: int, get_ticks: int, cpu_exit: int) -> bool:
    """Patch the functions at these addresses, once in a process. False: they aren't the ones that are known."""
    with _lock:
        if _installed:
            return True
        begins = ctypes.string_at(check_exit_request, len(_CHECK)), ctypes.string_at(pause, len(_PAUSE))
        tsc = ctypes.string_at(get_tsc, _TSC_BYTES)
        if begins != (_CHECK, _PAUSE) or tsc[0] != 0xE9 or tsc[5:] not in _fillings(_TSC_BYTES - 5):
            return False
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        base = ctypes.addressof(ctypes.c_uint8.from_buffer(page))
        patches = [
            (check_exit_request, len(_CHECK), _check_code(check_exit_request + len(_CHECK), cpu_exit)),
            (pause, len(_PAUSE), _pause_code(pause + len(_PAUSE))),
            (get_tsc, _TSC_BYTES, _tsc_code(get_ticks)),
        ]
        at = 0
        with open("/proc/self/mem", "r+b", buffering=0) as mem:  # which writes to pages of code as well
            for function, taken, code in patches:
                page[at : at + len(code)] = code
                jump = (_JUMP + struct.pack("<Q", base + at)).ljust(taken, b"\x90")
                os.pwrite(mem.fileno(), jump, function)
                at += -(-len(code) // 16) * 16
        _installed.append(page)
        return True


def _fillings(size: int) -> list[bytes]:
    """What an assembler puts between two functions."""
    return [bytes.fromhex("662e0f1f840000000000 90").ljust(size, b"\x90"), bytes([0x90]) * size, bytes([0xCC]) * size]


def _check_code(rest: int, cpu_exit: int) -> bytes:
    count = struct.pack("<i", _ENV + COUNT)
    # Last block: the function finds that the run is to end, as if somebody had called cpu_exit.
    expire = (
        b"\x49\xff\x80" + count  # inc qword [r8 + count]: this block isn't run
        + b"\x57\x56\x48\x83\xec\x08"  # push rdi; push rsi; sub rsp, 8
        + b"\x4c\x89\xc7\x48\xb8" + struct.pack("<Q", cpu_exit)  # mov rdi, r8; mov rax, cpu_exit
        + b"\xff\xd0\x48\x83\xc4\x08\x5e\x5f"  # call rax; add rsp, 8; pop rsi; pop rdi
        + _CHECK
    )  # fmt: skip
    counting = b"\x49\x83\xa8" + count + b"\x01\x74\x01\xc3"  # sub qword [r8 + count], 1; jz expire; ret
    # A block that is left again at once, because somebody wants the run to end, isn't counted.
    head = _CHECK + b"\x85\xc0\x78" + bytes([len(counting) + len(expire)])  # test eax, eax; js rest
    return head + counting + expire + _JUMP + struct.pack("<Q", rest)


def _pause_code(rest: int) -> bytes:
    return (
        b"\xff\x8f" + struct.pack("<i", PAUSES) + _PAUSE + _JUMP + struct.pack("<Q", rest)
    )  # dec dword [rdi + pauses]


def _tsc_code(get_ticks: int) -> bytes:
    return (
        b"\x48\x8b\x87" + struct.pack("<i", CLOCK)  # mov rax, [rdi + clock]
        + b"\x48\x85\xc0\x74\x0c"  # test rax, rax; jz real
        + b"\x48\x2b\x87" + struct.pack("<i", COUNT)  # sub rax, [rdi + count]
        + b"\x48\xc1\xe0" + bytes([TICK_SHIFT]) + b"\xc3"  # shl rax, n; ret
        + _JUMP + struct.pack("<Q", get_ticks)  # real:
    )  # fmt: skip
