"""Interrupts of a real Linux guest, watched from outside: the entry and exit of its flow handlers, by its own symbols.

A flow handler (handle_edge_irq and the like) is called with the line's descriptor; where in that and in what it points
to the numbers and names are, the kernel's BTF says. Without BTF there is handle_irq_for_port, which gets a port (Linux
3.14 and later); without symbols there is nothing. Only those functions are watched, so the rest of the guest's code
runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pvirq.abi.errno import XenError
from pvirq.engine.protocol import RDI, RSI, RSP
from pvirq.pv.btf import Layout, btf_of, layouts
from pvirq.pv.image import KernelImage
from pvirq.pv.module_symbols import find_in_modules, module_layout
from pvirq.pv.symbols import Symbols, symbols_for

if TYPE_CHECKING:
    from pvirq.engine.notes import Calls, Site
    from pvirq.pv.guest import PvGuest
    from pvirq.xen.domain import Vcpu
    from pvirq.xen.probes import Instrument, Record, Tell

# How much of a guest's interrupts can be seen.
LINES: Final = "lines"  # irq, port, name, handler
PORTS: Final = "ports"  # the port
NOTHING: Final = "none"

FLOWS: Final = ("handle_edge_irq", "handle_fasteoi_irq", "handle_level_irq", "handle_percpu_irq", "handle_simple_irq")
PORT_FUNCTION: Final = "handle_irq_for_port"
LATE_EOI: Final = "xen_irq_lateeoi"
LEGACY_INFOS: Final = "legacy_info_ptrs"  # of the lines below 16, whose chip_data is the architecture's
NR_IRQS_LEGACY: Final = 16
BANNER: Final = "linux_banner"
MODULES: Final = "modules"  # the head of their list
STRUCTURES: Final = (
    "irq_desc", "irq_data", "irq_common_data", "irqaction", "irq_info", "module", "mod_kallsyms",
)  # fmt: skip

# irq_common_data.state_use_accessors: no handler runs while a line is in one of these (but of a CPU's own, any does).
IRQD_IRQ_DISABLED: Final = 1 << 16
IRQD_IRQ_INPROGRESS: Final = 1 << 18
XEN_EOI_FLAG_SPURIOUS: Final = 1
M32: Final = 0xFFFFFFFF

# A guest may be wrong or hostile: so many return addresses, lines, handlers on one, and lines within each other.
MOST_EXITS: Final = 64
MOST_LINES: Final = 4096
MOST_ACTIONS: Final = 8
MOST_NESTED: Final = 8
NAME_SIZE: Final = 64


class Handler(NamedTuple):
    """A handler of the guest's (`pvirq.xen.probes.Action`)."""

    name: str
    handler: str


class Noting(NamedTuple):
    """For whom the engine notes what by itself, and what a record's note is, plus one; 0: nothing, None: to be told."""

    instrument: Instrument
    calls: Calls
    number: Callable[[Record], int | None]


class _Offsets(NamedTuple):
    """Where things are; `size` is how much of irq_desc has all of them."""

    state: int
    irq: int
    chip_data: int
    handler_data: int
    action: int
    size: int
    handler: int
    next: int
    name: int
    action_size: int
    info_irq: int
    info_evtchn: int
    info_size: int


