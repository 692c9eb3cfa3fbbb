"""What instruments are told of a real guest: its turns, hypercalls, upcalls and interrupts (`pvirq.xen.probes`)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from pvirq.abi import event_channel, grant_table, memory, physdev, sched, vcpu, xen
from pvirq.abi.errno import XenError
from pvirq.pv.hypercalls import HYPERCALLS
from pvirq.pv.hypercalls.protocol import int32
from pvirq.pv.irq_watch import NOTHING, IrqWatch, Noting
from pvirq.pv.vcpu import no_upcall
from pvirq.xen.probes import (
    BLOCKED,
    DOWN,
    PAUSED,
    POLLING,
    SLICE,
    YIELDED,
    Call,
    NoteForm,
    Once,
    Probes,
    Record,
    keep,
    nothing,
    put,
)

if TYPE_CHECKING:
    from pvirq.pv.guest import PvGuest
    from pvirq.pv.hypercalls import Hypercall
    from pvirq.pv.vcpu import PvVcpu
    from pvirq.xen.domain import Vcpu


def _named(module: object, prefix: str) -> dict[int, str]:
    numbers = {name.removeprefix(prefix): value for name, value in vars(module).items() if name.startswith(prefix)}
    return {value: name for name, value in numbers.items() if isinstance(value, int)}


_HYPERCALLS: Final = _named(xen, "HYPERVISOR_")
_OPERATIONS: Final = {
    "event_channel_op": _named(event_channel, "EVTCHNOP_"),
    "sched_op": _named(sched, "SCHEDOP_"),
    "vcpu_op": _named(vcpu, "VCPUOP_"),
    "grant_table_op": _named(grant_table, "GNTTABOP_"),
    "memory_op": _named(memory, "XENMEM_"),
    "physdev_op": _named(physdev, "PHYSDEVOP_"),
}
# What the structs of event channel operations have for arguments: those that are read, not those that are written.
_EVTCHN_ARGUMENTS: Final = {
    event_channel.EVTCHNOP_alloc_unbound: (event_channel.EVTCHN_ALLOC_UNBOUND, 2),
    event_channel.EVTCHNOP_bind_interdomain: (event_channel.EVTCHN_BIND_INTERDOMAIN, 2),
    event_channel.EVTCHNOP_bind_virq: (event_channel.EVTCHN_BIND_VIRQ, 2),
    event_channel.EVTCHNOP_bind_pirq: (event_channel.EVTCHN_BIND_PIRQ, 2),
    event_channel.EVTCHNOP_bind_ipi: (event_channel.EVTCHN_BIND_IPI, 1),
    event_channel.EVTCHNOP_close: (event_channel.EVTCHN_PORT, 1),
    event_channel.EVTCHNOP_send: (event_channel.EVTCHN_PORT, 1),
    event_channel.EVTCHNOP_unmask: (event_channel.EVTCHN_PORT, 1),
    event_channel.EVTCHNOP_status: (event_channel.EVTCHN_STATUS, 2),
    event_channel.EVTCHNOP_bind_vcpu: (event_channel.EVTCHN_BIND_VCPU, 2),
    event_channel.EVTCHNOP_reset: (event_channel.EVTCHN_RESET, 1),
    event_channel.EVTCHNOP_init_control: (event_channel.EVTCHN_INIT_CONTROL, 3),
    event_channel.EVTCHNOP_expand_array: (event_channel.EVTCHN_EXPAND_ARRAY, 1),
    event_channel.EVTCHNOP_set_priority: (event_channel.EVTCHN_SET_PRIORITY, 2),
}
_Operation = tuple[struct.Struct | None, int, Call, Call | None]
"""Of an event channel operation what to read, and how much of that to tell; how to tell it, and how to tell where it
can't be read."""

# Why a real guest's turn may be over.
_REASONS: Final = (PAUSED, DOWN, BLOCKED, POLLING, YIELDED, SLICE)
# What an engine may note by itself.
_NOTED: Final = ("irq_entry", "irq_exit", "eoi", "hypercall", "hypercall_done", "upcall")
_EVTCHN_SIZES: Final = {command: layout.size for command, (layout, _) in _EVTCHN_ARGUMENTS.items()}


