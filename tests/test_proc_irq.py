"""/proc/irq and /sys/kernel/irq against what a real domain 0 and a real guest have there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from linuxlib import DATA, RecordedDom0, ignore, run
from pvirq.abi.errno import Errno
from pvirq.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from pvirq.linux import proc_irq
from pvirq.linux.irq import IrqChip, IrqError, IrqLayer
from pvirq.linux.kernel import Kernel
from pvirq.linux.personalities import find
from pvirq.linux.personality import StartInfo
from pvirq.linux.pvops import Pvops, dom0
from pvirq.xen import evtchn
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine


@pytest.fixture
def hypervisor() -> Iterator[Hypervisor]:
    machine = Machine(1 << 28)
    yield Hypervisor(machine)
    machine.close()


@pytest.fixture
def kernel(hypervisor: Hypervisor) -> Kernel[Pvops]:
    kernel = Kernel(hypervisor.create_domain(0, privileged=True, vcpus=2), partial(RecordedDom0, virtio=False))
    kernel.boot()
    return kernel


def errno_of(call: object) -> Errno:
    with pytest.raises(IrqError) as error:
        call()  # type: ignore[operator]
    return error.value.errno


def test_all_of_proc_irq_is_the_real_ones(kernel: Kernel[Pvops]) -> None:
    """Every file of every line after boot: paths, handlers' directories, values."""
    lines = []
    for name in proc_irq.listdir(kernel, "/proc/irq"):
        path = f"/proc/irq/{name}"
        if name == "default_smp_affinity":
            lines.append(f"{path}={proc_irq.read(kernel, path).rstrip()}")
            continue
        entries = proc_irq.listdir(kernel, path)
        lines.append(f"DIR {path}: {' '.join(entries)}")
        for entry in entries:
            if entry in proc_irq.LINUX_6_1.files:
                text = proc_irq.read(kernel, f"{path}/{entry}").replace("\n", "|")
                lines.append(f"{path}/{entry}={text}")
            else:
                assert proc_irq.listdir(kernel, f"{path}/{entry}") == []
    recorded = (DATA / "0-boot.dom0.proc-irq").read_text().splitlines()
    assert sorted(lines) == sorted(recorded)


def irqfiles(kernel: Kernel[Pvops]) -> dict[int, dict[str, str]]:
    """What the recorder wrote of each line that has a directory in /proc/irq, but the counts."""
    lines = {}
    for irq in proc_irq.listdir(kernel, "/proc/irq")[:-1]:
        proc, sys = f"/proc/irq/{irq}", f"/sys/kernel/irq/{irq}"
        files = {
            "smp_affinity": f"{proc}/smp_affinity",
            "list": f"{proc}/smp_affinity_list",
            "eff": f"{proc}/effective_affinity_list",
            "chip": f"{sys}/chip_name",
            "hwirq": f"{sys}/hwirq",
            "type": f"{sys}/type",
            "name": f"{sys}/name",
            "actions": f"{sys}/actions",
        }
        lines[int(irq)] = {label: proc_irq.read(kernel, path).rstrip("\n") for label, path in files.items()}
    return lines


def recorded_irqfiles(name: str) -> dict[int, dict[str, str]]:
    lines = {}
    for line in (DATA / name).read_text().splitlines():
        irq, rest = line.removeprefix("irq ").split(" ", 1)
        fields = dict(re.findall(r"(\w+)=(\S*)", rest))
        del fields["per_cpu"]
        lines[int(irq)] = fields
    return lines