class IrqWatch:
    """Tells of one guest's interrupts, from `begin` to `end`. `level` is how much it can tell."""

    def __init__(self, guest: PvGuest, image: KernelImage) -> None:
        self._guest = guest
        self._regs = guest.engine.regs
        self._symbols: Symbols = symbols_for(image)
        found = layouts(btf_of(image.elf) or memoryview(b""), STRUCTURES)
        self._offsets = _find_offsets(found)
        self._module_layout = module_layout(*(next(iter(found[name]), None) for name in ("module", "mod_kallsyms")))
        self._modules = self._symbols.address(MODULES)
        self._noting: Noting | None = None
        self._removers: list[tuple[int, Callable[[], None]]] = []
        self._exits: set[int] = set()
        self._inside: dict[Vcpu, list[tuple[int, int, int]]] = {vcpu: [] for vcpu in guest.domain.vcpus}
        self._handlers: dict[tuple[int, bytes], Handler] = {}
        self._ports: dict[int, int] = {}  # by irq, as last seen
        self._known: dict[int, tuple[bytes, int, tuple[int, int, Sequence[Handler]]]] = {}  # lines by descriptor
        self._u64 = guest.domain.machine.u64
        self._legacy = self._symbols.address(LEGACY_INFOS)
        flows = [address for name in FLOWS if (address := self._symbols.address(name)) is not None]
        port_function = self._symbols.address(PORT_FUNCTION)
        if not _is_running(guest, image, self._symbols):
            self.level = NOTHING
        elif self._offsets is not None and flows:
            self.level = LINES
        else:
            self.level = PORTS if port_function is not None else NOTHING
        self._flows = flows if self.level == LINES else []
        self._port_function = port_function if self.level == PORTS else None

    def begin(self, entry: Tell, leave: Tell, eoi: Tell | None, noting: Noting | None) -> None:
        """Put the watches there; with `noting`, what is known already isn't told but noted."""
        self.end()
        self._entry, self._leave, self._noting = entry, leave, noting
        calls = None if noting is None else noting.calls
        percpu = self._symbols.address("handle_percpu_irq")
        for address in self._flows:
            assert self._offsets is not None
            site = None if calls is None else calls.entry(size=self._offsets.size, returns=True)
            self._watch(address, self._flow_of(address == percpu, site), site)
        if self._port_function is not None:
            site = None if calls is None else calls.entry(first=M32, returns=True)
            self._watch(self._port_function, self._port_of_site(site), site)
        late_eoi = self._symbols.address(LATE_EOI)
        if eoi is not None and late_eoi is not None and self.level == LINES:
            site = None if calls is None else calls.entry(first=M32, second=XEN_EOI_FLAG_SPURIOUS)
            self._watch(late_eoi, self._eoi_told(eoi, site), site)

    def end(self) -> None:
        """Take them away."""
        removers, self._removers = self._removers, []
        self._exits.clear()
        for va, remove in removers:
            remove()
            self._forget_code(va)
        for inside in self._inside.values():
            inside.clear()

    def _watch(self, va: int, callback: Callable[[], None], site: Site | None) -> None:
        self._removers.append((va, self._guest.engine.watch(va, callback, site)))
        self._forget_code(va)

    def _forget_code(self, va: int) -> None:
        """What was translated there knows nothing of a watch that is new, or still knows one that has gone."""
        for cpu in self._guest.cpus:
            if cpu.kernel_root:
                try:
                    self._guest.engine.invalidate_code(cpu.translate_as_kernel(va), 1)
                except XenError:
                    continue  # not mapped: not translated either
                return

    # -- what is called while the guest runs ---------------------------------------------------------------------------

    def _flow_of(self, percpu: bool, site: Site | None) -> Callable[[], None]:
        regs, guest = self._regs, self._guest

        def flow() -> None:
            cpu = guest.current
            try:
                line = self._line(regs[RDI], percpu)
                back = self._u64[cpu.translate(regs[RSP]) >> 3]
            except XenError:
                return  # no descriptor, or no stack: no kernel of Linux's
            irq, port, actions = line
            self._enter(cpu.vcpu, port, irq, actions, back, site)

        return flow

    def _port_of_site(self, site: Site | None) -> Callable[[], None]:
        regs, guest = self._regs, self._guest

        def port() -> None:
            cpu = guest.current
            try:
                back = self._u64[cpu.translate(regs[RSP]) >> 3]
            except XenError:
                return
            self._enter(cpu.vcpu, regs[RDI] & M32, -1, (), back, site)

        return port

    def _enter(self, vcpu: Vcpu, port: int, irq: int, actions: Sequence[Handler], back: int, site: Site | None) -> None:
        inside = self._inside[vcpu]
        if back not in self._exits:
            if len(self._exits) >= MOST_EXITS:
                return
            self._exits.add(back)
            self._watch(back, self._exit, None if self._noting is None else self._noting.calls.back(back))
        if len(inside) >= MOST_NESTED:
            inside.clear()
        inside.append((self._regs[RSP] + 8, port, irq))
        self._note_inside()
        entry = "irq_entry", vcpu, port, irq, actions
        self._entry(entry)
        self._know(site, entry, ("irq_exit", vcpu, port, irq))

    def _exit(self) -> None:
        vcpu = self._guest.current.vcpu
        inside = self._inside[vcpu]
        # Others come this way too; who returns from the handler has the stack that its caller had.
        if inside and inside[-1][0] == self._regs[RSP]:
            _, port, irq = inside.pop()
            self._note_inside()
            self._leave(("irq_exit", vcpu, port, irq))

    def _eoi_told(self, told: Tell, site: Site | None) -> Callable[[], None]:
        regs, guest = self._regs, self._guest

        def eoi() -> None:
            irq = regs[RDI] & M32
            spurious = bool(regs[RSI] & XEN_EOI_FLAG_SPURIOUS)
            record = "eoi", guest.current.vcpu, self._ports.get(irq, -1), irq, spurious
            told(record)
            self._know(site, record)

        return eoi

    def _know(self, site: Site | None, enter: Record, leave: Record | None = None) -> None:
        """The engine is to note a call like this one by itself."""
        if site is None:
            return
        assert self._noting is not None
        number = self._noting.number
        entered, left = number(enter), 0 if leave is None else number(leave)
        if entered is not None and left is not None:
            self._noting.calls.know(site, entered, left)

    def _note_inside(self) -> None:
        if self._noting is not None:
            self._noting.calls.asked(sum(map(len, self._inside.values())))

    # -- what the guest's memory says ----------------------------------------------------------------------------------

    def _line(self, desc: int, percpu: bool) -> tuple[int, int, Sequence[Handler]]:
        """An irq_desc's irq, port, and the handlers that will run. XenError(EFAULT)."""
        at, generation = self._offsets, self._guest.domain.evtchn.generation
        assert at is not None
        raw = self._guest.current.read(desc, at.size)
        known = self._known.get(desc)
        # Who exchanges a line's handler or port has a port closed or bound.
        if known is not None and known[0] == raw and known[1] == generation:
            return known[2]
        irq, state = _u32(raw, at.irq), _u32(raw, at.state)
        port = self._port_of(irq, _u64(raw, at.chip_data))
        if port < 0:
            port = self._port_of(irq, _u64(raw, at.handler_data))  # Linux 5.8 and earlier
        if port < 0 and irq < NR_IRQS_LEGACY and self._legacy is not None:
            port = self._port_of(irq, _u64(self._guest.current.read(self._legacy + 8 * irq, 8), 0))
        if port >= 0 and self._ports.get(irq) != port:
            self._ports[irq] = port
            if self._noting is not None:
                self._noting.calls.forget()  # EOIs of that line
        runs = percpu or not state & (IRQD_IRQ_DISABLED | IRQD_IRQ_INPROGRESS)
        line = irq, port, self._actions(_u64(raw, at.action)) if runs else ()
        if len(self._known) >= MOST_LINES:
            self._known.clear()
        self._known[desc] = raw, generation, line
        return line

    def _port_of(self, irq: int, info: int) -> int:
        """The port in an irq_info, -1 where it isn't this line's."""
        at = self._offsets
        assert at is not None
        try:
            raw = self._guest.current.read(info, at.info_size)
        except XenError:
            return -1
        return _u32(raw, at.info_evtchn) if _u32(raw, at.info_irq) == irq else -1

    def _actions(self, action: int) -> Sequence[Handler]:
        at = self._offsets
        handlers: list[Handler] = []
        assert at is not None
        while action and len(handlers) < MOST_ACTIONS:
            raw = self._guest.current.read(action, at.action_size)
            handlers.append(self._handler(_u64(raw, at.handler), _u64(raw, at.name)))
            action = _u64(raw, at.next)
        return tuple(handlers)

    def _handler(self, function: int, name: int) -> Handler:
        cpu = self._guest.current
        size = min(NAME_SIZE, 0x1000 - (name & 0xFFF))  # not into the next page, which may not be there
        raw = cpu.read(name, size)
        if b"\0" not in raw and size < NAME_SIZE:
            raw += cpu.read(name + size, NAME_SIZE - size)
        raw = raw.partition(b"\0")[0]
        known = self._handlers.get((function, raw))
        if known is None:
            if len(self._handlers) >= MOST_LINES:
                self._handlers.clear()
            known = self._handlers[function, raw] = Handler(raw.decode("utf-8", "replace"), self._function(function))
        return known

    def _function(self, address: int) -> str:
        """The name of a function of the kernel's or a module's; its address where it has none."""
        found = self._symbols.lookup(address)
        if found is not None and not found[1]:
            return found[0]
        name = None
        if self._modules is not None and self._module_layout is not None:
            name = find_in_modules(self._guest.current.read, self._modules, self._module_layout, address)
        return name or f"{address:#x}"


