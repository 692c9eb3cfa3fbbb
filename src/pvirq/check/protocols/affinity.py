"""The setting in which late-EOI races are: two CPUs, a change of affinity between them, and a process that EOIs."""

from __future__ import annotations

from dataclasses import dataclass

from pvirq.check.protocols.linux_irq import Code, Irq, evtchn_user, handle_irq_for_port, irq, xen_rebind_evtchn_to_cpu
from pvirq.check.protocols.twolevel import SharedInfo, evtchn_send, shared_info
from pvirq.check.protocols.upcall import cpu_events, cpu_loop, lost_ports, xen_evtchn_do_upcall
from pvirq.check.steps import End, Model, Thread

PORT = 0
ELSEWHERE = 2  # a CPU that the port is never bound to: who changes the affinity, and the process, execute there


@dataclass(frozen=True)
class Setting:
    model: Model
    info: SharedInfo
    irq: Irq


def affinity_change(
    code: Code,
    *,
    pending: bool = True,
    sends: int = 0,
    mask: bool = True,
    send_lock: bool = True,
    user: bool = True,
    warns: bool = True,
) -> Setting:
    """An event channel of /dev/xen/evtchn goes from CPU 0 to CPU 1. An event is pending at the beginning, or none is;
    `sends` more come. Without `user` nobody writes the port back. `mask`: the port is masked as it changes; `warns`: a
    handler that runs again before the EOI is an error."""
    model = Model()
    info = shared_info(model, ports=1, vcpus=2, word_bits=1, pending=int(pending), send_lock=send_lock)
    cpus = (cpu_events(model, info, 0), cpu_events(model, info, 1, ports=0))
    setting = Setting(model, info, irq(model, code, info, cpus, PORT, warns=warns))
    for number in range(2):
        model.thread(f"CPU {number}", _cpu, setting, number, may_wait=True)
    model.thread("affinity", lambda: xen_rebind_evtchn_to_cpu(setting.irq, 1, ELSEWHERE, mask=mask))
    _others(setting, sends, user)
    return setting


def both_scanned(code: Code, *, sends: int = 0, warns: bool = True) -> Setting:
    """The same, where the port has gone to CPU 1 already: both CPUs have scanned, and found the event pending."""
    model = Model()
    info = shared_info(model, ports=1, vcpus=2, word_bits=1, pending=1, bound_to=1, scanned=True)
    cpus = (cpu_events(model, info, 0, ports=0), cpu_events(model, info, 1))
    setting = Setting(model, info, irq(model, code, info, cpus, PORT, cpu=1, warns=warns))

    def cpu_1() -> Thread:
        yield from handle_irq_for_port(setting.irq, 1)
        yield from _cpu(setting, 1)

    model.thread("CPU 0", handle_irq_for_port, setting.irq, 0)
    model.thread("CPU 1", cpu_1, may_wait=True)
    _others(setting, sends, user=True)
    return setting


def _cpu(setting: Setting, number: int) -> Thread:
    info, shared = setting.info, setting.irq

    def handle(port: int) -> Thread:
        yield from handle_irq_for_port(shared, number)

    yield from cpu_loop(info, number, lambda: xen_evtchn_do_upcall(info, number, shared.cpus[number], handle))


def _others(setting: Setting, sends: int, user: bool) -> None:
    def peer() -> Thread:
        for _ in range(sends):
            yield from evtchn_send(setting.info, PORT)

    if user:
        setting.model.thread("user", evtchn_user, setting.irq, ELSEWHERE, may_wait=True)
    if sends:
        setting.model.thread("peer", peer)


def nothing_lost(setting: Setting) -> None:
    """In the end no port is pending and unmasked: its event would never be seen."""
    words = setting.info.pending + setting.info.mask

    def judge(end: End) -> str | None:
        if lost_ports([end[word] for word in words], setting.info):
            return "an event is lost: its port is pending and unmasked, and no CPU will ever look"
        return None

    setting.model.at_end(judge)
