"""A domain 0 on a machine of one's choice, whatever kernel it runs: for the tests of `pvirq.hardware`."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from pvirq.hardware.platform import DeviceTable, Platform, build
from pvirq.linux import personalities
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine

MODULES = {"pvops": "pvops", "pvops-2l": "pvops", "2.6.18": "xenlinux_2_6_18", "suse": "xenlinux_suse"}
KERNELS = [name for name, module in MODULES.items() if find_spec(f"pvirq.linux.{module}")]

# Kernels that count an interrupt which finds its IRQ disabled: __do_IRQ and handle_level_irq count first.
COUNTS_DISABLED = {"2.6.18", "suse"}
# ... and where it is lost, unless its device holds a level line: SUSE's kernel handles every line as level.
FORGETS_DISABLED = {"suse"}


class Rig:
    """A hypervisor, domain 0's kernel on a machine, and time that passes when a test says so."""

    def __init__(self, machine: str | DeviceTable, kernel: str = "pvops", *, vcpus: int = 2, **options: Any) -> None:
        self.memory = Machine(1 << 28)
        self.kernel_name = kernel
        self.hypervisor = Hypervisor(self.memory)
        factory = personalities.find(kernel, **options)
        domain = self.hypervisor.create_domain(0, privileged=True, vcpus=vcpus)
        self.kernel: Kernel[Any] = Kernel(domain, lambda kernel: factory(kernel, start_info=StartInfo(initial=True)))
        self.clock = self.kernel.clock
        self.platform: Platform = build(machine, self.kernel)
        self.kernel.boot()
        self.run()

    def close(self) -> None:
        self.memory.close()

    def run(self, limit: int = 1_000_000) -> None:
        """Give every vCPU with an event its turn until all sleep, or so many turns."""
        for _ in range(limit):
            ready = [v for v in self.kernel.domain.vcpus if v.runnable]
            if not ready:
                return
            for vcpu in ready:
                self.kernel.run(vcpu)

    def sleep_until(self, when: int) -> None:
        self.run()
        while (deadline := self.clock.next_deadline()) is not None and deadline <= when:
            self.clock.jump_to(deadline)
            self.clock.fire_due()
            self.run()
        self.clock.jump_to(when)

    def sleep(self, ns: int) -> None:
        self.sleep_until(self.clock.now() + ns)

    def count(self, irq: int) -> int:
        """How often an IRQ has come, at all CPUs."""
        return sum(self.kernel.irq.descs[irq].kstat)

    def irq_of(self, row: str) -> int:
        """The IRQ whose handlers' names are these."""
        for irq, desc in self.kernel.irq.descs.items():
            if ", ".join(action.name for action in desc.actions) == row:
                return irq
        raise LookupError(row)

    def named(self, row: str) -> int:
        return self.count(self.irq_of(row))

    def rows(self) -> dict[int, str]:
        """The rows of /proc/interrupts by number, with their counts blanked out and blanks as one."""
        return {
            int(match[1]): " ".join(match[2].split())
            for match in re.finditer(r"^ *(\d+):(?: +\d+)+ +(\S.*)$", self.kernel.proc_interrupts(), re.MULTILINE)
        }

    def log(self) -> str:
        return "\n".join(self.kernel.log)
