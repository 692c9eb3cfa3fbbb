"""The kernel of a modelled domain: CPUs, timers, process context, and its turn in the host's run loop.

What a particular kernel does with interrupts (which channels it binds at boot, its chips, its upcall) is its
personality; `Kernel` is what all of them stand on. A modelled vCPU uses the same shared memory and operations
as a real one: it runs when Xen has made an event pending, and blocks when nothing is left to do.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from pvirq.abi.errno import Errno
from pvirq.abi.xen import VCPU_INFO_UPCALL_MASK, VIRQ_TIMER
from pvirq.linux.irq import IrqError
from pvirq.linux.kthread import Body, Kthread, sleep
from pvirq.linux.personality import GenericIrq, Ipi, Personality
from pvirq.xen import evtchn, sched, vtimer
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.probes import DONE, Probes, put
from pvirq.xen.timer import NS_PER_S, Timer

if TYPE_CHECKING:
    from pvirq.linux.evtchn_dev import EvtchnUser

LOG_LINES: Final = 4096


class KernelTimer:
    """A timer of the kernel; `cancel()` is idempotent and safe after it fired."""

    __slots__ = ("callback", "when")

    def __init__(self, when: int, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _Cpu:
    """What the kernel keeps per CPU."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], object]] = deque()
        self.calls: deque[Callable[[], None]] = deque()
        self.irq_work: deque[Callable[[], None]] = deque()
        self.timers: list[tuple[int, int, KernelTimer]] = []


P = TypeVar("P", bound=Personality)
T = TypeVar("T")


