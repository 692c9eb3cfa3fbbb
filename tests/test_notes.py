"""What an engine notes without Python (engine/notes.c): what it asks about, and in which order notes are."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pvirq.engine
from enginelib import CODE, DATA, DATA_PA, SYSCALL, TABLES_PA, Bench
from pvirq.engine import notes, protocol
from pvirq.engine.notes import FINISHED, NOTE_FORM, READ, Book, Calls, Site
from pvirq.engine.protocol import NOTED, RAX, RCX, RDI, RIP, RSI, Slot

HERE = Path(pvirq.engine.__file__).parent
NUMBERS = (7, 8)  # noted of a call and of its return

# A loop that calls the function at CODE + 0x40 RCX times, then SYSCALL; the function does nothing.
CALLS = b"\xe8\x3b\x00\x00\x00\x48\xff\xc9\x75\xf6" + SYSCALL
FUNCTION, BACK = CODE + 0x40, CODE + 5
RETURN = b"\xc3"


class Noted:
    """An engine with a function whose calls are noted once they are known, as `know` says."""

    def __init__(self, **entry: int) -> None:
        self.bench = Bench()
        self.events: list[object] = []
        self.values: list[int] = []
        self.emptied = bytearray()
        book = Book.of(self.events, self.values, self.empty)
        assert book is not None
        self.book: Book = book
        engine = self.bench.engine
        self.slot: Slot = engine.slot()
        engine.exchange(self.slot, self.bench)
        self.slot.items[protocol.KERNEL_ROOT] = TABLES_PA >> 12
        self.slot.items[protocol.WALK_ROOT] = TABLES_PA >> 3
        self.slot.items[protocol.INFO] = DATA_PA + 0x1800  # no event is due
        self.generation = ctypes.c_uint64(1)
        calls = engine.calls
        assert calls is not None
        self.calls: Calls = calls
        calls.begin(self.book, ctypes.addressof(self.generation), [self.slot])
        site = calls.entry(returns=True, **entry)
        assert site is not None
        self.site: Site = site
        self.bench.put(RETURN, FUNCTION)
        engine.watch(FUNCTION, self._called, site)
        engine.watch(BACK, self._returned, calls.back(BACK))

    def _called(self) -> None:
        self.events.append("called")
        self.calls.asked(1)
        self.calls.know(self.site, *(number + 1 for number in NUMBERS))

    def _returned(self) -> None:
        self.events.append("returned")
        self.calls.asked(0)

    def empty(self) -> None:
        self.emptied += self.book.take()

    def call(self, times: int, rdi: int = DATA, rsi: int = 0) -> list[object]:
        """What Python was told of while so many calls were made."""
        self.events.clear()
        self.bench.run(CALLS, rcx=times, rdi=rdi, rsi=rsi, rax=0)
        return list(self.events)

    def notes(self) -> list[tuple[int, ...]]:
        self.empty()
        taken, self.emptied = self.emptied, bytearray()
        return list(NOTE_FORM.iter_unpack(taken))


@pytest.fixture
def make() -> Iterator[Callable[..., Noted]]:
    made: list[Noted] = []

    def make(**entry: int) -> Noted:
        made.append(Noted(**entry))
        return made[-1]

    yield make
    for noted in made:
        noted.bench.close()


def test_the_first_call_is_asked_about_and_the_rest_noted(make: Callable[..., Noted]) -> None:
    noted = make()
    assert noted.call(4) == ["called", "returned"]
    found = noted.notes()
    assert [note[2] for note in found] == [*NUMBERS] * 3
    assert [note[:2] for note in found] == [(2, 0)] * 6  # behind what Python has put down
    ticks = [note[3] for note in found]
    assert ticks == sorted(set(ticks))
    assert not any(tick % 8 for tick in ticks)
    assert noted.bench.engine.counter() - ticks[-1] in range(8, 64)


def test_notes_stand_among_what_python_puts_down(make: Callable[..., Noted]) -> None:
    noted = make()
    noted.call(1)
    noted.notes()
    for number in range(3):
        noted.call(1)
        noted.events += range(number)
        noted.values += range(2 * number)
        noted.bench.regs[RIP] = CODE
        noted.bench.run(rcx=1)
    assert [note[:3] for note in noted.notes()] == [
        (0, 0, 7), (0, 0, 8), (0, 0, 7), (0, 0, 8),
        (0, 0, 7), (0, 0, 8), (1, 2, 7), (1, 2, 8),
        (0, 2, 7), (0, 2, 8), (2, 6, 7), (2, 6, 8),
    ]  # fmt: skip


def test_what_makes_it_ask_again(make: Callable[..., Noted]) -> None:
    """Other arguments, other bytes behind the first of them, another generation, or that it was told to."""
    noted = make(second=1, size=100)
    asked = ["called", "returned"]
    assert noted.call(2) == asked
    assert noted.call(2) == []
    assert noted.call(1, DATA + 8) == asked
    assert noted.call(1, DATA, 3) == asked
    assert noted.call(1, DATA, 5) == []  # the same bit
    noted.bench.memory[DATA_PA + 99] ^= 1
    assert noted.call(1) == asked
    assert noted.call(1) == []
    noted.bench.memory[DATA_PA + 100 + 8] ^= 1  # behind all that matters
    assert noted.call(1) == []
    noted.generation.value += 1
    assert noted.call(2) == asked
    noted.calls.forget()
    assert noted.call(2) == asked
    noted.notes()
    noted.calls.end()
    noted.call(2)
    assert noted.notes() == []


def test_bytes_on_two_pages(make: Callable[..., Noted]) -> None:
    noted = make(size=256)
    at = DATA + 0x1000 - 128
    assert noted.call(3, at) == ["called", "returned"]
    noted.bench.memory[DATA_PA + 0x1000] ^= 1
    assert noted.call(3, at) == ["called", "returned"]
    noted.notes()
    assert len(noted.call(3, 0x7000_0000_0000)) == 6  # nothing is mapped there
    assert noted.notes() == []
    assert noted.calls.entry(size=257) is None


def test_a_full_book_is_emptied(make: Callable[..., Noted]) -> None:
    noted = make()
    noted.book.items[notes.ROOM] = 5
    noted.call(20)
    assert len(noted.emptied) == 35 * NOTE_FORM.size
    assert [note[2] for note in noted.notes()] == [*NUMBERS] * 19


def test_what_emptying_raises_ends_the_run(make: Callable[..., Noted]) -> None:
    noted = make()
    noted.book.items[notes.ROOM] = 5

    def full() -> None:
        raise KeyboardInterrupt

    noted.book.full = full
    with pytest.raises(KeyboardInterrupt):
        noted.call(20)


def hypercall(noted: Noted, finish: Callable[[int], int], **registers: int) -> tuple[int, ...]:
    """The note of one."""
    noted.slot.items[protocol.SHORT_HYPERCALLS] = NOTED
    noted.calls.note_hypercalls(noted.slot, 5 + 1, 64, {4: 4})

    def syscall(rip: int) -> int:
        noted.bench.engine.stop()
        return finish(rip)

    noted.bench.on_syscall = syscall
    noted.bench.run(SYSCALL, **registers)
    [note] = noted.notes()
    return note


def test_a_hypercall_with_its_result(make: Callable[..., Noted]) -> None:
    noted = make()
    regs = noted.bench.regs
    noted.bench.memory[DATA_PA : DATA_PA + 4] = (77).to_bytes(4, "little")

    def finish(rip: int) -> int:
        regs[RAX], regs[RCX] = (1 << 64) - 22, rip
        return rip

    note = hypercall(noted, finish, rax=32, rdi=4, rsi=DATA, rdx=3, r10=4, r8=5, r9=6)
    assert (note[2], note[4], note[5:7], note[7] & 0xFFFFFFFF, note[11]) == (
        5, 32 | FINISHED | READ, (4, DATA), 77, (1 << 64) - 22,
    )  # fmt: skip
    assert (regs[RDI], regs[RSI]) == (4, DATA)
    note = hypercall(noted, finish, rax=29, rdi=4, rsi=DATA, rdx=3, r10=4, r8=5, r9=6)
    assert (note[4], note[5:11]) == (29 | FINISHED, (4, DATA, 3, 4, 5, 6))


def test_a_struct_that_cant_be_read(make: Callable[..., Noted]) -> None:
    def finish(rip: int) -> int:
        noted.bench.regs[RCX] = rip
        return rip

    noted = make()
    assert hypercall(noted, finish, rax=32, rdi=4, rsi=0x7000_0000_0000)[4] == 32 | FINISHED
    assert hypercall(noted, finish, rax=32, rdi=5, rsi=DATA)[4] == 32 | FINISHED  # of no interest
    assert hypercall(noted, finish, rax=32, rdi=1 << 31, rsi=DATA)[4] == 32 | FINISHED


def test_a_hypercall_without_a_result(make: Callable[..., Noted]) -> None:
    """It is to be made again; or Python has failed; or the notes were taken away meanwhile."""
    noted = make()

    def again(rip: int) -> int:
        noted.bench.regs[RCX] = rip - 2
        return rip - 2

    assert hypercall(noted, again, rax=29)[4] == 29

    def fail(rip: int) -> int:
        noted.bench.regs[RCX] = rip
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hypercall(noted, fail, rax=29)
    [note] = noted.notes()
    assert note[4] == 29

    def empty(rip: int) -> int:
        noted.bench.regs[RCX] = rip
        noted.empty()
        return rip

    assert hypercall(noted, empty, rax=29)[4] == 29


def test_the_length_of_a_list_is_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ctypes.c_ssize_t(0)
    monkeypatch.setattr(notes, "_length_of", lambda items: ctypes.addressof(elsewhere))
    assert Book.of([], [], lambda: None) is None


def fields(name: str) -> list[str]:
    """Of a struct in notes.c."""
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", (HERE / "notes.c").read_text(), re.M | re.S)
    assert body is not None
    text = re.sub(r"/\*.*?\*/|{.*?}", "", body[1], flags=re.S)
    return [
        function or plain for function, plain in re.findall(r"\(\*(\w+)\)\([^;]*\)|(\w+)(?:\[.*?\])*(?=[,;])", text)
    ]


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_both_sides_mean_the_same_fields(tmp_path: Path) -> None:
    items = {
        "book": ["USED", "ROOM", "TAKEN", "EVENTS_AT", "VALUES_AT", "NOTE"],
        "site": ["CPU", "ASK", "SITE_FIRST", "SITE_SECOND", "SIZE", "RETURNS"],
        "side": ["SIDE_VCPU", "HYPERCALLS", "UPCALLS", "DEPTH"],
        "calls": [
            "BOOK", "FULL", "GENERATION", "ASKED", "SIDES", "SIDE", "HYPERCALLS_THERE", "SIZES", "BACKS", "BACK",
            "KNOWN",
        ],
    }  # fmt: skip
    wanted = {
        f"{name}.{field}": getattr(notes, item) * 8
        for name, named in items.items()
        for field, item in zip(fields(name), named, strict=False)
    }
    assert [len(fields(name)) - len(named) for name, named in items.items()] == [0, 0, 1, 0]  # `open` is notes.c's own
    sizes = {
        "struct note": NOTE_FORM.size, "struct site": notes.SITE_ITEMS * 8, "struct side": notes.SIDE_ITEMS * 8,
        "struct calls": (notes.KNOWN + notes.KNOWN_ITEMS) * 8,
    }  # fmt: skip
    lines = [f'printf("{name} %zu\\n", offsetof(struct {name.replace(".", ", ")}));' for name in wanted]
    lines += [f'printf("{name.replace(" ", "_")} %zu\\n", sizeof({name}));' for name in sizes]
    source = tmp_path / "offsets.c"
    body = "\n".join(lines)
    source.write_text(
        f'#include "{HERE / "crossing.c"}"\nint printf(const char *, ...);\nint main(void) {{\n{body}\n}}\n'
    )
    subprocess.run(["gcc", str(source), "-o", str(tmp_path / "offsets")], check=True)
    out = subprocess.run([str(tmp_path / "offsets")], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in (line.split() for line in out.splitlines())}
    assert found == wanted | {name.replace(" ", "_"): size for name, size in sizes.items()}
    assert (notes.FINISHED, notes.READ, notes.SEEN, notes.OPERATIONS) == (1 << 32, 1 << 33, 256, 16)