class ProbedGuest:
    """Puts in the way of one real guest what is wanted (`pvirq.xen.probes.Probed`)."""

    def __init__(self, guest: PvGuest) -> None:
        self._guest = guest
        self._irqs: IrqWatch | None = None
        self._watching = False
        self._told_hypercalls = False
        self._noting = False

    def probe(self, probes: Probes) -> None:
        guest = self._guest
        put(guest, "run", self._told_run(probes) if probes.tells_turns else None)
        noting = self._begin_notes(probes)
        self._probe_hypercalls(probes, noting)
        self._probe_upcalls(probes, noting)
        self._probe_irqs(probes, noting)

    def _begin_notes(self, probes: Probes) -> Noting | None:
        """Where there is one who wants notes, the engine makes them instead of calling."""
        guest, one = self._guest, probes.noting(*_NOTED)
        calls = guest.engine.calls if one is not None or self._noting else None
        if calls is None:
            return None
        self._noting = one is not None
        if one is None:
            calls.end()
            return None
        calls.begin(one.book, guest.domain.evtchn.generation_at, [cpu.slot for cpu in guest.cpus])

        def number(record: Record) -> int | None:
            found = one.number(record) if getattr(probes, f"on_{record[0]}") is not None else -1
            return None if found is None else found + 1

        return Noting(one, calls, number)

    def _told_run(self, probes: Probes) -> Callable[[Vcpu, int | None], None]:
        guest, engine = self._guest, self._guest.engine
        run = guest.do_run
        said: dict[Vcpu, tuple[Once, dict[str, Once]]] = {}

        def ends(vcpu: Vcpu) -> tuple[Once, dict[str, Once]]:
            said[vcpu] = probes.fixed("run", vcpu), {why: probes.fixed("stop", vcpu, why) for why in _REASONS}
            return said[vcpu]

        def in_front(vcpu: Vcpu, until_ticks: int | None) -> None:
            try:
                begin, end = said[vcpu]
            except KeyError:
                begin, end = ends(vcpu)
            before, probes.current = probes.current, vcpu
            tell, what = begin
            tell(what)
            try:
                run(vcpu, until_ticks)
            finally:
                probes.current = before
                if vcpu.domain.paused:
                    why = PAUSED
                elif not vcpu.up:
                    why = DOWN
                elif vcpu.blocked:
                    why = BLOCKED
                elif vcpu.polling:
                    why = POLLING
                else:
                    why = YIELDED if vcpu.yielded or engine.pauses <= 0 else SLICE
                tell, what = end[why]
                tell(what)

        return in_front

    # -- hypercalls ----------------------------------------------------------------------------------------------------

    def _probe_hypercalls(self, probes: Probes, noting: Noting | None) -> None:
        plain = self._guest.hypercalls
        told = probes.on_hypercall is not None or probes.on_hypercall_done is not None
        for cpu in self._guest.cpus:
            if told:
                cpu.hypercalls = plain
                table = [
                    (_told_hypercall(number, handler, arguments, cpu, probes), arguments)
                    for number, (handler, arguments) in enumerate(plain)
                ]
                if noting is None:
                    cpu.hypercalls = table
                else:
                    number = 1 + noting.instrument.number_of_hypercalls(cpu.vcpu, _read_note)
                    noting.calls.note_hypercalls(cpu.slot, number, len(plain), _EVTCHN_SIZES)
                    cpu.note_hypercalls(table)
            elif self._told_hypercalls:
                cpu.hypercalls = plain
        self._told_hypercalls = told

    # -- upcalls -------------------------------------------------------------------------------------------------------

    def _probe_upcalls(self, probes: Probes, noting: Noting | None) -> None:
        for cpu in self._guest.cpus:
            in_front, cpu.upcall_unnoted = None, no_upcall
            if probes.on_upcall is not None:
                number = None if noting is None else noting.number(("upcall", cpu.vcpu))
                if number is None or noting is None:
                    in_front = _told_upcall(cpu, probes)
                else:
                    noting.calls.note_upcalls(cpu.slot, number)
                    tell, what = probes.fixed("upcall", cpu.vcpu)
                    cpu.upcall_unnoted = partial(tell, what)
            put(cpu, "deliver_events", in_front)

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def _probe_irqs(self, probes: Probes, noting: Noting | None) -> None:
        entry, leave, eoi = probes.on_irq_entry, probes.on_irq_exit, probes.on_eoi
        label = self._guest.domain.label
        if entry is None and leave is None and eoi is None:
            if self._watching:
                assert self._irqs is not None
                self._irqs.end()
                self._watching = False
            return
        if self._irqs is None:
            image = self._guest.kernel_image()
            if image is None:
                label.irqs = NOTHING
                return
            self._irqs = IrqWatch(self._guest, image)
        label.irqs = self._irqs.level
        self._irqs.begin(entry or nothing, leave or nothing, eoi, noting)
        self._watching = True