def test_lines_of_the_recorded_dom0(hypervisor: Hypervisor) -> None:
    kernel = Kernel(hypervisor.create_domain(0, privileged=True, vcpus=2), RecordedDom0)
    kernel.boot()
    store = kernel.evtchn_user("xenstored")
    store.bind_virq(VIRQ_DOM_EXC)
    store.bind_interdomain(0, kernel.events.store_port)
    guest = hypervisor.create_domain(1, vcpus=2)
    kernel.evtchn_user("evbench").bind_unbound(1)
    store.bind_interdomain(1, evtchn.alloc_unbound(guest, DOMID_SELF, 0))
    kernel.evtchn_user("xenconsoled").bind_interdomain(1, evtchn.alloc_unbound(guest, DOMID_SELF, 0))
    for name in ["blkif-backend"] * 2 + [f"vif1.0-q{queue}-{way}" for queue in (0, 1) for way in ("tx", "rx")]:
        kernel.events.bind_interdomain(1, evtchn.alloc_unbound(guest, DOMID_SELF, 0), ignore, name, name)
    run(kernel)
    assert irqfiles(kernel) == recorded_irqfiles("2-drivers.dom0.irqfiles")


def test_lines_of_the_recorded_guest(hypervisor: Hypervisor) -> None:
    hypervisor.create_domain(0, privileged=True)
    domain = hypervisor.create_domain(1, vcpus=2)
    ports = [evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(2)]
    kernel = Kernel(domain, partial(Pvops, start_info=StartInfo(store_port=ports[0], console_port=ports[1])))
    kernel.boot()
    for name in ("blkif", "blkif", "vif0-q0-tx", "vif0-q0-rx", "vif0-q1-tx", "vif0-q1-rx"):
        kernel.events.bind_listening(0, ignore, name, name)
    assert irqfiles(kernel) == recorded_irqfiles("domU.2-drivers.irqfiles")


def test_sysfs_has_lines_without_a_chip(kernel: Kernel[Pvops]) -> None:
    """As on the real one: IRQ 0 is there, and /proc/irq has no directory for it."""
    assert proc_irq.listdir(kernel, "/sys/kernel/irq") == [str(irq) for irq in (*range(16), *range(24, 40))]
    names = ["actions", "chip_name", "hwirq", "name", "per_cpu_count", "type", "wakeup"]
    assert proc_irq.listdir(kernel, "/sys/kernel/irq/0") == names
    assert [proc_irq.read(kernel, f"/sys/kernel/irq/0/{name}") for name in names] == [
        "", "none\n", "", "", "0,0\n", "edge\n", "disabled\n"
    ]  # fmt: skip
    assert [proc_irq.read(kernel, f"/sys/kernel/irq/9/{name}") for name in names] == [
        "acpi\n", "xen-pirq\n", "", "ioapic-level\n", "0,0\n", "edge\n", "disabled\n"
    ]  # fmt: skip
    assert "0" not in proc_irq.listdir(kernel, "/proc/irq")
    kernel.irq.descs[9].kstat[:] = [1 << 32, (1 << 32) + 5]
    assert proc_irq.read(kernel, "/sys/kernel/irq/9/per_cpu_count") == "0,5\n"


@pytest.mark.parametrize(
    ("path", "read", "write"),
    [
        ("/proc/irq/9/spurious", None, Errno.EIO),
        ("/proc/irq/9/node", None, Errno.EIO),
        ("/proc/irq/9/acpi", Errno.EISDIR, Errno.EISDIR),
        ("/proc/irq/9", Errno.EISDIR, Errno.EISDIR),
        ("/proc/irq", Errno.EISDIR, Errno.EISDIR),
        ("/proc/irq/99/node", Errno.ENOENT, Errno.ENOENT),
        ("/proc/irq/09/node", Errno.ENOENT, Errno.ENOENT),
        ("/proc/irq/0/node", Errno.ENOENT, Errno.ENOENT),
        ("/proc/irq/x", Errno.ENOENT, Errno.ENOENT),
        ("/proc/irq/9/nothing", Errno.ENOENT, Errno.ENOENT),
        ("/proc/irq/9/node/x", Errno.ENOENT, Errno.ENOENT),
        ("/sys/kernel/irq/9/type", None, Errno.EIO),
        ("/sys/kernel/irq/9/node", Errno.ENOENT, Errno.ENOENT),
        ("/proc/interrupts", Errno.ENOENT, Errno.ENOENT),
        # IRQ 24 is CPU 0's timer.
        ("/proc/irq/24/smp_affinity", None, Errno.EIO),
        ("/proc/irq/24/smp_affinity_list", None, Errno.EIO),
    ],
)
def test_errors(kernel: Kernel[Pvops], path: str, read: Errno | None, write: Errno) -> None:
    if read is None:
        proc_irq.read(kernel, path)
        assert errno_of(lambda: proc_irq.listdir(kernel, path)) == Errno.ENOTDIR
    else:
        assert errno_of(lambda: proc_irq.read(kernel, path)) == read
    assert errno_of(lambda: proc_irq.write(kernel, path, "g")) == write


