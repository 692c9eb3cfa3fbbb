"""What a hypercall needs of the vCPU that made it."""

from __future__ import annotations

from typing import Protocol

from pvirq.pv.addresses import addr_ok
from pvirq.xen.domain import Domain, Vcpu


class GuestCrash(Exception):
    """The guest did what Xen answers with domain_crash: there is no way left to enter its kernel."""


class Preempted(Exception):
    """A long hypercall stops here for a while, and is to be made again with these for its first arguments
    (hypercall_create_continuation)."""

    def __init__(self, *arguments: int) -> None:
        self.arguments = arguments
        super().__init__(f"goes on with {arguments}")


class GuestCpu(Protocol):
    """A vCPU in the middle of a hypercall.

    `read` and `write` go through the guest's own page tables; they raise XenError(EFAULT) where the guest
    couldn't access that memory itself, and have done nothing then.
    """

    @property
    def vcpu(self) -> Vcpu: ...

    @property
    def domain(self) -> Domain: ...

    def read(self, va: int, nbytes: int) -> bytes: ...

    def write(self, va: int, data: bytes) -> None: ...


def int32(value: int) -> int:
    """A 64-bit register as the C `int` that a hypercall's prototype makes of it."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def handle_okay(va: int) -> bool:
    """guest_handle_okay: an array of any length may begin there, outside Xen's part of the address space."""
    return addr_ok(va)
