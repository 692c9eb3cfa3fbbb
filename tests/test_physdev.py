"""PHYSDEVOP_* by hypercall and by Python: who may, in what order it is checked, and arguments of any kind."""

from __future__ import annotations

import random
import struct

import pytest

from pirqlib import TABLE, fails, host, map_line
from pvirq.abi import physdev as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF
from pvirq.pv.hypercalls.physdev import physdev_op, physdev_op_compat
from pvirq.xen import physdev
from pvirq.xen.domain import Domain
from pvirq.xen.ioapic import IOAPIC_BASE
from pvirq.xen.msi import MsiInfo, PciDevice

ARG = 0x1000
# Operations and the size of what Xen copies in.
SIZES = {
    abi.PHYSDEVOP_irq_status_query: 8, abi.PHYSDEVOP_apic_read: 16, abi.PHYSDEVOP_apic_write: 16,
    abi.PHYSDEVOP_alloc_irq_vector: 8, abi.PHYSDEVOP_eoi: 4, abi.PHYSDEVOP_map_pirq: 40, abi.PHYSDEVOP_unmap_pirq: 8,
    abi.PHYSDEVOP_manage_pci_add: 2, abi.PHYSDEVOP_manage_pci_remove: 2, abi.PHYSDEVOP_pirq_eoi_gmfn_v1: 8,
    abi.PHYSDEVOP_restore_msi: 2, abi.PHYSDEVOP_manage_pci_add_ext: 16, abi.PHYSDEVOP_setup_gsi: 8,
    abi.PHYSDEVOP_get_free_pirq: 8, abi.PHYSDEVOP_pci_mmcfg_reserved: 16, abi.PHYSDEVOP_pci_device_add: 12,
    abi.PHYSDEVOP_pci_device_remove: 4, abi.PHYSDEVOP_restore_msi_ext: 4, abi.PHYSDEVOP_pirq_eoi_gmfn_v2: 8,
    abi.PHYSDEVOP_dbgp_op: 6, abi.PHYSDEVOP_prepare_msix: 4, abi.PHYSDEVOP_release_msix: 4,
}  # fmt: skip


class FakeCpu:
    """A vCPU of a domain with one page of guest memory at ARG."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.memory = bytearray(4096)
        self.iopl = 0
        self.io_bitmap = (0, 0)

    def read(self, va: int, nbytes: int) -> bytes:
        if not ARG <= va <= ARG + len(self.memory) - nbytes:
            raise XenError(Errno.EFAULT)
        return bytes(self.memory[va - ARG : va - ARG + nbytes])

    def write(self, va: int, data: bytes) -> None:
        self.read(va, len(data))
        self.memory[va - ARG : va - ARG + len(data)] = data

    def op(self, command: int, data: bytes = b"", compat: bool = False) -> int:
        """The operation's 0 or -errno; what came back is at the start of `memory`."""
        if compat:
            data = struct.pack("<Q", command) + data
        self.memory[: len(data)] = data
        return self.call(command, ARG, compat)

    def call(self, command: int, at: int, compat: bool = False) -> int:
        try:
            return physdev_op_compat(self, at) if compat else physdev_op(self, command, at)  # type: ignore[arg-type]
        except XenError as error:
            return -error.errno


@pytest.mark.parametrize("command", SIZES)
def test_what_is_copied_in(command: int) -> None:
    """An argument that ends one byte too early is a fault; one that just fits isn't."""
    for domain in (host()[1], host()[0].create_domain(1)):
        cpu = FakeCpu(domain)
        end = ARG + len(cpu.memory)
        if command == abi.PHYSDEVOP_pci_mmcfg_reserved and not domain.privileged:
            continue  # refused before it looks
        if command == abi.PHYSDEVOP_dbgp_op and domain.domid:
            continue
        assert cpu.call(command, end - SIZES[command] + 1) == -Errno.EFAULT
        assert cpu.call(command, end - SIZES[command]) != -Errno.EFAULT