def test_affinity_is_written(kernel: Kernel[Pvops]) -> None:
    path = "/proc/irq/9/smp_affinity"
    port = kernel.events.evtchn_from_irq(9)
    for text, mask, cpu in (("1\n", 1, 0), ("2", 2, 1), ("00000001", 1, 0)):
        proc_irq.write(kernel, path, text)
        assert proc_irq.read(kernel, path) == f"{mask:x}\n"
        assert proc_irq.read(kernel, "/proc/irq/9/effective_affinity") == f"{1 << cpu}\n"
        assert evtchn.status(kernel.domain, DOMID_SELF, port).vcpu == cpu
    proc_irq.write(kernel, "/proc/irq/9/smp_affinity_list", "1")
    assert evtchn.status(kernel.domain, DOMID_SELF, port).vcpu == 1
    for text, error in (("0", Errno.EINVAL), ("", Errno.EINVAL), ("4", Errno.EOVERFLOW), ("0x1", Errno.EINVAL)):
        assert errno_of(lambda text=text: proc_irq.write(kernel, path, text)) == error
    assert errno_of(lambda: proc_irq.write(kernel, "/proc/irq/9/smp_affinity_list", "2")) == Errno.ERANGE
    assert proc_irq.read(kernel, path) == "2\n"
    kernel.cpu_down(1)
    assert errno_of(lambda: proc_irq.write(kernel, path, "2")) == Errno.EINVAL


def test_default_affinity(kernel: Kernel[Pvops]) -> None:
    """It decides where lines go that start afterwards."""
    path = "/proc/irq/default_smp_affinity"
    assert proc_irq.read(kernel, path) == "3\n"
    proc_irq.write(kernel, path, "2")
    assert proc_irq.read(kernel, path) == "2\n"
    user = kernel.evtchn_user("x")
    for _ in range(3):
        assert kernel.events.cpu_from_evtchn(user.bind_unbound(DOMID_SELF)) == 1
    for text, error in (("0", Errno.EINVAL), ("4", Errno.EOVERFLOW)):
        assert errno_of(lambda text=text: proc_irq.write(kernel, path, text)) == error
    assert errno_of(lambda: proc_irq.listdir(kernel, path)) == Errno.ENOTDIR
    assert proc_irq.read(kernel, path) == "2\n"


def test_hint_and_spurious(kernel: Kernel[Pvops]) -> None:
    kernel.irq.set_affinity_hint(9, 1)
    assert proc_irq.read(kernel, "/proc/irq/9/affinity_hint") == "1\n"
    assert proc_irq.read(kernel, "/proc/irq/9/effective_affinity_list") == "0\n"
    desc = kernel.irq.descs[9]
    desc.irq_count, desc.irqs_unhandled, desc.last_unhandled = 7, 3, 1001
    assert proc_irq.read(kernel, "/proc/irq/9/spurious") == "count 7\nunhandled 3\nlast_unhandled 4004 ms\n"
    kernel.irq.free_irq(9, kernel.events)
    assert proc_irq.read(kernel, "/proc/irq/9/affinity_hint") == "0\n"
    assert "acpi" not in proc_irq.listdir(kernel, "/proc/irq/9")