def _told_upcall(cpu: PvVcpu, probes: Probes) -> Callable[[int], int]:
    deliver = cpu.do_deliver_events
    vcpu, mem = cpu.vcpu, cpu.domain.machine.mem
    tell, what = probes.fixed("upcall", vcpu)

    def in_front(rip: int) -> int:
        info = vcpu.info
        if mem[info] and not mem[info + 1]:
            tell(what)
        return deliver(rip)

    return in_front


def _read_note(number: int, first: int, has_struct: bool) -> NoteForm:
    """What such a hypercall is told of, where the engine has noted it (`ReadNote`)."""
    name, count = _HYPERCALLS.get(number, f"hypercall {number}"), HYPERCALLS[number][1]
    if name not in _OPERATIONS:
        return NoteForm(name, 0, count)
    command = first & 0xFFFFFFFF
    call = f"{name}.{_OPERATIONS[name].get(command) or int32(command)}"
    if name != "event_channel_op":
        return NoteForm(call, 0, count, by_operation=True)
    if not has_struct:
        return NoteForm(call, 1, 1, by_operation=True)
    layout, count = _EVTCHN_ARGUMENTS[command]
    return NoteForm(call, 2, count, layout, by_operation=True)


def _told_hypercall(number: int, handler: Hypercall, arguments: int, cpu: PvVcpu, probes: Probes) -> Hypercall:
    """What stands in front of a hypercall of one vCPU's."""
    name = _HYPERCALLS.get(number, f"hypercall {number}")
    if name in _OPERATIONS:
        return _told_operation(name, handler, arguments, cpu.vcpu, probes)
    begin, end, if_zero = probes.fixed_call(cpu.vcpu, name, arguments)

    def in_front(cpu: PvVcpu, *arguments: int) -> int:
        begin(arguments)
        try:
            result = handler(cpu, *arguments)
        except XenError as error:
            end(-error.errno)
            raise
        except BaseException:  # it stops in the middle, to go on later, or the guest has crashed
            end(None)
            raise
        if result or if_zero:
            end(result)
        return result

    return in_front


def _told_operation(name: str, handler: Hypercall, count: int, vcpu: Vcpu, probes: Probes) -> Hypercall:
    """The same for one whose first argument says what it is to do."""
    forms = _EVTCHN_ARGUMENTS if name == "event_channel_op" else {}
    said: dict[int, _Operation] = {}

    def operation(first: int) -> _Operation:
        command = first & 0xFFFFFFFF
        call = f"{name}.{_OPERATIONS[name].get(command) or int32(command)}"
        if name != "event_channel_op":
            return None, 0, probes.fixed_call(vcpu, call, count), None
        layout, values = forms.get(command, (None, 1))
        address = probes.fixed_call(vcpu, call, 1)
        told = address if values == 1 else probes.fixed_call(vcpu, call, values)
        return layout, values, told, address

    def in_front(cpu: PvVcpu, *arguments: int) -> int:
        try:
            layout, count, told, address = said[arguments[0]]
        except KeyError:
            layout, count, told, address = keep(said, arguments[0], partial(operation, arguments[0]))
        values: Sequence[int] = arguments
        if address is not None:  # what the struct says of an event channel operation; where it can't be read, where
            values = arguments[1:2]
            try:
                if layout is not None:
                    values = layout.unpack(cpu.read(arguments[1], layout.size))[:count]
            except XenError:
                told = address
        told.begin(values)
        try:
            result = handler(cpu, *arguments)
        except XenError as error:
            told.end(-error.errno)
            raise
        except BaseException:
            told.end(None)
            raise
        if result or told.if_zero:
            told.end(result)
        return result

    return in_front