def _u32(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little")


def _u64(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 8], "little")


def _find_offsets(found: dict[str, list[Layout]]) -> _Offsets | None:
    try:
        desc, data, common = (_with(found[name]) for name in ("irq_desc", "irq_data", "irq_common_data"))
        action = _with(found["irqaction"])
        info = _with(found["irq_info"], "evtchn", "irq")  # others have structures of this name too
        in_data, in_common = desc["irq_data"], desc["irq_common_data"]
        line = (
            in_common + common["state_use_accessors"], in_data + data["irq"], in_data + data["chip_data"],
            in_common + common["handler_data"], desc["action"],
        )  # fmt: skip
        handler = action["handler"], action["next"], action["name"]
        port = info["irq"], info["evtchn"]
        return _Offsets(*line, max(line) + 8, *handler, max(handler) + 8, *port, max(port) + 4)
    except LookupError:
        return None


def _with(candidates: list[Layout], *members: str) -> Layout:
    """The first layout that has these members. LookupError."""
    for layout in candidates:
        if all(member in layout for member in members):
            return layout
    raise LookupError


def _is_running(guest: PvGuest, image: KernelImage, symbols: Symbols) -> bool:
    """Is this image what the guest runs? A restored guest's kernel file may be another one by now."""
    banner = symbols.address(BANNER)
    if banner is None:
        return True
    in_file = _at(image, banner, NAME_SIZE)
    for cpu in guest.cpus:
        if cpu.kernel_root:
            try:
                return cpu.read_as_kernel(banner, NAME_SIZE) == in_file
            except XenError:
                return False
    return True  # it is just being built


def _at(image: KernelImage, va: int, size: int) -> bytes:
    for segment in image.segments:
        if segment.vaddr <= va < segment.vaddr + len(segment.data):
            return bytes(segment.data[va - segment.vaddr : va - segment.vaddr + size])
    return b""