def test_wide_masks() -> None:
    layer = IrqLayer(40, cpu=lambda: 0, jiffies=lambda: 0, hz=250, printk=[].append)
    kernel: Any = SimpleNamespace(irq=layer, events=SimpleNamespace(hz=250))
    layer.alloc_desc(1).chip = IrqChip("x", irq_ack=print, irq_mask=print, irq_unmask=print)
    assert proc_irq.read(kernel, "/proc/irq/default_smp_affinity") == "ff,ffffffff\n"
    assert proc_irq.read(kernel, "/proc/irq/1/smp_affinity") == "ff,ffffffff\n"
    assert proc_irq.read(kernel, "/proc/irq/1/smp_affinity_list") == "0-39\n"
    assert proc_irq.read(kernel, "/proc/irq/1/effective_affinity") == "00,00000000\n"


def older(hypervisor: Hypervisor, name: str, vcpus: int = 2) -> Kernel[Any]:
    kernel: Kernel[Any] = Kernel(hypervisor.create_domain(0, privileged=True, vcpus=vcpus), find(name))
    kernel.boot()
    return kernel


def test_2_6_18(hypervisor: Hypervisor) -> None:
    """Only smp_affinity, in whole groups; a directory for each line there could be."""
    kernel = older(hypervisor, "2.6.18")
    names = proc_irq.listdir(kernel, "/proc/irq")
    assert names[-1] == str(kernel.irq.nr_irqs - 1)
    timer = next(irq for irq, line in kernel.irq.descs.items() if line.actions and line.actions[0].name == "timer0")
    assert proc_irq.listdir(kernel, f"/proc/irq/{timer}") == ["smp_affinity", "timer0"]
    assert proc_irq.read(kernel, f"/proc/irq/{timer}/smp_affinity") == "00000001\n"
    for path in ("/proc/irq/default_smp_affinity", f"/proc/irq/{timer}/spurious", "/sys/kernel/irq"):
        assert errno_of(lambda path=path: proc_irq.read(kernel, path)) == Errno.ENOENT
    path = f"/proc/irq/{kernel.events.bind_listening(0, ignore, 'x', kernel)}/smp_affinity"
    assert proc_irq.read(kernel, path) == "00000001\n"
    for text, errno in (("0", Errno.EINVAL), ("x", Errno.EINVAL), ("1,00000000", Errno.EOVERFLOW)):
        assert errno_of(lambda text=text: proc_irq.write(kernel, path, text)) == errno
    proc_irq.write(kernel, path, "2")


def test_suse(hypervisor: Hypervisor) -> None:
    kernel = older(hypervisor, "suse")
    timer = next(irq for irq, line in kernel.irq.descs.items() if line.actions and line.actions[0].name == "timer")
    assert proc_irq.listdir(kernel, f"/proc/irq/{timer}") == ["smp_affinity", "spurious", "timer"]
    assert proc_irq.read(kernel, f"/proc/irq/{timer}/spurious") == "count 0\nunhandled 0\nlast_unhandled 0 ms\n"
    path = "/proc/irq/default_smp_affinity"
    assert proc_irq.read(kernel, path) == "3\n"
    proc_irq.write(kernel, path, "1")
    assert proc_irq.read(kernel, path) == "1\n"
    assert errno_of(lambda: proc_irq.write(kernel, path, "0")) == Errno.EINVAL


def test_a_kernel_without_smp_has_fewer_files(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor, 1)
    kernel.irq.smp = False
    assert proc_irq.listdir(kernel, "/proc/irq/1") == ["spurious"]
    assert "default_smp_affinity" not in proc_irq.listdir(kernel, "/proc/irq")
    assert errno_of(lambda: proc_irq.read(kernel, "/proc/irq/1/smp_affinity")) == Errno.ENOENT
