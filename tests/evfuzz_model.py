"""The evfuzz guest kernel in Python, on pvirq's event channels.

The C program is a small PV kernel that, booted as domain 0 of real Xen 4.17, carries out a pseudo-random
series of event-channel operations and prints each result with a hash of the shared memory. This is the same
program, so that its transcript must be the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from pvirq.abi.errno import XenError
from pvirq.abi.xen import (
    DOMID_SELF,
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_MASK,
    VCPU_INFO_UPCALL_PENDING,
)
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import PGT_L4, Machine

U64 = (1 << 64) - 1
PENDING, MASKED, LINKED, LINK_MASK = 1 << 31, 1 << 30, 1 << 29, 0x1FFFF


def fnv(values: Iterable[int]) -> int:
    h = 1469598103934665603
    for value in values:
        h = (h ^ value) * 1099511628211 & U64
    return h


class EvFuzz:
    """One run: `EvFuzz(seed, ops, fifo).run()` is the transcript."""

    def __init__(self, seed: int, ops: int, fifo: bool) -> None:
        self.hypervisor = Hypervisor(Machine(64 << 20))
        self.domain = self.hypervisor.create_domain(0, privileged=True)
        self.vcpu = self.domain.vcpus[0]
        self.vcpu.up = True
        machine = self.hypervisor.machine
        self.mem, self.u32, self.u64 = machine.mem, machine.u32, machine.u64
        self.frames = machine.alloc(3, 0)
        self.control = self.frames << 10
        self.words = self.control + 1024
        self.pending = (self.domain.shared_info + SHARED_INFO_EVTCHN_PENDING) // 8
        self.mask = (self.domain.shared_info + SHARED_INFO_EVTCHN_MASK) // 8
        self.seed, self.ops, self.fifo = seed, ops, fifo
        self.rng = (seed * 2654435761 + 12345) & U64
        self.out: list[str] = []
        self.upcalls = self.handled = 0
        self.top = 8

    def rnd(self, n: int) -> int:
        self.rng = (self.rng * 6364136223846793005 + 1442695040888963407) & U64
        return (self.rng >> 33 & 0xFFFFFFFF) % n

    def port_arg(self) -> int:
        k = self.rnd(16)
        if k == 0:
            return 0
        if k == 1:
            return 4095 + self.rnd(4)
        if k == 2:
            return 100000 + self.rnd(100000)
        return self.rnd(self.top + 3)

    def put(self, *items: object) -> None:
        self.out.extend(map(str, items))

    def hypercall(self, operation: Callable[[], object]) -> tuple[int, object]:
        """(0 or -errno, result), upcalls taken on the way back to the guest."""
        try:
            result, rc = operation(), 0
        except XenError as error:
            result, rc = None, -int(error.errno)
        info = self.vcpu.info
        while self.vcpu.event_pending():
            self.mem[info + VCPU_INFO_UPCALL_MASK] = 1
            self.on_upcall()
            self.mem[info + VCPU_INFO_UPCALL_MASK] = 0
        return rc, result

    def on_upcall(self) -> None:
        self.upcalls += 1
        self.put("^")
        self.mem[self.vcpu.info + VCPU_INFO_UPCALL_PENDING] = 0
        if self.fifo:
            self.scan_fifo(self.control)
        else:
            self.scan_2l(0)

    def scan_2l(self, vcpu_id: int) -> None:
        at = (self.domain.vcpus[vcpu_id].info + VCPU_INFO_PENDING_SEL) // 8
        sel, self.u64[at] = self.u64[at], 0
        for i in range(64):
            for b in range(64 if sel >> i & 1 else 0):
                if self.u64[self.pending + i] & ~self.u64[self.mask + i] & U64 & 1 << b:
                    self.u64[self.pending + i] &= ~(1 << b) & U64
                    self.handled += 1
                    self.put(" !", i * 64 + b)

    def scan_fifo(self, control: int) -> None:
        u32 = self.u32
        ready, u32[control] = u32[control], 0
        for q in range(16):
            while ready >> q & 1:
                head = u32[control + 2 + q]
                if not head:
                    ready &= ~(1 << q)
                    break
                while head:
                    word = u32[self.words + head]
                    link, word = word & LINK_MASK, word & ~(LINKED | LINK_MASK)
                    if word & PENDING and not word & MASKED:
                        word &= ~PENDING
                        self.handled += 1
                        self.put(" !q", q, ":", head)
                    u32[self.words + head] = word
                    head = link
                    if not head:
                        ready &= ~(1 << q)
                    u32[control + 2 + q] = head
                ready, u32[control] = ready | u32[control], 0

    def hash(self) -> int:
        info = self.vcpu.info
        values: list[int] = []
        for i in range(64):
            values += (self.u64[self.pending + i], self.u64[self.mask + i])
        values += (self.mem[info], self.u64[(info + VCPU_INFO_PENDING_SEL) // 8])
        if self.fifo:
            values += (self.u32[self.control], *self.u32[self.control + 2 : self.control + 18])
            values += self.u32[self.words : self.words + 2048]
        return fnv(values)

    def run(self) -> str:
        self.put("evfuzz seed=", self.seed, " ops=", self.ops, " fifo=", int(self.fifo), "\n")
        if self.fifo:
            rc, bits = self.hypercall(lambda: evtchn.init_control(self.domain, self.frames, 0, 0))
            self.put("init_control ", rc, " ", bits, "\n")
            for page in (self.frames + 1, self.frames + 2):
                rc, _ = self.hypercall(partial(evtchn.expand_array, self.domain, page))
                self.put("expand_array ", rc, "\n")
        return self.run_operations(100)

    def run_operations(self, kinds: int) -> str:
        self.mem[self.vcpu.info + VCPU_INFO_UPCALL_MASK] = 0
        for i in range(self.ops):
            k = self.rnd(kinds)
            self.put(i, " ")
            self.operation(k)
            self.put(" #", f"{self.hash():x}", "\n")
        self.put("upcalls ", self.upcalls, " handled ", self.handled, "\nevfuzz done\n")
        return "".join(self.out)

    def new_port(self, rc: int, port: object) -> None:
        self.put(" = ", rc, " ")
        if not rc:
            assert isinstance(port, int)
            self.put(port)
            self.top = max(self.top, port)

    def operation(self, k: int) -> None:
        d, rnd, put, hypercall = self.domain, self.rnd, self.put, self.hypercall
        if k < 12:
            dom = DOMID_SELF if rnd(8) else rnd(3)
            rdom = DOMID_SELF if rnd(3) else rnd(3)
            rc, port = hypercall(lambda: evtchn.alloc_unbound(d, dom, rdom))
            put(f"alloc {dom:x} {rdom:x}")
            self.new_port(rc, port)
        elif k < 24:
            dom = DOMID_SELF if rnd(10) else rnd(3)
            rport = self.port_arg()
            rc, port = hypercall(lambda: evtchn.bind_interdomain(d, dom, rport))
            put(f"inter {dom:x} {rport}")
            self.new_port(rc, port)
        elif k < 30:
            virq = rnd(24) if rnd(10) else rnd(64)
            vcpu = 0 if rnd(5) else rnd(4)
            virq = virq or 1
            rc, port = hypercall(lambda: evtchn.bind_virq(d, virq, vcpu))
            put(f"virq {virq} {vcpu}")
            self.new_port(rc, port)
        elif k < 35:
            vcpu = 0 if rnd(4) else rnd(4)
            rc, port = hypercall(lambda: evtchn.bind_ipi(d, vcpu))
            put(f"ipi {vcpu}")
            self.new_port(rc, port)
        elif k < 47:
            a = self.port_arg()
            rc, _ = hypercall(lambda: evtchn.close(d, a))
            put(f"close {a} = {rc}")
        elif k < 67:
            a = self.port_arg()
            put(f"send {a}")
            rc, _ = hypercall(lambda: evtchn.send(d, a))
            put(f" = {rc}")
        elif k < 75:
            self.status()
        elif k < 80:
            a = self.port_arg()
            vcpu = 0 if rnd(2) else rnd(4)
            rc, _ = hypercall(lambda: evtchn.bind_vcpu(d, a, vcpu))
            put(f"bindvcpu {a} {vcpu} = {rc}")
        elif k < 88:
            a = self.port_arg()
            put(f"unmask {a}")
            rc, _ = hypercall(lambda: evtchn.unmask(d, a))
            put(f" = {rc}")
        elif k < 92 and self.fifo:
            a, priority = self.port_arg(), rnd(18)
            put(f"prio {a} {priority}")
            rc, _ = hypercall(lambda: evtchn.set_priority(d, a, priority))
            put(f" = {rc}")
        elif k < 97:
            port = rnd(self.top + 1)
            put(f"mask {port}")
            if self.fifo:
                self.u32[self.words + port] |= MASKED
            else:
                self.u64[self.mask + (port >> 6)] |= 1 << (port & 63)
        elif k < 99:
            self.poll()
        elif not rnd(6) and not self.fifo:
            dom = DOMID_SELF if rnd(3) else rnd(3)
            rc, _ = hypercall(lambda: evtchn.reset(d, dom))
            put(f"reset {dom:x} = {rc}")
        else:
            put("nop")

    def status(self) -> None:
        dom = DOMID_SELF if self.rnd(8) else self.rnd(3)
        port = self.port_arg()
        rc, status = self.hypercall(lambda: evtchn.status(self.domain, dom, port))
        self.put(f"status {dom:x} {port} = {rc}")
        if rc:
            return
        assert isinstance(status, evtchn.Status)
        self.put(f" {status.status} {status.vcpu}")
        if status.status in (1, 2):
            self.put(f" {status.dom:x}")
        if status.status == 2:
            self.put(":", status.port)
        if status.status in (3, 4):
            self.put(" ", status.virq or status.pirq)

    def poll(self) -> None:
        ports = [self.port_arg() for _ in range(4)]
        ports = ports[: self.rnd(5)]
        info = self.vcpu.info
        masked = self.mem[info + VCPU_INFO_UPCALL_MASK]
        self.mem[info + VCPU_INFO_UPCALL_MASK] = 1
        self.put("poll ", len(ports), *(f" {port}" for port in ports))

        def poll() -> None:
            sched.do_poll(self.vcpu, ports, 1)
            self.hypervisor.clock.jump_to(self.hypervisor.clock.now() + 1)
            self.hypervisor.clock.fire_due()
            assert self.vcpu.runnable

        rc, _ = self.hypercall(poll)
        self.mem[info + VCPU_INFO_UPCALL_MASK] = masked
        self.hypercall(lambda: None)
        self.put(f" = {rc}")


class EvFuzzDeep(EvFuzz):
    """evfuzz-deep: upcalls held off, a second vCPU that never runs, and the switches between the two ABIs."""

    def __init__(self, seed: int, ops: int) -> None:
        super().__init__(seed, ops, fifo=False)
        self.hypervisor = Hypervisor(Machine(64 << 20))
        self.domain = self.hypervisor.create_domain(0, privileged=True, vcpus=2)
        self.vcpu = self.domain.vcpus[0]
        self.vcpu.up = True
        machine = self.hypervisor.machine
        self.mem, self.u32, self.u64 = machine.mem, machine.u32, machine.u64
        self.frames = machine.alloc(7, 0)
        self.page_table = self.frames + 6
        machine.type[self.page_table] = PGT_L4
        machine.type_count[self.page_table] = 1
        self.words = (self.frames + 2) << 10
        self.pending = (self.domain.shared_info + SHARED_INFO_EVTCHN_PENDING) // 8
        self.mask = (self.domain.shared_info + SHARED_INFO_EVTCHN_MASK) // 8
        self.rng = (seed * 2654435761 + 54321) & U64
        self.blocks: list[int | None] = [None, None]  # indexes into u32
        self.pages = 0

    def port_arg(self) -> int:
        k = self.rnd(24)
        if k == 0:
            return 0
        return 4095 + self.rnd(4) if k == 1 else self.rnd(self.top + 3)

    def scan(self, vcpu_id: int) -> None:
        vcpu = self.domain.vcpus[vcpu_id]
        self.mem[vcpu.info + VCPU_INFO_UPCALL_PENDING] = 0
        if not self.fifo:
            self.scan_2l(vcpu_id)
        elif (block := self.blocks[vcpu_id]) is not None:
            self.scan_fifo(block)

    def on_upcall(self) -> None:
        self.upcalls += 1
        self.put("^")
        self.scan(0)

    def hash(self) -> int:
        values: list[int] = []
        for i in range(64):
            values += (self.u64[self.pending + i], self.u64[self.mask + i])
        for vcpu, block in zip(self.domain.vcpus, self.blocks, strict=True):
            info = vcpu.info
            sel = self.u64[(info + VCPU_INFO_PENDING_SEL) // 8]
            values += (self.mem[info], self.mem[info + VCPU_INFO_UPCALL_MASK], sel)
            if block is not None:
                values += self.u32[block : block + 18]
        values += self.u32[self.words : self.words + 512]
        return fnv(values)

    def run(self) -> str:
        self.put("evfuzz seed=", self.seed, " ops=", self.ops, " deep\n")
        return self.run_operations(140)

    def new_port(self, rc: int, port: object) -> None:
        self.put(" = ", rc)
        if not rc:
            assert isinstance(port, int)
            self.put(" ", port)
            self.top = max(self.top, port)

    def operation(self, k: int) -> None:
        d, rnd, put, hypercall = self.domain, self.rnd, self.put, self.hypercall
        if k < 10:
            rdom = DOMID_SELF if rnd(12) else 5
            rc, port = hypercall(lambda: evtchn.alloc_unbound(d, DOMID_SELF, rdom))
            put(f"alloc {rdom:x}")
            self.new_port(rc, port)
        elif k < 24:
            rport = self.port_arg()
            rc, port = hypercall(lambda: evtchn.bind_interdomain(d, DOMID_SELF, rport))
            put(f"inter {rport}")
            self.new_port(rc, port)
        elif k < 29:
            virq, vcpu = rnd(24), rnd(3)
            virq = 1 if virq in (0, 2, 8) else virq
            rc, port = hypercall(lambda: evtchn.bind_virq(d, virq, vcpu))
            put(f"virq {virq} {vcpu}")
            self.new_port(rc, port)
        elif k < 34:
            vcpu = rnd(3)
            rc, port = hypercall(lambda: evtchn.bind_ipi(d, vcpu))
            put(f"ipi {vcpu}")
            self.new_port(rc, port)
        elif k < 42:
            self.simple("close", evtchn.close, self.port_arg())
        elif k < 72:
            self.simple("send", evtchn.send, self.port_arg())
        elif k < 76:
            self.status()
        elif k < 84:
            self.simple("bindvcpu", evtchn.bind_vcpu, self.port_arg(), rnd(3), late=True)
        elif k < 94:
            self.simple("unmask", evtchn.unmask, self.port_arg())
        elif k < 104:
            self.simple("prio", evtchn.set_priority, self.port_arg(), rnd(17))
        elif k < 110:
            port = rnd(self.top + 1)
            put(f"mask {port}")
            if self.fifo:
                self.u32[self.words + port] |= MASKED
            else:
                self.u64[self.mask + (port >> 6)] |= 1 << (port & 63)
        elif k < 113:
            self.poll()
        elif k < 122:
            put("cli" if k < 117 else "sti")
            self.mem[self.vcpu.info + VCPU_INFO_UPCALL_MASK] = k < 117
            hypercall(lambda: None)
        elif k < 127:
            put("drain")
            self.scan(1)
        elif k < 131:
            self.init_control()
        elif k < 134:
            f = rnd(6)
            gfn = self.frames + 2 + self.pages
            if f == 0 or self.pages == 4:
                gfn = 1 << 40
            elif f == 1:
                gfn = self.page_table
            self.simple(f"expand {f}", evtchn.expand_array, gfn, show=False)
        elif k < 135 and not rnd(3):
            self.reset()
        else:
            put("nop")

    def simple(self, name: str, call: Callable[..., None], *args: int, late: bool = False, show: bool = True) -> None:
        """Prints name and arguments, then upcalls and the result; `late`: upcalls first."""
        text = name + "".join(f" {arg}" for arg in args if show)
        if not late:
            self.put(text)
        rc, _ = self.hypercall(lambda: call(self.domain, *args))
        if late:
            self.put(text)
        self.put(f" = {rc}")
        if name.startswith("expand") and not rc:
            self.pages += 1

    def status(self) -> None:
        port = self.port_arg()
        rc, status = self.hypercall(lambda: evtchn.status(self.domain, DOMID_SELF, port))
        self.put(f"status {port} = {rc}")
        if not rc:
            assert isinstance(status, evtchn.Status)
            union = status.port << 32 | (status.dom or status.virq or status.pirq)
            self.put(f" {status.status} {status.vcpu} {union:x}")

    def init_control(self) -> None:
        rnd = self.rnd
        v = 0 if rnd(4) else rnd(3)
        offset = (0, 8, 4024, 4028, 4, 2048)[rnd(6)]
        f = rnd(6)
        if v == 0 and rnd(2):
            v = 1
        gfn = (U64, self.page_table)[f] if f < 2 else self.frames + (v & 1)
        rc, bits = self.hypercall(lambda: evtchn.init_control(self.domain, gfn, offset, v))
        self.put(f"init {v} {offset} {f} = {rc} {bits or 0}")
        if not rc:
            self.fifo = True
            self.blocks[v] = ((self.frames + v) << 10) + offset // 4

    def reset(self) -> None:
        rc, _ = self.hypercall(lambda: evtchn.reset(self.domain, DOMID_SELF))
        self.put(f"reset = {rc}")
        if not rc and self.fifo:
            self.fifo = False
            self.pages = 0
            self.blocks = [None, None]
            self.mem[self.frames << 12 : (self.frames + 2) << 12] = bytes(2 << 12)
            if self.rnd(2):
                self.mem[(self.frames + 2) << 12 : (self.frames + 6) << 12] = bytes(4 << 12)
