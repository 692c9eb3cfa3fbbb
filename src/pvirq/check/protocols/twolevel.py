"""The two-level ABI between Xen and a guest: what Xen does to shared_info, and what a guest does there by itself.

Follows xen/common/event_2l.c and event_channel.c, and the functions of drivers/xen/events/events_2l.c that touch one
port. Upcall loops are in `upcall`, SCHEDOP_block is in `blocking`; nobody polls here (`polling`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pvirq.check.steps import Lock, Model, Thread, Var
from pvirq.linux.events_2l import BITS


@dataclass(frozen=True)
class VcpuInfo:
    """A vCPU: its vcpu_info, and whether it sleeps."""

    upcall_pending: Var
    upcall_mask: Var
    pending_sel: Var
    blocked: Var  # _VPF_blocked of pause_flags


@dataclass(frozen=True)
class SharedInfo:
    """A domain with event channels of the two-level ABI. `word_bits` may be few, so that few ports have many words."""

    word_bits: int
    pending: tuple[Var, ...]
    mask: tuple[Var, ...]
    vcpus: tuple[VcpuInfo, ...]
    notify_vcpu: tuple[Var, ...]  # of each port
    send_lock: Lock | None  # held by whoever sends, and by EVTCHNOP_bind_vcpu: no Xen has it so

    @property
    def ports(self) -> int:
        return len(self.notify_vcpu)

    def at(self, port: int) -> tuple[int, int]:
        """The word of a port, and its bit there."""
        return divmod(port, self.word_bits)


def shared_info(
    model: Model,
    *,
    ports: int,
    vcpus: int = 1,
    word_bits: int = BITS,
    masked: int = 0,
    pending: int = 0,
    bound_to: int = 0,
    scanned: bool = False,
    upcall_mask: int = 0,
    send_lock: bool = True,
) -> SharedInfo:
    """The variables of a domain whose ports are all bound to one vCPU. `masked` and `pending` have a bit for each port.
    One that is pending and isn't masked is selected and notified, unless it was `scanned` already.

    Without `send_lock` a port may be bound to another vCPU while an event is on its way to the old one (the race
    "send-during-bind", which other models leave out)."""
    words = (ports + word_bits - 1) // word_bits
    ones = (1 << word_bits) - 1

    def word(bits: int, number: int) -> int:
        return bits >> number * word_bits & ones

    selected = 0 if scanned else sum(1 << each for each in range(words) if word(pending & ~masked, each))

    def vcpu(number: int) -> VcpuInfo:
        first = selected if number == bound_to else 0
        return VcpuInfo(
            model.var(f"evtchn_upcall_pending[{number}]", int(bool(first))),
            model.var(f"evtchn_upcall_mask[{number}]", upcall_mask),
            model.var(f"evtchn_pending_sel[{number}]", first),
            model.var(f"blocked[{number}]"),
        )

    return SharedInfo(
        word_bits,
        tuple(model.var(f"evtchn_pending[{each}]", word(pending, each)) for each in range(words)),
        tuple(model.var(f"evtchn_mask[{each}]", word(masked, each)) for each in range(words)),
        tuple(vcpu(number) for number in range(vcpus)),
        tuple(model.var(f"notify_vcpu[{port}]", bound_to) for port in range(ports)),
        model.lock("send") if send_lock else None,
    )


# -- Xen --------------------------------------------------------------------------------------------------------------


def evtchn_send(info: SharedInfo, port: int) -> Thread:
    """EVTCHNOP_send of a peer whose channel ends in `port`: whom it notifies, and that (evtchn_port_set_pending)."""
    if info.send_lock is not None:
        yield info.send_lock.read_acquire()
    vcpu = yield info.notify_vcpu[port].read().saying(f"sends an event to port {port}: which vCPU is it for?")
    yield from evtchn_2l_set_pending(info, vcpu, port)
    if info.send_lock is not None:
        yield info.send_lock.read_release()


def evtchn_2l_set_pending(info: SharedInfo, vcpu: int, port: int) -> Thread:
    word, bit = info.at(port)
    if (yield info.pending[word].set_bit(bit).saying(f"sets the pending bit of port {port}")):
        return
    if not (yield info.mask[word].read().saying(f"looks whether port {port} is masked")) >> bit & 1:
        yield from _select(info, vcpu, word)


def _select(info: SharedInfo, vcpu: int, word: int) -> Thread:
    if not (yield info.vcpus[vcpu].pending_sel.set_bit(word).saying(f"selects word {word} at vCPU {vcpu}")):
        yield from vcpu_mark_events_pending(info, vcpu)


def vcpu_mark_events_pending(info: SharedInfo, vcpu: int) -> Thread:
    """Tell a PV vCPU of its events, and wake it (vcpu_kick)."""
    if not (yield info.vcpus[vcpu].upcall_pending.set_bit(0).saying(f"sets evtchn_upcall_pending of vCPU {vcpu}")):
        yield from vcpu_unblock(info, vcpu)


def vcpu_unblock(info: SharedInfo, vcpu: int) -> Thread:
    """End a vCPU's sleep."""
    yield info.vcpus[vcpu].blocked.xchg(0).saying(f"unblocks vCPU {vcpu}, if it is blocked")