def test_what_a_guest_may() -> None:
    """Without privilege: what concerns its own pirqs, and nothing of the machine's."""
    hypervisor, dom0 = host()
    guest = hypervisor.create_domain()
    cpu = FakeCpu(guest)
    allowed = {
        abi.PHYSDEVOP_irq_status_query: 0,
        abi.PHYSDEVOP_eoi: -Errno.EINVAL,
        abi.PHYSDEVOP_get_free_pirq: 0,
        abi.PHYSDEVOP_pirq_eoi_gmfn_v1: -Errno.EINVAL,
        abi.PHYSDEVOP_pirq_eoi_gmfn_v2: -Errno.EINVAL,
        abi.PHYSDEVOP_restore_msi: -Errno.ENODEV,
        abi.PHYSDEVOP_restore_msi_ext: -Errno.ENODEV,
        abi.PHYSDEVOP_map_pirq: -Errno.EPERM,
        abi.PHYSDEVOP_unmap_pirq: -Errno.EPERM,
    }
    for command, size in SIZES.items():
        data = bytearray(size)
        if command in (abi.PHYSDEVOP_map_pirq, abi.PHYSDEVOP_unmap_pirq):
            data[:2] = DOMID_SELF.to_bytes(2, "little")
        assert cpu.op(command, bytes(data)) == allowed.get(command, -Errno.EPERM), command
    assert struct.unpack_from("<iI", cpu.memory)  # the last answer is still there
    assert cpu.op(abi.PHYSDEVOP_IRQ_UNMASK_NOTIFY) == 0
    assert cpu.op(abi.PHYSDEVOP_free_irq_vector) == -Errno.ENOSYS
    assert cpu.op(abi.PHYSDEVOP_get_free_pirq, struct.pack("<iI", 0, 0)) == 0
    assert struct.unpack_from("<iI", cpu.memory) == (0, 54)  # 55 was set aside above
    fails(Errno.ESRCH, physdev.map_pirq, guest, 77, abi.MAP_PIRQ_TYPE_GSI, 9)
    fails(Errno.EPERM, physdev.map_pirq, guest, 0, abi.MAP_PIRQ_TYPE_GSI, 9)
    assert not dom0.pirqs.irq(9)


def test_map_pirq_writes_back() -> None:
    hypervisor, dom0 = host()
    cpu = FakeCpu(dom0)
    layout = abi.PHYSDEV_MAP_PIRQ
    assert cpu.op(abi.PHYSDEVOP_map_pirq, layout.pack(DOMID_SELF, 7, 1, 9, -1, 0, 0, 0, 8, 0)) == 0
    assert layout.unpack_from(cpu.memory) == (DOMID_SELF, 7, 1, 9, 16, 0, 0, 0, 8, 0)
    PciDevice(hypervisor, 0x10000 | 0x18, vectors=4)
    assert cpu.op(abi.PHYSDEVOP_pci_device_add, abi.PHYSDEV_PCI_DEVICE_ADD.pack(1, 0, 0x18, 0, 0, 0)) == 0
    multi = layout.pack(DOMID_SELF, 0, abi.MAP_PIRQ_TYPE_MULTI_MSI, -1, 100, 1 << 16, 0x18, 8, 0, 0)
    assert cpu.op(abi.PHYSDEVOP_map_pirq, multi) == -Errno.ENFILE
    assert layout.unpack_from(cpu.memory)[7] == 4  # how many there could be
    single = layout.pack(DOMID_SELF, 0, abi.MAP_PIRQ_TYPE_MSI_SEG, -1, -1, 1 << 16, 0x18, 0, 0, 0)
    assert cpu.op(abi.PHYSDEVOP_map_pirq, single) == 0
    assert layout.unpack_from(cpu.memory)[2:5] == (abi.MAP_PIRQ_TYPE_MSI, -1, 207)
    plain = layout.pack(DOMID_SELF, 0, abi.MAP_PIRQ_TYPE_MSI, -1, -1, 1 << 16, 0x18, 0, 0, 0)
    assert cpu.op(abi.PHYSDEVOP_map_pirq, plain) == -Errno.ENODEV  # without a segment: 0


def test_the_old_form() -> None:
    _, dom0 = host()
    cpu = FakeCpu(dom0)
    assert cpu.op(abi.PHYSDEVOP_irq_status_query, struct.pack("<iI8x", 9, 0), compat=True) == 0
    assert struct.unpack_from("<Q iI", cpu.memory) == (abi.PHYSDEVOP_irq_status_query, 9, 1)
    assert cpu.op(abi.PHYSDEVOP_apic_read, struct.pack("<QII", IOAPIC_BASE, 1, 0), compat=True) == 0
    assert struct.unpack_from("<Q QII", cpu.memory)[3] == 0x170020
    assert cpu.op(99, bytes(16), compat=True) == -Errno.ENOSYS


