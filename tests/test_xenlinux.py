"""Whatever XenLinux kernels go through, their maps stay each other's inverse and no event is lost silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvirq.linux.xenlinux import XenLinux
from pvirq.linux.xenlinux_2_6_18 import XenLinux2618
from pvirq.linux.xenlinux_suse import XenLinuxSuse
from xenlinuxlib import Setup, resumed


class Anything(RuleBasedStateMachine):
    """Bindings come and go, lines move, CPUs too, events come: the maps stay inverse, and no event is lost silently."""

    personality: Callable[[Any], XenLinux] = XenLinux2618

    @initialize(vcpus=st.integers(1, 3))
    def boot(self, vcpus: int) -> None:
        self.it = Setup(self.personality, vcpus=vcpus)
        self.expected: set[int] = set()
        self.disabled: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "it"):
            self.it.close()

    @property
    def ports(self) -> list[int]:
        return sorted(self.expected)

    @rule()
    def bind(self) -> None:
        if len(self.expected) < 40:
            port = self.it.device()
            self.expected.add(port)
            self.settle()

    def settle(self, *sent: int) -> None:
        """Each send to a port that is neither masked nor pending is one interrupt."""
        before = {port: self.count(port) for port in self.expected}
        waits = {port for port in self.expected if self.it.events.test_evtchn(port)}
        self.it.run()
        for port in self.expected:
            came = self.count(port) - before[port]
            if port in self.disabled:
                assert came == 0
            else:
                assert came == (port in waits or port in sent), port
                assert not self.it.events.test_evtchn(port)

    def count(self, port: int) -> int:
        return sum(self.it.counts(self.it.events.irq_from_evtchn(port)))

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), twice=st.booleans())
    def send(self, data: st.DataObject, twice: bool) -> None:
        ports = data.draw(st.lists(st.sampled_from(self.ports), min_size=1, max_size=5))
        for port in ports:
            self.it.send(*[port] * (1 + twice))  # the second finds it pending, and is one with the first
        assert all(self.it.events.test_evtchn(port) for port in ports)
        self.settle()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def unbind(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(self.ports))
        irq = self.it.events.irq_from_evtchn(port)
        self.it.events.unbind(irq, self.it.irqs.descs[irq].actions[0].dev_id)
        self.expected.remove(port)
        self.disabled.discard(port)
        assert self.it.counts(irq) == [0] * len(self.it.domain.vcpus)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), mask=st.integers(1, 7))
    def move(self, data: st.DataObject, mask: int) -> None:
        port = data.draw(st.sampled_from(self.ports))
        irq = self.it.events.irq_from_evtchn(port)
        if mask & self.it.irqs.online:
            self.it.irqs.set_affinity(irq, mask)
            self.it.send(port)
            self.settle()
            if port not in self.disabled:
                assert mask >> self.it.events.cpu_from_evtchn(port) & 1

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def toggle(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(self.ports))
        irq = self.it.events.irq_from_evtchn(port)
        if port in self.disabled:
            self.disabled.remove(port)
            self.it.irqs.enable_irq(irq)
        else:
            self.disabled.add(port)
            self.it.irqs.disable_irq(irq)
        self.settle()

    @rule(cpu=st.integers(1, 2), pending=st.booleans())
    def hotplug(self, cpu: int, pending: bool) -> None:
        if cpu >= len(self.it.domain.vcpus):
            return
        if not self.it.kernel.online(cpu):
            self.it.kernel.cpu_up(cpu)
        else:
            waiting = [port for port in self.ports if self.it.events.cpu_from_evtchn(port) == cpu] if pending else []
            self.it.send(*waiting)
            before = {port: self.count(port) for port in self.expected}
            self.it.kernel.cpu_down(cpu)
            self.it.run()
            for port in waiting:
                assert self.count(port) - before[port] == (port not in self.disabled)
        self.it.run()

    @rule()
    def resume(self) -> None:
        info = resumed(self.it)
        bound = {port: self.it.events.irq_from_evtchn(port) for port in self.expected}
        self.it.events.resume(info)
        for irq in bound.values():
            assert self.it.events.evtchn_from_irq(irq) == 0
            self.it.events.unbind(irq, self.it.irqs.descs[irq].actions[0].dev_id)
        self.expected.clear()
        self.disabled.clear()
        self.it.run()

    @invariant()
    def the_maps_are_inverse(self) -> None:
        if not hasattr(self, "it"):
            return
        events = self.it.events
        percpu: dict[int, list[int]] = getattr(events, "percpu_evtchn", {})
        by_info = {events.evtchn_from_irq(irq): irq for irq in range(events.nr_irqs) if irq not in percpu}
        by_info.pop(0, None)
        by_info |= {port: irq for irq, ports in percpu.items() for port in ports if port}
        assert by_info == events.evtchn_to_irq
        for port in events.evtchn_to_irq:
            channel = self.it.domain.evtchn.port(port)
            assert channel.usable
            assert channel.notify_vcpu == events.cpu_from_evtchn(port)
            bit = 1 << port % 64
            cpus = [cpu for cpu, mask in enumerate(events.cpu_evtchn_mask) if mask[port // 64] & bit]
            assert cpus == [channel.notify_vcpu]
        for irq in range(events.dynirq_base, events.nr_irqs):
            # (The type of an IRQ that lost its port at resume stays when it is unbound.)
            assert not events.irq_bindcount[irq] or events.irq_info[irq]
            assert events.irq_bindcount[irq] or irq in percpu or not events.evtchn_from_irq(irq)
        for desc in self.it.irqs.descs.values():
            slot = desc.chip_data
            assert (slot[0] if isinstance(slot, tuple) else 0) == (
                0 if desc.irq in percpu else events.evtchn_from_irq(desc.irq)
            )


class AnythingOnSuse(Anything):
    personality = XenLinuxSuse


Anything.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
AnythingOnSuse.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestAnything = Anything.TestCase
TestAnythingOnSuse = AnythingOnSuse.TestCase
