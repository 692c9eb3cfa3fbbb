"""Late EOI: when the next event of a channel may come (drivers/xen/events/events_base.c, Linux 6.1).

A handler says itself that it is done. After spurious events, or where the event loop has gone on for too long, the
channel stays masked for a while longer, so that a remote domain can't storm this one. Each CPU has a list of
channels that wait, and work that opens them when their time comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from pvirq.linux.events_info import MASK_EOI_PENDING, IrqInfo
from pvirq.linux.kernel import Kernel, KernelTimer

EVENT_EOI_DELAY: Final = 10  # jiffies (xen.event_eoi_delay)


@dataclass
class _Worker:
    """A CPU's delayed EOIs, the earliest first, and the work that will do them."""

    infos: list[IrqInfo] = field(default_factory=list)
    timer: KernelTimer | None = None


class LateEoi:
    """The late EOIs of one kernel; `unmask(port)` is its ABI's.

    `irq_epoch[cpu]` counts the ends of that CPU's event loop; `event_eoi_delay` is in jiffies. `eoi` is `do_eoi`,
    unless something has been put in front of it (`pvirq.xen.probes.put`).
    """

    def __init__(self, kernel: Kernel[Any], nr_cpus: int, hz: int, event_eoi_delay: int) -> None:
        self.eoi: Callable[[IrqInfo, bool], None] = self.do_eoi
        self._kernel = kernel
        self._hz = hz
        self.unmask: Callable[[int], None] = lambda port: None
        self.event_eoi_delay = event_eoi_delay
        self.irq_epoch = [0] * nr_cpus
        self._workers = [_Worker() for _ in range(nr_cpus)]

    def defer(self, info: IrqInfo) -> None:
        """The event loop has gone on for too long: this event's EOI, if it comes from inside, is to wait."""
        info.eoi_cpu = self._kernel.cpu
        info.irq_epoch = self.irq_epoch[info.eoi_cpu]
        info.eoi_time = self._kernel.jiffies() + self.event_eoi_delay

    def do_eoi(self, info: IrqInfo, spurious: bool) -> None:
        """The handler is done (xen_irq_lateeoi_locked).

        More spurious events in a row than the threshold wait: 1 jiffy the first beyond it, then twice as long for
        each, a second at most. As a delayed EOI ends the row, longer delays are rare; Linux has it so.
        """
        if not info.evtchn or info.delayed:
            return
        delay = 0
        if spurious:
            dev = info.dev
            threshold = dev.spurious_threshold if dev is not None and dev.spurious_threshold else 1
            if 1 << info.spurious_cnt < self._hz << 2:
                info.spurious_cnt += 1
            if info.spurious_cnt > threshold:
                delay = min(1 << info.spurious_cnt - 1 - threshold, self._hz)
                if not info.eoi_time:
                    info.eoi_cpu = self._kernel.cpu
                info.eoi_time = self._kernel.jiffies() + delay
                if dev is not None:
                    dev.jiffies_eoi_delayed += delay
            if dev is not None:
                dev.spurious_events += 1
        else:
            info.spurious_cnt = 0
        if info.eoi_time and (info.irq_epoch == self.irq_epoch[info.eoi_cpu] or delay):
            self._add(info)
            return
        info.eoi_time = 0
        info.is_active = False
        info.mask_reason &= ~MASK_EOI_PENDING
        if not info.mask_reason:
            self.unmask(info.evtchn)

    def _add(self, info: IrqInfo) -> None:
        infos = self._workers[info.eoi_cpu].infos
        at = len(infos)
        while at and infos[at - 1].eoi_time > info.eoi_time:
            at -= 1
        infos.insert(at, info)
        info.delayed = True
        if at == 0:
            self._schedule(info.eoi_cpu, max(info.eoi_time - self._kernel.jiffies(), 1))

    def _schedule(self, cpu: int, delay: int) -> None:
        worker = self._workers[cpu]
        if worker.timer is not None:
            worker.timer.cancel()
        # The timer's interrupt wakes the worker, which runs in process context.
        callback = partial(self._kernel.queue_work, partial(self._work, cpu))
        worker.timer = self._kernel.set_timer_jiffies(delay, callback, cpu)

    def _work(self, cpu: int) -> None:
        """xen_irq_lateeoi_worker."""
        infos = self._workers[cpu].infos
        now = self._kernel.jiffies()
        while infos:
            info = infos[0]
            if now < info.eoi_time:
                self._schedule(cpu, info.eoi_time - now)
                return
            del infos[0]
            info.delayed = False
            info.eoi_time = 0
            self.eoi(info, False)

    def forget(self, info: IrqInfo) -> None:
        """The IRQ goes away (lateeoi_list_del)."""
        if info.delayed:
            self._workers[info.eoi_cpu].infos.remove(info)
            info.delayed = False

    def cpu_dead(self, cpu: int) -> None:
        """A CPU has gone: the one that executes takes its list over, as its work queue's timers move too."""
        stuck, self._workers[cpu].infos = self._workers[cpu].infos, []
        for info in stuck:
            info.delayed = False
            info.eoi_cpu = self._kernel.cpu
            self._add(info)
