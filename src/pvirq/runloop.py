"""The one loop that runs all domains of a host: whose turn it is, until when, and how time passes while all sleep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from mypy_extensions import mypyc_attr

from pvirq.abi.xen import VIRQ_DOM_EXC
from pvirq.engine.protocol import MANY_PAUSES
from pvirq.guest import HostStuck
from pvirq.linux.kernel import Kernel
from pvirq.net.outside import Outside
from pvirq.pv.guest import PvGuest
from pvirq.schedule import NEXT, ORDER, Schedule
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.timer import NS_PER_S, Timer

# How long a vCPU runs while another of the host could.
SLICE_NS: Final = 5_000_000
# How long it still runs when it, or domain 0 on its behalf, has woken another. Who sends an event mostly holds a lock
# just then that the receiver wants, and the one would be stopped while the other spins for it: Linux spins 32768 times
# before it asks Xen to wait (SPIN_THRESHOLD), which takes 3 ms here. And what else it has to send goes with it.
GRACE_NS: Final = 1_000_000
# Who waits for another vCPU says PAUSE in his loop (cpu_relax). All of them take turns on one thread: after so many the
# others have theirs, since what is waited for can't come before.
PATIENCE: Final = 16
ENDLESS: Final = MANY_PAUSES  # where nobody else is ready
FOREVER: Final = 1 << 62


@mypyc_attr(allow_interpreted_subclasses=True)
class RunLoop:
    """Runs real guests' machines and modelled domains' kernels, on the hypervisor's clock.

    `idle`, where set, is called instead of jumping over time in which every vCPU sleeps: with the ns until the
    next timer (None: no timer), it returns how many ns to let pass. An interactive console waits there for its
    user, in real time. `outside` has what lives in real time anyway, such as a tap device: while one of them is
    awaited, the host waits for it in truth; an `idle` of one's own then has `outside.filenos` to look at as well.
    `on_turn`, where set, is called before each turn of the loop, which is every 50 ms at least while a guest works;
    what it raises ends `run`. `patience` is how many PAUSEs a vCPU has in its turn while another is ready; with
    `ENDLESS` it spins as on a CPU of its own, until Linux has it wait in SCHEDOP_poll.

    Time is what guests have executed. With a `schedule`, which says what comes next where that is free, runs are
    repeatable. It may be exchanged for another between two calls of `run`.
    """

    def __init__(self, hypervisor: Hypervisor, schedule: Schedule | None = None) -> None:
        self.hypervisor = hypervisor
        self.schedule = schedule
        self.clock = hypervisor.clock
        self.idle: Callable[[int | None], int] | None = None
        self.on_turn: Callable[[], None] | None = None
        self.outside = Outside()
        self.on_machine: list[Callable[[PvGuest], None]] = []  # told of each real guest's machine, before it runs
        self.patience = PATIENCE
        self._machines: dict[int, PvGuest] = {}  # of real guests
        self._kernels: dict[int, Kernel[Any]] = {}  # of modelled domains
        self._woken: dict[Vcpu, None] = {}  # vCPUs of those that may have something to do; an ordered set
        self._late: dict[Vcpu, Timer] = {}  # those that the schedule lets wait before they are that
        self._running: PvGuest | None = None
        self._running_vcpu: Vcpu | None = None
        self._on_cpu: PvGuest | None = None  # whose vCPU's turn isn't over, though it may be stopped for a moment
        self._last: Vcpu | None = None
        self._slice_end = 0  # of the vCPU that ran last, in ns
        hypervisor.on_wake = self._wake
        hypervisor.on_shutdown = self._shut_down
        self.clock.on_earlier = self._earlier_deadline

    @property
    def schedule(self) -> Schedule | None:
        """What comes next where that is free; None: what is first in line."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self._schedule = schedule
        if schedule is not None:
            schedule.listeners.append(self._note_choice)

    def _note_choice(self, what: str, number: int, n: int, took: int) -> None:
        self.hypervisor.probes.note("choice", what=what, n=number, of=n, took=took)

    @property
    def seed(self) -> int | None:
        """What the schedule is drawn from; None where there is none, or it isn't."""
        return None if self._schedule is None else self._schedule.seed

    # -- what runs -----------------------------------------------------------------------------------------------------

    def add_machine(self, machine: PvGuest) -> None:
        """A real guest, the first of which brings the clock its counter."""
        if not self._machines:
            self.clock.set_counter(machine.engine.counter, machine.engine.counter_hz())
            self.hypervisor.probes.refresh()  # they may have a clock to look at now that runs
        self._machines[machine.domain.domid] = machine
        self.clock.on_offset(machine.engine.set_tsc_offset)
        for told in self.on_machine:
            told(machine)

    def remove_machine(self, domid: int) -> PvGuest:
        """A real guest runs no more; another one's counter goes on as the clock's. KeyError."""
        machine = self._machines.pop(domid)
        self._last = self._on_cpu = None
        self.clock.remove_offset(machine.engine.set_tsc_offset)
        if not self._machines:
            self.clock.stop()
            self.clock.detach_counter()
        elif self.clock.is_counter(machine.engine.counter):
            self.clock.replace_counter(next(iter(self._machines.values())).engine.counter)
        return machine

    def add_kernel(self, kernel: Kernel[Any]) -> None:
        """A modelled domain's kernel."""
        self._kernels[kernel.domain.domid] = kernel

    def remove_kernel(self, domain: Domain) -> None:
        """A modelled domain runs no more. KeyError."""
        del self._kernels[domain.domid]
        self._woken = {vcpu: None for vcpu in self._woken if vcpu.domain is not domain}
        for vcpu in [vcpu for vcpu in self._late if vcpu.domain is domain]:
            self._late.pop(vcpu).cancel()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _wake(self, vcpu: Vcpu) -> None:
        domid = vcpu.domain.domid
        if domid in self._kernels:
            if self._schedule is not None and self._lets_wait(vcpu):
                return
            self._woken[vcpu] = None
            if self._running is not None:
                self._running.engine.stop()  # a modelled one takes no time, and has its turn at once
        elif (machine := self._machines.get(domid)) is not None:
            machine.woken(vcpu)
            if vcpu is not self._running_vcpu:
                running, end = self._running, self.clock.now() + GRACE_NS
                if running is not None:
                    running.engine.pauses = self.patience
                if end < self._slice_end:
                    self._slice_end = end
                    if running is not None:
                        running.engine.stop_at = self.clock.counter_at(self._turn_end())

    def _lets_wait(self, vcpu: Vcpu) -> bool:
        """Does a modelled vCPU that was woken now have its turn later?"""
        assert self._schedule is not None
        if vcpu in self._woken:
            return False
        if vcpu not in self._late:
            delay = self._schedule.answer_ns(vcpu)
            if not delay:
                return False
            self._late[vcpu] = self.clock.at(self.clock.now() + delay, partial(self._now_ready, vcpu))
        return True

    def _now_ready(self, vcpu: Vcpu) -> None:
        del self._late[vcpu]
        self._woken[vcpu] = None

    def _shut_down(self, domain: Domain) -> None:
        if self._running is not None:
            self._running.engine.stop()
        if 0 in self.hypervisor.domains and 0 in self._kernels:
            evtchn.send_global_virq(self.hypervisor, VIRQ_DOM_EXC)

    def _earlier_deadline(self, when: int) -> None:
        if self._running is not None:
            self._running.engine.stop_at = self.clock.counter_at(self._turn_end())
            if when <= self.clock.now():
                # Due at once: it fires before another instruction of the guest's, as Xen's timer softirq does.
                self._running.engine.stop()

    def run(self, until: Callable[[], bool], timeout_ns: int | None = None) -> bool:
        """Run all domains until `until()` holds: True; or until `timeout_ns` of virtual time have passed: False.

        HostStuck where neither can come about any more.
        """
        clock = self.clock
        limit = None if timeout_ns is None else clock.now() + timeout_ns
        timer = None if limit is None else clock.at(limit, lambda: None)
        clock.start()
        try:
            while True:
                clock.fire_due()
                if self.on_turn is not None:
                    self.on_turn()
                if self.outside:
                    self.outside.poll()
                if until():
                    return True
                if limit is not None and clock.now() >= limit:
                    return False
                if not self._step():
                    self._pass_time()
        finally:
            clock.stop()
            if timer is not None:
                timer.cancel()

    def settle(self, timeout_ns: int = NS_PER_S // 10) -> bool:
        """Run until every domain is idle, so that what is looked at then is at rest. False: it took too long."""
        return self.run(lambda: self.quiet, timeout_ns)

    @property
    def quiet(self) -> bool:
        """No domain has anything to do before the next timer."""
        return (
            not self._woken
            and not self._late
            and not any(vcpu.runnable for machine in self._machines.values() for vcpu in machine.domain.vcpus)
        )

    def _step(self) -> bool:
        """Give the modelled vCPUs that were woken a turn, else the next runnable one of a real guest.

        False where none is runnable.
        """
        if self._woken:
            # Those that these wake in turn come next time: `until` and the clock are looked at in between.
            woken, self._woken = self._woken, {}
            if self._schedule is not None and len(woken) > 1:
                vcpus = list(woken)
                first = self._schedule.choose(ORDER, len(woken), vcpus=vcpus)
                woken = dict.fromkeys(vcpus[first:] + vcpus[:first])
            kernels = self._kernels
            try:
                for vcpu in woken:
                    domain = vcpu.domain
                    if (
                        not vcpu.blocked and vcpu.up and not vcpu.polling
                        and not domain.paused and not vcpu.pause_count
                    ):  # vcpu.runnable  # fmt: skip
                        kernels[domain.domid].run(vcpu)
            except BaseException:  # a handler of the user's raises: the others' turns aren't lost with that
                self._woken = woken | self._woken
                raise
            return True
        ready = [vcpu for machine in self._machines.values() for vcpu in machine.domain.vcpus if vcpu.runnable]
        if not ready:
            if self._on_cpu is not None:
                self._on_cpu.end_turn()
                self._on_cpu = None
            return False
        now = self.clock.now()
        # Who was stopped for domain 0's sake, or let another become ready, goes on until its time is up.
        if now >= self._slice_end or not any(vcpu is self._last for vcpu in ready):
            self._last = self._next(ready)
            self._slice_end = FOREVER
        assert self._last is not None
        if len(ready) == 1:
            self._slice_end = FOREVER
        elif self._slice_end > now + SLICE_NS:
            self._slice_end = now + (SLICE_NS if self._schedule is None else self._schedule.slice_ns(self._last))
        self._run_vcpu(self._last, ENDLESS if len(ready) == 1 else self.patience)
        return True

    def _next(self, ready: list[Vcpu]) -> Vcpu:
        """Whose turn is next: as `ready` is in the order of domains and vCPUs, the one behind who had it last."""
        last = self._last
        at = 0
        if last is not None:
            place = last.domain.domid, last.vcpu_id
            at = next((i for i, vcpu in enumerate(ready) if (vcpu.domain.domid, vcpu.vcpu_id) > place), 0)
        if self._schedule is not None and len(ready) > 1:
            at = (at + self._schedule.choose(NEXT, len(ready), vcpus=ready[at:] + ready[:at])) % len(ready)
        return ready[at]

    def _turn_end(self) -> int:
        """When the turn of the vCPU that runs is over, in ns."""
        deadline = self.clock.next_deadline()
        return self._slice_end if deadline is None else min(self._slice_end, deadline)

    def _run_vcpu(self, vcpu: Vcpu, pauses: int) -> None:
        clock = self.clock
        machine = self._machines[vcpu.domain.domid]
        engine = machine.engine
        engine.pauses = pauses
        if machine is not self._on_cpu:
            if self._on_cpu is not None:
                self._on_cpu.end_turn()
            self._on_cpu = machine
            if not clock.is_counter(engine.counter):
                # Each engine counts what it executes itself; time is all of that.
                engine.set_counter(clock.counter())
                clock.replace_counter(engine.counter)
        until = self._turn_end()
        self._running, self._running_vcpu = machine, vcpu
        try:
            machine.run(vcpu, None if until == FOREVER else clock.counter_at(until))
            if engine.pauses <= 0 or vcpu.yielded:
                vcpu.yielded = False
                self._slice_end = 0
        finally:
            self._running = self._running_vcpu = None

    def _pass_time(self) -> None:
        """Every vCPU sleeps: on to the next timer, or in real time until somebody outside has something for us."""
        clock = self.clock
        deadline = clock.next_deadline()
        wait = self.idle
        if self.outside and self.outside.awaited:
            wait = partial(self._wait_with, wait) if wait is not None else self.outside.wait
        if wait is not None:
            now = clock.now()
            clock.stop()
            passed = wait(None if deadline is None else max(deadline - now, 0))
            clock.start()
            clock.jump_to(now + passed)
        elif deadline is None:
            raise HostStuck("every vCPU waits for an event, and no timer is set")
        else:
            clock.jump_to(deadline)

    def _wait_with(self, idle: Callable[[int | None], int], ns: int | None) -> int:
        return idle(self.outside.limit(ns))