class Kernel(Generic[P]):
    """A modelled domain's kernel. `events` is its personality, which drivers bind their channels with.

    `cpu` is the CPU that executes now; 0 while code from outside (a toolstack, a test) calls in. `run` is `do_run`,
    unless something has been put in front of it (`pvirq.xen.probes.put`).
    """

    def __init__(self, domain: Domain, personality: Callable[[Kernel[P]], P]) -> None:
        """`personality` makes the kernel's personality, for example `pvirq.linux.pvops.Pvops`.

        Boot it with `boot`.
        """
        self.run: Callable[[Vcpu], None] = self.do_run
        self.domain = domain
        self.clock = domain.hypervisor.clock
        self.cpu = 0
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._running = False
        self._sequence = 0
        self._cpus = [_Cpu() for _ in domain.vcpus]
        self.events: P = personality(self)
        self.irq: GenericIrq = self.events.irq
        self._mem = domain.machine.mem
        self._turns: list[tuple[deque[Callable[[], object]], Callable[[], object]] | None]
        self._turns = [None] * len(domain.vcpus)  # what `run` needs of each CPU
        domain.label.kind = "modelled"
        domain.label.kernel = f"{type(self.events).__name__} {'.'.join(map(str, self.events.version))}"
        domain.hypervisor.probes.register(domain, self)

    # Time.

    def now(self) -> int:
        """ns of virtual time."""
        return self.clock.now()

    def jiffies(self) -> int:
        return self.clock.now() * self.events.hz // NS_PER_S

    def jiffies_to_ns(self, jiffies: int) -> int:
        """The moment, in ns, at which the tick count reaches `jiffies`."""
        return -(-jiffies * NS_PER_S // self.events.hz)

    def printk(self, message: str) -> None:
        # What other domains wrote may be in it, which needn't be text: whoever prints the log isn't to fail.
        self.log.append(message.encode("utf-8", "backslashreplace").decode())

    # Coming up, going down.

    def boot(self) -> None:
        """Boot; afterwards every vCPU is up and blocks until an event comes, or has work left from its boot."""
        self._running = True
        probes = self.domain.hypervisor.probes
        before, probes.current = probes.current, self.domain.vcpus[0]
        try:
            self.events.boot()
        finally:
            self._running, probes.current = False, before
        for cpu, vcpu in enumerate(self.domain.vcpus):
            if self.online(cpu):
                sched.block(vcpu)
                if self._cpus[cpu].work:
                    vcpu.kick()

    def online(self, cpu: int) -> bool:
        return bool(self.irq.online >> cpu & 1)

    def cpu_up(self, cpu: int) -> None:
        """echo 1 > /sys/devices/system/cpu/cpuN/online. IrqError(EINVAL) where it can't be."""
        if not 0 < cpu < len(self._cpus) or self.online(cpu):
            raise IrqError(Errno.EINVAL, f"CPU {cpu} can't come online")
        self.events.cpu_up(cpu)
        sched.block(self.domain.vcpus[cpu])

    def cpu_down(self, cpu: int) -> None:
        """echo 0 > .../online: its work, timers and dynamic IRQs move to other CPUs.

        CPU 0 stays: IrqError(EBUSY).
        """
        if not 0 <= cpu < len(self._cpus) or not self.online(cpu):
            raise IrqError(Errno.EINVAL, f"CPU {cpu} is not online")
        if cpu == 0:
            raise IrqError(Errno.EBUSY, "CPU 0 stays")
        vcpu, state = self.domain.vcpus[cpu], self._cpus[cpu]
        if not self._running:
            self.run(vcpu)
        self.events.cpu_down(cpu)
        vcpu.up = False
        if vcpu.singleshot_timer is not None:
            vcpu.singleshot_timer.cancel()
            vcpu.singleshot_timer = None
        timers, state.timers = state.timers, []
        for _, _, timer in timers:
            if timer.callback is not None:
                self._add_timer(0, timer)
        while state.work:
            self.queue_work(state.work.popleft(), 0)

    # The host's run loop.

    def do_run(self, vcpu: Vcpu) -> None:
        """This vCPU's turn: upcalls, then process context, until nothing is left; then it blocks."""
        cpu, mem = vcpu.vcpu_id, self._mem
        turn = self._turns[cpu]
        if turn is None:
            turn = self._turns[cpu] = self._cpus[cpu].work, self.events.upcall_entry(cpu)
        work, upcall = turn
        pending = vcpu.info
        mask = pending + VCPU_INFO_UPCALL_MASK
        before = self.cpu, self._running
        self.cpu, self._running = cpu, True
        try:
            while True:
                if mem[pending]:
                    mem[mask] = 1  # as Xen does when it makes the upcall's frame
                    upcall()
                elif work:
                    mem[mask] = 0
                    work.popleft()()
                else:
                    break
        finally:
            mem[mask] = 0
            self.cpu, self._running = before
        # SCHEDOP_block: nothing is pending now.
        vcpu.blocked = True

    # What instruments are told (`pvirq.xen.probes`).

    def probe(self, probes: Probes) -> None:
        """Put in the way of turns, upcalls and interrupts what instruments want, or take it out."""
        self._turns = [None] * len(self._turns)  # made anew when a CPU next runs
        told = probes.tells_turns or probes.on_upcall is not None
        put(self, "run", self._told_run(probes) if told else None)
        self.events.probe(probes)

    def _told_run(self, probes: Probes) -> Callable[[Vcpu], None]:
        """`run`, telling of each turn and upcall: the same loop, since one more call for each would be felt."""
        mem = self._mem
        said: list[tuple[Any, ...] | None] = [None] * len(self._cpus)

        def told_run(vcpu: Vcpu) -> None:
            cpu = vcpu.vcpu_id
            turn = said[cpu]
            if turn is None:
                told = probes.fixed("run", vcpu), probes.fixed("upcall", vcpu), probes.fixed("stop", vcpu, DONE)
                turn = said[cpu] = (*chain(*told), self._cpus[cpu].work, self.events.upcall_entry(cpu))
            tell_run, run, tell_upcall, called, tell_stop, stop, work, upcall = turn
            pending = vcpu.info
            mask = pending + VCPU_INFO_UPCALL_MASK
            before = self.cpu, self._running, probes.current
            self.cpu, self._running, probes.current = cpu, True, vcpu
            tell_run(run)
            try:
                while True:
                    if mem[pending]:
                        mem[mask] = 1
                        tell_upcall(called)
                        upcall()
                    elif work:
                        mem[mask] = 0
                        work.popleft()()
                    else:
                        break
                vcpu.blocked = True
            finally:
                mem[mask] = 0
                self.cpu, self._running, probes.current = before
                tell_stop(stop)

        return told_run

    # Work for this and other CPUs.

    def queue_work(self, work: Callable[[], object], cpu: int | None = None) -> None:
        """Run `work` in process context: on this CPU, or on another, which a reschedule IPI wakes.

        Called from outside, it makes the CPU run without any interrupt: there is none that it could be.
        """
        if cpu is None or not 0 <= cpu < len(self._cpus) or not self.online(cpu):
            cpu = self.cpu
        self._cpus[cpu].work.append(work)
        if not self._running:
            self.domain.vcpus[cpu].kick()
        elif cpu != self.cpu:
            self.reschedule(cpu)

    def reschedule(self, cpu: int) -> None:
        """Make a CPU look at its work (smp_send_reschedule)."""
        self.events.send_ipi(cpu, Ipi.RESCHEDULE)

    def smp_call_function_single(self, cpu: int, function: Callable[[], None]) -> None:
        """Run `function` in an interrupt of that CPU, or here at once if it is this one.

        IrqError(ENXIO): offline.
        """
        if not 0 <= cpu < len(self._cpus) or not self.online(cpu):
            raise IrqError(Errno.ENXIO, f"CPU {cpu} is not online")
        if cpu == self.cpu and self._running:
            function()
            return
        calls = self._cpus[cpu].calls
        calls.append(function)
        if len(calls) == 1:  # an IPI for the earlier ones is on its way already
            self.events.send_ipi(cpu, Ipi.CALL_FUNCTION_SINGLE)

    def smp_call_function(self, function: Callable[[], None]) -> None:
        """Run `function` on every other online CPU, in an interrupt of each (smp_call_function_many)."""
        others = [cpu for cpu in range(len(self._cpus)) if cpu != self.cpu and self.online(cpu)]
        fresh = []
        for cpu in others:
            calls = self._cpus[cpu].calls
            calls.append(function)
            if len(calls) == 1:
                fresh.append(cpu)
        ipi = Ipi.CALL_FUNCTION if len(fresh) > 1 else Ipi.CALL_FUNCTION_SINGLE
        for cpu in fresh:
            self.events.send_ipi(cpu, ipi)

    def run_calls(self) -> None:
        """The function-call interrupts end here: run what other CPUs queued for this one."""
        calls = self._cpus[self.cpu].calls
        while calls:
            calls.popleft()()

    def irq_work_queue(self, function: Callable[[], None]) -> None:
        """Run `function` in an interrupt of its own on this CPU (irq_work_queue)."""
        queue = self._cpus[self.cpu].irq_work
        queue.append(function)
        if len(queue) == 1:
            self.events.send_ipi(self.cpu, Ipi.IRQ_WORK)

    def run_irq_work(self) -> None:
        queue = self._cpus[self.cpu].irq_work
        while queue:
            queue.popleft()()

    # Timers: one VIRQ_TIMER for the earliest, no tick.

    def set_timer(self, when: int, callback: Callable[[], None], cpu: int | None = None) -> KernelTimer:
        """Call `callback` in the timer interrupt of `cpu` (this one if None) at `when` ns of virtual time."""
        timer = KernelTimer(when, callback)
        self._add_timer(self.cpu if cpu is None or not self.online(cpu) else cpu, timer)
        return timer

    def set_timer_jiffies(self, delay: int, callback: Callable[[], None], cpu: int | None = None) -> KernelTimer:
        """The same, `delay` ticks from now."""
        return self.set_timer(self.jiffies_to_ns(self.jiffies() + delay), callback, cpu)

    def _add_timer(self, cpu: int, timer: KernelTimer) -> None:
        self._sequence += 1
        heapq.heappush(self._cpus[cpu].timers, (timer.when, self._sequence, timer))
        self._arm(cpu)

    def _arm(self, cpu: int) -> None:
        """Set the vCPU's singleshot timer to the earliest of the kernel's (VCPUOP_set_singleshot_timer)."""
        timers = self._cpus[cpu].timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        vcpu = self.domain.vcpus[cpu]
        armed: Timer | None = vcpu.singleshot_timer
        if armed is not None:
            if timers and armed.when == timers[0][0]:
                return
            armed.cancel()
            vcpu.singleshot_timer = None
        if timers:
            vtimer.arm_singleshot(vcpu, timers[0][0], lambda: self._timer_due(vcpu))

    def resume_timers(self) -> None:
        """After resume: what was due meanwhile is due now, on each CPU."""
        for cpu in range(len(self._cpus)):
            self._arm(cpu)

    def _timer_due(self, vcpu: Vcpu) -> None:
        vcpu.singleshot_timer = None
        evtchn.send_guest_vcpu_virq(vcpu, VIRQ_TIMER)

    def run_timers(self) -> None:
        """The timer interrupt ends here: run what is due on this CPU and arm the next."""
        timers = self._cpus[self.cpu].timers
        now = self.now()
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self._arm(self.cpu)

    # Processes.

    def spawn(self, name: str, body: Body[T], cpu: int | None = None) -> Kthread[T]:
        """Start a thread (kthread_run) on `cpu`, or on the one that executes now."""
        return Kthread(self, name, body, cpu)

    def compute(self, ns: int) -> Body[None]:
        """A process keeps this CPU busy for `ns` of virtual time: meanwhile its timer ticks, `hz` times a second.

        Interrupts are handled as they come. An idle CPU has no tick, so a CPU's timer count tells how busy it was.
        """
        end = self.now() + ns
        tick = NS_PER_S // self.events.hz
        while (left := end - self.now()) > 0:
            yield from sleep(self, min(tick, left))

    # What userland sees.

    def evtchn_user(self, name: str) -> EvtchnUser:
        """Open /dev/xen/evtchn for a daemon; its IRQs appear as evtchn:`name`."""
        return self.events.evtchn_user(name)

    def proc_interrupts(self) -> str:
        """The text of /proc/interrupts."""
        return self.events.interrupts()
