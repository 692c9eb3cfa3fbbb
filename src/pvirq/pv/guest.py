"""A real PV guest: a domain, the engine that runs its code, and what Xen keeps for it beyond `pvirq.xen`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from pvirq.abi import vcpu as vcpu_abi
from pvirq.abi.arch_x86 import HYPERVISOR_VIRT_START, VMASST_TYPE_architectural_iopl, VMASST_TYPE_m2p_strict
from pvirq.abi.errno import XenError
from pvirq.abi.memory import E820_RAM
from pvirq.abi.sched import SHUTDOWN_crash
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE, HYPERVISOR_iret, NR_hypercalls
from pvirq.engine import open_engine
from pvirq.engine.protocol import RAX, RIP
from pvirq.pv import descriptors
from pvirq.pv.hypercalls import HYPERCALLS
from pvirq.pv.hypercalls.protocol import GuestCrash
from pvirq.pv.image import KernelImage
from pvirq.pv.pagetable import ACCESSED, ADDRESS, DIRTY, GUEST_KERNEL, NX, PSE, USER, XEN_SLOTS, PageTables
from pvirq.pv.probed import ProbedGuest
from pvirq.pv.vcpu import PvVcpu
from pvirq.xen import vtimer
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.grant import GrantTable
from pvirq.xen.memory import PGT_L4, PGT_WRITABLE

M2P_LARGE_PAGE: Final = 0x1 | USER | ACCESSED | DIRTY | PSE  # read-only for the guest
M2P_TABLE: Final = 0x1 | USER | ACCESSED
PERDOMAIN_SLOT: Final = 260
_pack_runstate: Final = struct.Struct(vcpu_abi.RUNSTATE_INFO).pack
M2P_SLOT: Final = (HYPERVISOR_VIRT_START >> 39) & 511


class PvGuest:
    """One domain's machine. Several vCPUs share the engine by turns; `current` is the one whose registers it holds.

    `run` is `do_run`, unless something has been put in front of it (`pvirq.xen.probes.put`).
    """

    def __init__(
        self,
        domain: Domain,
        memory_bytes: int,
        engine: str,
        *,
        wallclock_ns: int = 0,
        max_memory_bytes: int = 0,
        repeatable: bool = False,
    ) -> None:
        """Give `domain` its RAM and an engine, one that is `repeatable` (`pvirq.engine.open_engine`).

        EngineError or XenError(ENOMEM) where that can't be had.
        """
        self.run: Callable[[Vcpu, int | None], None] = self.do_run
        self.domain = domain
        machine = domain.machine
        domain.tot_pages = memory_bytes >> PAGE_SHIFT
        domain.max_pages = max(domain.tot_pages, max_memory_bytes >> PAGE_SHIFT)
        self.memory_map = [(0, self.max_frames << PAGE_SHIFT, E820_RAM)]
        self.wallclock_ns = wallclock_ns
        self._clock = domain.hypervisor.clock
        self.uuid = bytes(16)
        self._assists = 0
        self.console_port = 0
        self.store_port = 0
        self.crash: str | None = None
        self.on_console_io: Callable[[bytes], None] = lambda data: None
        self.initial_tables: dict[int, int] = {}  # mfn of a builder's level-1 table -> mfn that its entry 0 maps
        self.hypercalls = HYPERCALLS
        self.first_mfn = machine.alloc(self.frames, domain.domid)
        self.window = descriptors.DescriptorWindow(machine, len(domain.vcpus))
        self._xen_frames = [self.window.frames]
        self._m2p_entry = self._make_m2p_tables()
        self.tables = PageTables(domain, self._xen_slots, self._flush_tlb)
        self.engine = open_engine(engine, machine.mem, _NOBODY, repeatable=repeatable)
        domain.frame_written = self.engine.invalidate_code
        domain.grant_table = GrantTable(domain)
        self.cpus = [PvVcpu(self, vcpu) for vcpu in domain.vcpus]
        self.current = self.cpus[0]
        self.engine.exchange(self.current.slot, self.current)
        self._running: PvVcpu | None = None  # whose turn it is
        self.kernel_image: Callable[[], KernelImage | None] = lambda: None  # the file that it runs, if it is there
        domain.hypervisor.probes.register(domain, ProbedGuest(self))

    def _xen_slots(self) -> list[int]:
        """The level-4 entries of Xen's part of a new root table (init_xen_l4_slots).

        Who may see the machine-to-phys table depends on m2p_strict: without it, a root gets it when the kernel first
        loads it (`fill_ro_mpt`); with it, each gets it at once, and loses it as a root of user mode's.
        """
        slots = [0] * len(XEN_SLOTS)
        if self.assists & 1 << VMASST_TYPE_m2p_strict:
            slots[M2P_SLOT - XEN_SLOTS.start] = self._m2p_entry
        slots[PERDOMAIN_SLOT - XEN_SLOTS.start] = self.window.l4_entry
        return slots

    def _make_m2p_tables(self) -> int:
        """Page tables for the machine-to-phys table; returns the level-4 entry for them."""
        machine = self.domain.machine
        table_bytes = machine.frames * 8
        level3 = machine.alloc(1)
        level2s = -(-table_bytes // (1 << 30))
        first = machine.alloc(level2s)
        self._xen_frames += [(level3, 1), (first, level2s)]
        for i in range(level2s):
            machine.u64[(level3 << 9) + i] = (first + i) << PAGE_SHIFT | M2P_TABLE
        for i in range(-(-table_bytes // (2 << 20))):
            machine.u64[(first << 9) + i] = (machine.m2p_mfn + i * 512) << PAGE_SHIFT | M2P_LARGE_PAGE
        return level3 << PAGE_SHIFT | M2P_TABLE

    @property
    def assists(self) -> int:
        """The VMASST_TYPE_* that the guest has asked for, as bits."""
        return self._assists

    @assists.setter
    def assists(self, value: int) -> None:
        self._assists = value
        for cpu in self.cpus:
            cpu.architectural_iopl = value >> VMASST_TYPE_architectural_iopl & 1

    # -- memory ------------------------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """How many frames of RAM the guest has now."""
        return self.domain.tot_pages

    @property
    def max_frames(self) -> int:
        return self.domain.max_pages

    def mfn(self, pfn: int) -> int:
        """The frame behind a page of the initial layout (before the guest moves any)."""
        return self.first_mfn + pfn

    def address(self, pfn: int) -> int:
        """The machine address of a page of the initial layout, in bytes."""
        return self.mfn(pfn) << PAGE_SHIFT

    def marked_nx(self, entry: int, index: int) -> bool:
        """The entry at `index` is still the one that the builder wrote, with its NX bit."""
        first = self.initial_tables.get(index >> 9)
        if first is None:
            return False
        mfn = first + (index & 511)
        return entry & ADDRESS == mfn << PAGE_SHIFT and bool(entry & NX) and bool(entry & GUEST_KERNEL)

    def fill_hypercall_page(self, mfn: int) -> None:
        """The stubs that a guest calls at page + 32 * number (hypercall_page_initialise_ring3_kernel)."""
        page = bytearray(PAGE_SIZE)
        for number in range(NR_hypercalls):
            stub = b"\x51\x41\x53\xb8" + struct.pack("<I", number) + b"\x0f\x05\x41\x5b\x59\xc3"
            if number == HYPERVISOR_iret:
                stub = b"\x51\x41\x53\x50\xb8" + struct.pack("<I", number) + b"\x0f\x05"
            page[number * 32 : number * 32 + len(stub)] = stub
        self.domain.machine.page(mfn)[:] = page
        self.engine.invalidate_code(mfn << PAGE_SHIFT, PAGE_SIZE)

    def write_hypercall_page(self, value: int) -> bool:
        """WRMSR to Xen's leaf: put the stubs at that frame of the guest's. False: #GP (wrmsr_hypervisor_regs)."""
        mfn = value >> PAGE_SHIFT
        if value & (PAGE_SIZE - 1):
            return False
        try:
            self.tables.get_type(mfn, PGT_WRITABLE)
        except XenError:
            return False
        self.fill_hypercall_page(mfn)
        self.tables.put_type(mfn)
        return True

    # -- address spaces ------------------------------------------------------------------------------------------------

    def _flush_tlb(self) -> None:
        self.current.flush_tlb()

    def fill_ro_mpt(self, root: int) -> None:
        """Show the machine-to-phys table in a root that the kernel loads (see `_xen_slots`)."""
        if not self.assists & 1 << VMASST_TYPE_m2p_strict:
            self.domain.machine.u64[(root << 9) + M2P_SLOT] = self._m2p_entry

    def new_kernel_root(self, cpu: PvVcpu, mfn: int) -> None:
        """MMUEXT_NEW_BASEPTR and MOV to CR3 (new_guest_cr3). XenError(EINVAL) for what can't be a root."""
        old = cpu.kernel_root
        if old != mfn:
            self.tables.get_type(mfn, PGT_L4)
            cpu.kernel_root = mfn
            self.fill_ro_mpt(mfn)
        descriptors.drop_ldt(cpu)
        cpu.load_root()
        if old != mfn:
            self.tables.put_type(old)

    def new_user_root(self, cpu: PvVcpu, mfn: int) -> None:
        """MMUEXT_NEW_USER_BASEPTR; 0 for none."""
        old = cpu.user_root
        if old == mfn:
            return
        if mfn:
            self.tables.get_type(mfn, PGT_L4)
            if self.assists & 1 << VMASST_TYPE_m2p_strict:
                self.domain.machine.u64[(mfn << 9) + M2P_SLOT] = 0
        cpu.user_root = mfn
        cpu.engine.forget_space()
        if old:
            self.tables.put_type(old)

    # -- time ----------------------------------------------------------------------------------------------------------

    def time_info(self) -> bytes:
        """struct vcpu_time_info. It never changes: the guest's TSC is the clock (see pvirq.xen.timer)."""
        clock = self.domain.hypervisor.clock
        return struct.pack(vcpu_abi.TIME_INFO, 2, 0, 0, 0, clock.mul, clock.shift, vcpu_abi.XEN_PVCLOCK_TSC_STABLE_BIT)

    def runstate(self, cpu: PvVcpu) -> bytes:
        """struct vcpu_runstate_info, up to now."""
        now = self.domain.hypervisor.clock.now()
        times = cpu.runstate_times
        times[cpu.runstate] += now - cpu.runstate_since
        return _pack_runstate(cpu.runstate, cpu.runstate_since, *times)

    def woken(self, vcpu: Vcpu) -> None:
        """The vCPU may have become runnable, which shows before it runs (vcpu_wake)."""
        cpu = self.cpus[vcpu.vcpu_id]
        if cpu.runstate >= vcpu_abi.RUNSTATE_blocked and vcpu.runnable:
            self.engine.change_runstate(cpu.slot, vcpu_abi.RUNSTATE_runnable, self._clock.now(), write=False)

    def _change_runstate(self, cpu: PvVcpu, state: int) -> None:
        if state == cpu.runstate or self.engine.change_runstate(cpu.slot, state, self._clock.now(), write=True):
            return
        cpu.update_runstate_area(_pack_runstate(state, cpu.runstate_since, *cpu.runstate_times))

    # -- running -------------------------------------------------------------------------------------------------------

    def _load(self, cpu: PvVcpu) -> None:
        if cpu is self.current:
            return
        self.engine.exchange(cpu.slot, cpu)
        self.current = cpu

    @contextmanager
    def loaded(self, cpu: PvVcpu) -> Iterator[None]:
        """With `cpu`'s registers in the engine; afterwards those that were there."""
        before = self.current
        self._load(cpu)
        try:
            yield
        finally:
            self._load(before)

    def do_run(self, vcpu: Vcpu, until_ticks: int | None) -> None:
        """Run a vCPU until something else is to be done, `until_ticks` of the engine's counter at the latest.

        A guest that can't go on is shut down with SHUTDOWN_crash, and `crash` says why.
        """
        cpu = self.cpus[vcpu.vcpu_id]
        engine, regs = self.engine, self.engine.regs
        engine.stop_at = until_ticks
        try:
            if cpu is not self._running:
                self._begin_turn(cpu)
            cpu.note()
            if cpu.nmi_pending:
                regs[RIP] = cpu.deliver_nmi(regs[RIP])
            info, mem = vcpu.info, self.domain.machine.mem
            if mem[info] and not mem[info + 1]:
                regs[RIP] = cpu.deliver_events(regs[RIP])
            engine.run()
        except GuestCrash as crash:
            self.crash = str(crash)
            self.domain.shutdown(SHUTDOWN_crash)
        if vcpu.blocked or vcpu.polling or not vcpu.up:
            self.end_turn()

    def _begin_turn(self, cpu: PvVcpu) -> None:
        self.end_turn()
        self._running = cpu
        switched = cpu is not self.current
        self._load(cpu)
        self._change_runstate(cpu, vcpu_abi.RUNSTATE_running)
        vtimer.resume_periodic(cpu.vcpu)
        if switched:
            cpu.reload_segments()

    def end_turn(self) -> None:
        """Another vCPU runs next, or none. Until then the one that ran last counts as running, as on its own CPU."""
        cpu, self._running = self._running, None
        if cpu is None:
            return
        vcpu = cpu.vcpu
        vtimer.suspend_periodic(vcpu)
        if not vcpu.up:
            self._change_runstate(cpu, vcpu_abi.RUNSTATE_offline)
        elif vcpu.blocked or vcpu.polling:
            self._change_runstate(cpu, vcpu_abi.RUNSTATE_blocked)
        else:
            self._change_runstate(cpu, vcpu_abi.RUNSTATE_runnable)

    def return_from_suspend(self, *, cancelled: bool) -> None:
        """What HYPERVISOR_suspend returns on vCPU 0: 1 where the guest goes on in the same domain."""
        with self.loaded(self.cpus[0]):
            self.engine.regs[RAX] = int(cancelled)

    def close(self) -> None:
        """Free the engine and Xen's frames; the domain itself is the hypervisor's to destroy."""
        self.engine.close()
        for mfn, count in self._xen_frames:
            self.domain.machine.free(mfn, count)


class _Nobody:
    """Stands in until the vCPUs exist."""

    def syscall(self, rip: int, cs: int) -> int:
        raise AssertionError

    def exception(self, vector: int, error: int, rip: int, software: bool) -> int:
        raise AssertionError

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        raise AssertionError


_NOBODY: Final = _Nobody()