def evtchn_unmask(info: SharedInfo, port: int) -> Thread:
    """EVTCHNOP_unmask (evtchn_2l_unmask of Xen): where the port is pending, it is notified again."""
    word, bit = info.at(port)
    vcpu = yield info.notify_vcpu[port].read()
    if not (yield info.mask[word].clear_bit(bit).saying(f"Xen unmasks port {port}")):
        return
    if (yield info.pending[word].read().saying(f"is port {port} pending?")) >> bit & 1:
        yield from _select(info, vcpu, word)


def evtchn_bind_vcpu(info: SharedInfo, port: int, vcpu: int) -> Thread:
    """EVTCHNOP_bind_vcpu. (Those who call it exclude each other, as Xen does with its event_lock.)"""
    if info.send_lock is not None:
        yield info.send_lock.acquire()
    yield info.notify_vcpu[port].write(vcpu).saying(f"has Xen notify vCPU {vcpu} of port {port}")
    if info.send_lock is not None:
        yield info.send_lock.release()


# -- the guest --------------------------------------------------------------------------------------------------------


def mask_evtchn(info: SharedInfo, port: int) -> Thread:
    """Returns whether it was masked (test_and_set_mask)."""
    word, bit = info.at(port)
    return (yield info.mask[word].set_bit(bit).saying(f"masks port {port}"))


def clear_evtchn(info: SharedInfo, port: int) -> Thread:
    word, bit = info.at(port)
    yield info.pending[word].clear_bit(bit).saying(f"clears the pending bit of port {port}")


def unmask_evtchn(info: SharedInfo, port: int, cpu: int, cpu_from_evtchn: int, *, look_first: bool = False) -> Thread:
    """evtchn_2l_unmask of a PV guest, on `cpu`: in place, or by Xen if the port is another CPU's. Linux 3.7 and 3.8
    looked whether the port is pending before they unmasked it (`look_first`)."""
    if cpu != cpu_from_evtchn:
        yield from evtchn_unmask(info, port)
        return
    word, bit = info.at(port)
    vcpu = info.vcpus[cpu]
    is_pending = info.pending[word].read().saying(f"is port {port} pending?")
    unmask = info.mask[word].clear_bit(bit).saying(f"unmasks port {port}")
    if look_first:
        pending = yield is_pending
        yield unmask
    else:
        yield unmask
        pending = yield is_pending
    if pending >> bit & 1 and not (yield vcpu.pending_sel.set_bit(word).saying(f"selects word {word} here")):
        yield vcpu.upcall_pending.write(1).saying("has an upcall come")