def test_virtual_functions_and_nodes() -> None:
    hypervisor, dom0 = host()
    cpu = FakeCpu(dom0)
    ext = abi.PHYSDEV_MANAGE_PCI_EXT
    assert cpu.op(abi.PHYSDEVOP_manage_pci_add_ext, ext.pack(0, 8, 2, 0, 0, 0)) == -Errno.EINVAL
    assert cpu.op(abi.PHYSDEVOP_manage_pci_add_ext, ext.pack(3, 9, 0, 1, 3, 8)) == 0
    assert sorted(hypervisor.pci) == [0x308, 0x309]  # its physical function first
    add = abi.PHYSDEV_PCI_DEVICE_ADD
    flags = abi.XEN_PCI_DEV_VIRTFN | abi.XEN_PCI_DEV_PXM
    assert cpu.op(abi.PHYSDEVOP_pci_device_add, add.pack(1, 4, 1, flags, 4, 0)) == 0
    assert sorted(hypervisor.pci)[2:] == [0x10400, 0x10401]
    assert cpu.op(abi.PHYSDEVOP_pci_device_remove, abi.PHYSDEV_PCI_DEVICE.pack(1, 4, 1)) == 0
    assert sorted(hypervisor.pci)[2:] == [0x10400]


@pytest.mark.parametrize("seed", range(4))
def test_arguments_of_any_kind(seed: int) -> None:
    """Each operation with random bytes, and with small numbers: 0 or an errno comes back, and nothing breaks."""
    random_ = random.Random(seed)
    hypervisor, dom0 = host(vcpus=2)
    guest = hypervisor.create_domain()
    for at in range(8):
        PciDevice(hypervisor, at << 3, vectors=at + 1, msix=bool(at & 1), maskable=bool(at & 2))
    cpus = [FakeCpu(dom0), FakeCpu(guest)]
    commands = [*SIZES, abi.PHYSDEVOP_set_iopl, abi.PHYSDEVOP_set_iobitmap, 4, 11, 18, 22, 32, 1 << 31]
    numbers = (0, 1, 2, 3, 4, 8, 9, 10, 16, 23, 24, 55, 56, 100, 415, 416, 0xFFFFFFFF, DOMID_SELF, IOAPIC_BASE, TABLE)
    ports: list[tuple[FakeCpu, int]] = []
    done = 0
    for _ in range(4000):
        cpu = random_.choice(cpus)
        if random_.random() < 0.5:
            data = random_.randbytes(48)
        else:
            data = b"".join(random_.choice(numbers).to_bytes(4, "little") for _ in range(12))
        done += cpu.op(random_.choice(commands), data) == 0
        kind = random_.randrange(5)
        try:
            if kind == 0:
                ports.append((cpu, cpu.domain.evtchnop.bind_pirq(random_.choice(numbers), random_.random() < 0.5)))
            elif kind == 1 and ports:
                owner, port = ports.pop(random_.randrange(len(ports)))
                owner.domain.evtchnop.close(port)
            elif kind == 2:
                line = hypervisor.ioapic.line(random_.randrange(24))
                (line.assert_ if random_.random() < 0.5 else line.deassert)(cpu)
            elif kind == 3:
                hypervisor.irqs.bus[random_.randrange(8) << 3].raise_msi(random_.randrange(4))
            else:
                hypervisor.clock.jump_to(hypervisor.clock.now() + 500_000)
                hypervisor.clock.fire_due()
        except XenError:
            pass
    assert done > 400
    hypervisor.destroy_domain(guest)
    hypervisor.destroy_domain(dom0)


def test_status_of_a_line_that_is_not_shared() -> None:
    _, dom0 = host()
    map_line(dom0, 9)
    assert physdev.irq_status_query(dom0, 9) == abi.XENIRQSTAT_needs_eoi
    assert physdev.irq_status_query(dom0, 10) == abi.XENIRQSTAT_needs_eoi  # not even mapped
    fails(Errno.EINVAL, physdev.irq_status_query, dom0, 208)
    fails(Errno.EINVAL, physdev.map_pirq, dom0, DOMID_SELF, abi.MAP_PIRQ_TYPE_UNKNOWN, 9)
    fails(Errno.EINVAL, physdev.map_pirq, dom0, DOMID_SELF, abi.MAP_PIRQ_TYPE_MSI, -1)
    info = MsiInfo(8, 2, TABLE)
    fails(Errno.EINVAL, physdev.map_pirq, dom0, 77, abi.MAP_PIRQ_TYPE_MULTI_MSI, -1, -1, info)
