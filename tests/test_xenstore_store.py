"""The store through its Python interface: operations, permissions, quotas, transactions, watches, domains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.xenstore import Client, DomainState, Operations, Perm, Quotas, WatchHandle, Xenstored
from pvirq.drivers.xenstore.node import XS_PERM_IGNORE, atoi, is_valid_nodename

PAGE = 4096


def daemon_with(*domids: int, quotas: Quotas | None = None) -> Xenstored:
    daemon = Xenstored(quotas=quotas)
    for domid in domids:
        daemon.introduce(domid, memoryview(bytearray(PAGE)), lambda: None)
    return daemon


def fails(errno: Errno, operation: Callable[..., object], *args: object) -> None:
    with pytest.raises(XenError) as caught:
        operation(*args)
    assert caught.value.errno is errno


class Events(list[tuple[str, str]]):
    """Watch events as they come."""

    def watch(self, client: Client, path: str, token: str = "t") -> WatchHandle:
        return client.watch(path, token, lambda path, token: self.append((path, token)))

    def take(self) -> list[str]:
        paths = [path for path, _ in self]
        self.clear()
        return paths


def guest_home(daemon: Xenstored, domid: int) -> Client:
    """A domain's directory as libxl makes it: readable for the guest, with a data node of its own."""
    tool, home = daemon.client(), f"/local/domain/{domid}"
    tool.mkdir(home)
    tool.set_perms(home, ["n0", f"r{domid}"])
    tool.mkdir(f"{home}/data")
    tool.set_perms(f"{home}/data", [f"n{domid}"])
    return daemon.client(domid)


def test_initial_tree_and_order_of_children() -> None:
    client = daemon_with().client()
    for name in ("z", "a", "m"):
        client.write(f"/x/{name}", name)
    assert client.ls("/") == ["tool", "x"]
    assert client.ls("/x") == ["z", "a", "m"]
    client.rm("/x/a")
    client.write("/x/a", "")
    assert client.ls("/x") == ["z", "m", "a"]
    assert list(client.dump()) == [
        '/tool = ""', '/tool/xenstored = ""', '/x = ""', '/x/z = "z"', '/x/m = "m"', '/x/a = ""',
    ]  # fmt: skip


def test_dump_escapes_as_xenstore_ls() -> None:
    client = daemon_with().client()
    client.write("/v", b'a"\\\t\n\r\x00\x07\x08\x7f\xff')
    assert list(client.dump())[-1] == '/v = "a"\\\\\\t\\n\\r\\000\\007\\x08\\x7f\\xff"'


def test_read_write_rm() -> None:
    client = daemon_with().client()
    fails(Errno.ENOENT, client.read, "/a")
    client.write("/a/b/c", 5)
    assert client.read("/a/b/c") == b"5"
    assert client.read("/a/b") == b""
    assert client.read_text("/none", "x") == "x"
    client.mkdir("/a/b/c")
    assert client.read("/a/b/c") == b"5"
    assert client.exists("/a/b")
    client.rm("/a/b")
    assert not client.exists("/a/b/c")
    client.rm("/a/b")  # its parent exists
    fails(Errno.ENOENT, client.rm, "/nope/b")
    fails(Errno.EINVAL, client.rm, "/")
    fails(Errno.E2BIG, client.write, "/a", bytes(4095))


@pytest.mark.parametrize("path", ["", "/a/", "//", "/a//b", "/a b", "/a.b", "/\xe9", "/a\n", "@releaseDomain", "/" * 9])
def test_bad_paths(path: str) -> None:
    client = daemon_with().client()
    fails(Errno.EINVAL, client.read, path)
    fails(Errno.EINVAL, client.write, path, b"")


def test_path_lengths() -> None:
    assert is_valid_nodename("/" + 2047 * "a")
    assert not is_valid_nodename("/" + 2048 * "a")
    assert is_valid_nodename("/local/domain/7/" + 2048 * "a")
    assert not is_valid_nodename("/local/domain/7/" + 2049 * "a")
    assert not is_valid_nodename("/local/domain/123456/" + 2040 * "a")  # %5u takes five digits, no more
    assert is_valid_nodename("/@-_aZ09")


def test_relative_paths_start_at_the_domain() -> None:
    daemon = daemon_with(3)
    guest = guest_home(daemon, 3)
    guest.write("data/x", "1")
    assert daemon.client().read("/local/domain/3/data/x") == b"1"
    daemon.client().write("name", "Domain-0")
    assert daemon.client().read("/local/domain/0/name") == b"Domain-0"


def test_permissions() -> None:
    daemon = daemon_with(3, 4)
    tool, guest, other = daemon.client(), guest_home(daemon, 3), guest_home(daemon, 4)
    guest.write("data/x", "1")
    assert guest.get_perms("data/x") == [Perm(3, 0)]
    fails(Errno.EACCES, other.read, "/local/domain/3/data/x")
    fails(Errno.EACCES, other.read, "/local/domain/3/data/absent")  # may not even know
    fails(Errno.ENOENT, guest.read, "/local/domain/3/data/absent")
    fails(Errno.EACCES, guest.write, "name", b"x")
    fails(Errno.ENOENT, guest.read, "name")
    guest.set_perms("data/x", ["n3", "r4"])
    assert other.read("/local/domain/3/data/x") == b"1"
    fails(Errno.EACCES, other.write, "/local/domain/3/data/x", b"2")
    guest.set_perms("data/x", ["n3", "b4"])
    other.write("/local/domain/3/data/x", b"2")
    other.write("/local/domain/3/data/x/y", b"")
    assert tool.get_perms("/local/domain/3/data/x/y") == [
        Perm(4, 0),
        Perm(4, 3),
    ]  # the maker owns, the rest is inherited
    fails(Errno.EPERM, guest.set_perms, "data/x", ["n4"])
    fails(Errno.EACCES, other.set_perms, "/local/domain/3/data/x", ["n4"])
    fails(Errno.ENOSPC, guest.set_perms, "data/x", ["n3", "r0", "r1", "r2", "r4", "r5"])
    fails(Errno.EINVAL, guest.set_perms, "data/x", ["x3"])
    tool.set_perms("/local/domain/3/data/x", ["r0"])
    assert other.read("/local/domain/3/data/x") == b"2"
    assert daemon.store.check() == []


@pytest.mark.parametrize(
    ("text", "perm"),
    [
        ("r0x10", Perm(16, 1)),
        ("w 7", Perm(7, 2)),
        ("b010", Perm(8, 3)),
        ("n-1", Perm(0xFFFFFFFF, 0)),
        ("r0", Perm(0, 1)),
    ],
)
def test_permission_numbers_are_strtols(text: str, perm: Perm) -> None:
    assert Perm.parse(text) == perm


def test_bad_permissions() -> None:
    for text in ("", "r", "r5x", "r 5 ", "R5", "r08", "r+", "r0x", "5", "rr5"):
        fails(Errno.EINVAL, Perm.parse, text)
    assert str(Perm(0xFFFFFFFF, XS_PERM_IGNORE | 1)) == "r-1"
    assert [atoi(text) for text in (b"12x", b" -3", b"x", b"", b"4294967297", b"9" * 5000)] == [
        12,
        -3,
        0,
        0,
        1,
        -1,
    ]


def test_permissions_of_a_gone_domain_are_void() -> None:
    daemon = daemon_with(3, 4)
    tool = daemon.client()
    tool.write("/x", "1")
    tool.set_perms("/x", ["n0", "r3", "r4"])
    assert daemon.client(3).read("/x") == b"1"
    tool.write("/y", "1")  # age is counted in writes, so there must be one in between
    daemon.release(3)
    daemon.introduce(3, memoryview(bytearray(PAGE)), lambda: None)
    fails(Errno.EACCES, daemon.client(3).read, "/x")
    assert daemon.client(4).read("/x") == b"1"


def test_perms_for_unknown_domains() -> None:
    alive = {0, 3}
    daemon = Xenstored(lambda domid: DomainState.ALIVE if domid in alive else DomainState.ABSENT)
    tool = daemon.client()
    tool.write("/x", "1")
    fails(Errno.ENOENT, tool.set_perms, "/x", ["n9"])
    tool.set_perms("/x", ["n0", "r9"])
    assert tool.get_perms("/x") == [Perm(0, 0), Perm(9, 1 | XS_PERM_IGNORE)]
    tool.set_perms("/x", ["n3"])  # known to Xen, not introduced yet
    assert daemon.store.domains[3].entries == 1
    assert not daemon.is_introduced(3)


def test_quotas() -> None:
    daemon = daemon_with(3)
    guest, tool = guest_home(daemon, 3), daemon.client()
    fails(Errno.ENOSPC, guest.write, "data/big", bytes(2048 - 24 - 8))
    guest.write("data/big", bytes(2048 - 24 - 8 - 1))
    tool.write("/local/domain/3/data/bigger", bytes(4000))
    left = 1000 - daemon.store.domains[3].entries
    for i in range(left):
        guest.mkdir(f"data/{i % 30}/{i}" if i else "data/0")
        if daemon.store.domains[3].entries == 1000:
            break
    fails(Errno.ENOSPC, guest.mkdir, "data/one-more")
    fails(Errno.ENOSPC, guest.mkdir, "data/a/b/c")
    assert daemon.store.domains[3].entries == 1000
    guest.write("data/big", "still writable")
    assert daemon.store.check() == []
    events = Events()
    for i in range(129):  # the check is > 128
        events.watch(guest, "data", str(i))
    fails(Errno.E2BIG, events.watch, guest, "data", "x")
    for _ in range(11):
        guest.transaction()
    fails(Errno.ENOSPC, guest.transaction)


def test_failed_creation_leaves_nothing() -> None:
    daemon = daemon_with(3, quotas=Quotas(nodes=5))
    guest = guest_home(daemon, 3)  # owns one node
    before = dict(daemon.store.nodes)
    fails(Errno.ENOSPC, guest.mkdir, "data/a/b/c/d/e")
    assert daemon.store.nodes == before
    guest.mkdir("data/a/b/c/d")
    with guest.transaction() as transaction:
        fails(Errno.ENOSPC, transaction.mkdir, "data/f")
        transaction.abort()
    assert daemon.store.check() == []


def test_memory_is_accounted_and_given_back() -> None:
    daemon = daemon_with(3)
    guest = guest_home(daemon, 3)
    account = daemon.store.domains[3]
    before = account.memory
    with guest.transaction() as transaction:
        transaction.write("data/x", bytes(100))
        assert account.memory > before
    guest.write("data/x", bytes(50))
    handle = Events().watch(guest, "data/x")
    guest.transaction().abort()
    handle.close()
    assert account.memory == before + 24 + 8 + 50 + len("/local/domain/3/data/x") + len("x\0")
    guest.rm("data/x")
    assert account.memory == before


def test_transaction_isolation_and_commit() -> None:
    daemon = daemon_with()
    one, two = daemon.client(), daemon.client()
    one.write("/a", "old")
    transaction = one.transaction()
    transaction.write("/a", "new")
    transaction.write("/b/c", "made")
    assert transaction.read("/a") == b"new"
    assert transaction.ls("/b") == ["c"]
    assert two.read("/a") == one.read("/a") == b"old"
    assert not two.exists("/b")
    transaction.commit()
    assert two.read("/a") == b"new"
    assert two.read("/b/c") == b"made"
    fails(Errno.ENOENT, transaction.read, "/a")

    def leave_early() -> None:
        with one.transaction() as transaction:
            transaction.write("/a", "never")
            raise ValueError("out")

    with pytest.raises(ValueError, match="out"):
        leave_early()
    assert one.read("/a") == b"new"
    assert daemon.store.check() == []


def test_transaction_conflicts() -> None:
    daemon = daemon_with()
    one, two = daemon.client(), daemon.client()
    disturbances: tuple[Callable[[], None], ...] = (
        lambda: two.write("/a/x", "2"),  # read
        lambda: two.rm("/a/x"),
        lambda: two.set_perms("/a/x", ["r0"]),
        lambda: two.mkdir("/a/new"),  # its parent was read
        lambda: two.write("/b", "2"),  # written by both
    )
    for disturb in disturbances:
        one.write("/a/x", "1")
        one.write("/b", "1")
        transaction = one.transaction()
        transaction.read("/a/x")
        transaction.ls("/a")
        transaction.write("/b", "t")
        disturb()
        fails(Errno.EAGAIN, transaction.commit)
        assert one.read("/b") != b"t"
        one.rm("/a/new")
    # Absence is something read, too; what was not looked at does not matter.
    transaction = one.transaction()
    assert not transaction.exists("/c")
    two.write("/elsewhere", "1")
    two.write("/elsewhere", "2")
    with pytest.raises(XenError):  # "/" was read to say ENOENT, and has a new child
        transaction.commit()
    transaction = one.transaction()
    transaction.write("/b", "t")
    two.write("/elsewhere", "3")
    transaction.commit()
    assert two.read("/b") == b"t"
    assert daemon.store.check() == []


def test_transact_tries_again() -> None:
    daemon = daemon_with()
    one, two = daemon.client(), daemon.client()
    one.write("/n", 0)
    tries: list[int] = []

    def increment(t: Operations) -> int:
        value = int(t.read("/n")) + 1
        if not tries:
            two.write("/n", 10)
        tries.append(value)
        t.write("/n", value)
        return value

    assert one.transact(increment) == 11
    assert tries == [1, 11]


def test_create_and_delete_in_one_transaction() -> None:
    daemon = daemon_with()
    client, events = daemon.client(), Events()
    events.watch(client, "/a")
    events.take()
    client.write("/keep/x", "1")
    with client.transaction() as transaction:
        transaction.write("/a/b", "1")
        transaction.rm("/a")
        transaction.rm("/keep")
    assert not client.exists("/a")
    assert not client.exists("/keep")
    assert events.take() == []  # never was there
    assert daemon.store.check() == []


def test_watch_events() -> None:
    client, events = daemon_with().client(), Events()
    events.watch(client, "/a")
    assert events.take() == ["/a"]
    client.write("/a/b", "1")
    client.mkdir("/a/b")  # no change
    client.mkdir("/a/c")
    client.set_perms("/a/b", ["r0"])
    client.write("/ab", "not below")
    assert events.take() == ["/a/b", "/a/c", "/a/b"]
    client.rm("/a/nothing")
    assert events.take() == []
    client.rm("/a")
    assert events.take() == ["/a"]  # one event for the top
    fails(Errno.EEXIST, events.watch, client, "/a")
    fails(Errno.EINVAL, events.watch, client, "/a/")


def test_rm_fires_for_those_below_and_above() -> None:
    client, above, exact, below = daemon_with().client(), Events(), Events(), Events()
    client.write("/a/b/c/d", "1")
    above.watch(client, "/a")
    exact.watch(client, "/a/b")
    below.watch(client, "/a/b/c/d")
    for events in (above, exact, below):
        events.clear()
    client.rm("/a/b")
    assert (above.take(), exact.take(), below.take()) == (["/a/b"], ["/a/b"], ["/a/b/c/d"])


def test_watch_order_relative_paths_and_removal() -> None:
    daemon = daemon_with(3)
    guest, events = guest_home(daemon, 3), Events()
    first = events.watch(guest, "data", "first")
    events.watch(guest, "/local/domain/3/data", "second")
    assert events == [("data", "first"), ("/local/domain/3/data", "second")]
    events.clear()
    daemon.client().write("/local/domain/3/data/x", "1")
    assert events == [("data/x", "first"), ("/local/domain/3/data/x", "second")]
    first.close()
    first.close()
    events.clear()
    daemon.client().write("/local/domain/3/data/x", "1")
    assert events == [("/local/domain/3/data/x", "second")]


def test_guests_get_events_only_for_what_they_may_read() -> None:
    daemon = daemon_with(3)
    tool, guest, events = daemon.client(), guest_home(daemon, 3), Events()
    events.watch(guest, "/")
    events.take()
    tool.write("/secret", "1")
    assert events.take() == []
    tool.write("/local/domain/3/name", "x")  # the parent is readable, and so is what inherits from it
    assert events.take() == ["/local/domain/3/name"]
    tool.set_perms("/secret", ["n0", "r3"])
    tool.set_perms("/secret", ["n0"])  # loses the right, and learns that
    tool.set_perms("/secret", ["n0"])
    assert events.take() == ["/secret", "/secret"]


def test_transaction_fires_at_commit() -> None:
    daemon = daemon_with()
    one, two, events = daemon.client(), daemon.client(), Events()
    one.write("/a/b/c", "1")
    events.watch(two, "/a")
    events.take()
    with one.transaction() as transaction:
        transaction.write("/a/x", "1")
        transaction.write("/a/x", "2")
        transaction.rm("/a/b")
        assert events == []
    assert events.take() == ["/a/x", "/a/b"]
    transaction = one.transaction()
    transaction.write("/a/x", "3")
    transaction.abort()
    assert events.take() == []


def test_callbacks_run_one_after_the_other() -> None:
    client = daemon_with().client()
    log: list[str] = []

    def chain(path: str, token: str) -> None:
        log.append(f"in {path}")
        if path == "/a":
            client.write("/a/1", "")
            client.write("/a/2", "")
        log.append(f"out {path}")

    client.watch("/a", "t", chain)
    assert log == ["in /a", "out /a", "in /a/1", "out /a/1", "in /a/2", "out /a/2"]


def test_special_watches() -> None:
    daemon = daemon_with(3)
    tool, guest = daemon.client(), daemon.client(3)
    tools, guests = Events(), Events()
    for name in ("@introduceDomain", "@releaseDomain", "@unheardOf"):
        tools.watch(tool, name)
        guests.watch(guest, name)
    assert tools.take() == guests.take() == ["@introduceDomain", "@releaseDomain", "@unheardOf"]
    daemon.introduce(4, memoryview(bytearray(PAGE)), lambda: None)
    daemon.introduce(4, memoryview(bytearray(PAGE)), lambda: None)  # a second time is no event
    assert (tools.take(), guests.take()) == (["@introduceDomain"], [])
    fails(Errno.EACCES, guest.set_perms, "@releaseDomain", ["n0", "r3"])
    fails(Errno.EINVAL, tool.set_perms, "@unheardOf", ["n0"])
    tool.set_perms("@releaseDomain", ["n0", "r3"])
    daemon.release(4)
    assert (tools.take(), guests.take()) == (["@releaseDomain"], ["@releaseDomain"])
    daemon.release(3)
    assert daemon.store.special_perms["@releaseDomain"] == (Perm(0, 0),)
    fails(Errno.ENOENT, daemon.release, 3)
    fails(Errno.EINVAL, daemon.release, 0)
    fails(Errno.ENOTCONN, guest.read, "/")


def test_release_removes_what_the_domain_owns() -> None:
    daemon = daemon_with(3, 4)
    guest, tool, events = guest_home(daemon, 3), daemon.client(), Events()
    guest.write("data/x/y", "1")
    tool.write("/local/domain/3/data/x/by-dom0", "1")
    tool.set_perms("/local/domain/3/data/x/by-dom0", ["n4"])
    Events().watch(guest, "data")
    guest.transaction().write("data/z", "")
    events.watch(tool, "/local/domain/3")
    events.take()
    daemon.release(3)
    assert list(tool.dump("/local/domain/3")) == []
    assert events.take() == ["/local/domain/3/data"]
    assert daemon.store.domains[4].entries == 0
    assert daemon.store.check() == []


def test_check_domains() -> None:
    states = dict.fromkeys((0, 3, 4, 5), DomainState.ALIVE)
    daemon = Xenstored(lambda domid: states.get(domid, DomainState.ABSENT))
    for domid in (3, 4):
        daemon.introduce(domid, memoryview(bytearray(PAGE)), lambda: None)
    tool, events = daemon.client(), Events()
    tool.write("/x", "")
    tool.set_perms("/x", ["n0", "r5"])
    events.watch(tool, "@releaseDomain")
    events.take()
    daemon.check_domains()
    assert events.take() == []
    states[3] = DomainState.SHUTDOWN
    daemon.check_domains()
    daemon.check_domains()
    assert events.take() == ["@releaseDomain"]
    daemon.resume(3)
    daemon.check_domains()
    assert events.take() == ["@releaseDomain"]
    states[3] = DomainState.DYING
    del states[4], states[5]
    daemon.check_domains()
    assert events.take() == ["@releaseDomain", "@releaseDomain"]
    assert list(daemon.store.domains) == [0]


def test_target() -> None:
    daemon = daemon_with(3, 4)
    guest, device_model = guest_home(daemon, 3), daemon.client(4)
    guest.write("data/x", "1")
    fails(Errno.EACCES, device_model.read, "/local/domain/3/data/x")
    daemon.set_target(4, 3)
    assert device_model.read("/local/domain/3/data/x") == b"1"
    fails(Errno.ENOENT, daemon.set_target, 4, 9)


def test_deep_trees() -> None:
    client = daemon_with().client()
    path = "/a" * 1024
    client.write(path, "deep")
    assert len(list(client.dump("/a"))) == 1023
    client.rm("/a")
    assert client.ls("/") == ["tool"]


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: "/t/" + "/".join(names))
STEPS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.binary(max_size=4)),
    st.tuples(st.sampled_from(["mkdir", "rm", "read", "ls"]), PATHS),
    st.tuples(st.sampled_from(["begin", "commit", "abort"])),
)


class Model(dict[str, bytes]):
    """The tree as a plain dict; insertion order is the order of children."""

    def write(self, path: str, value: bytes) -> None:
        parts = path.split("/")
        for i in range(2, len(parts)):
            self.setdefault("/".join(parts[:i]), b"")
        self[path] = value

    def ls(self, path: str) -> list[str]:
        return [other[len(path) + 1 :] for other in self if other.rpartition("/")[0] == path]

    def rm(self, path: str) -> None:
        for other in [other for other in self if other == path or other.startswith(path + "/")]:
            del self[other]


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_agrees_with_a_dict(steps: list[tuple[str, ...]]) -> None:
    daemon = daemon_with()
    client = daemon.client()
    client.mkdir("/t")
    model, outer, transaction = Model({"/t": b""}), Model(), None
    for kind, *args in steps:
        use = transaction or client
        if kind == "begin" and transaction is None:
            transaction, outer = client.transaction(), Model(model)
        elif kind in ("commit", "abort"):
            if transaction is not None:
                (transaction.commit if kind == "commit" else transaction.abort)()
                model = model if kind == "commit" else outer
                transaction = None
        elif kind == "write":
            use.write(args[0], args[1])
            model.write(args[0], args[1])  # type: ignore[arg-type]
        elif kind == "mkdir":
            use.mkdir(args[0])
            if args[0] not in model:
                model.write(args[0], b"")
        elif kind == "rm":
            if args[0].rpartition("/")[0] in model:
                use.rm(args[0])
                model.rm(args[0])
            else:
                fails(Errno.ENOENT, use.rm, args[0])
        elif kind in ("read", "ls"):
            expected = model.get(args[0]) if kind == "read" else model.ls(args[0])
            if args[0] in model:
                assert getattr(use, kind)(args[0]) == expected
            else:
                fails(Errno.ENOENT, getattr(use, kind), args[0])
    if transaction is not None:
        transaction.commit()
    assert {path: client.read(path) for path in model} == model
    assert all(client.ls(path) == model.ls(path) for path in model)
    assert daemon.store.check() == []
    assert len(daemon.store.nodes) == len(model) + 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), STEPS), max_size=40))
def test_committed_transactions_are_serial(steps: list[tuple[int, tuple[str, ...]]]) -> None:
    """Several transactions at once: each that commits has the effect it would have had all at its end."""
    daemon = daemon_with()
    client = daemon.client()
    client.mkdir("/t")
    serial = daemon_with().client()
    serial.mkdir("/t")
    open_transactions: dict[int, tuple[object, list[tuple[str, ...]]]] = {}
    for who, step in steps:
        kind, *args = step
        if kind in ("commit", "abort", "begin"):
            transaction, done = open_transactions.pop(who, (None, []))
            if transaction is None:
                open_transactions[who] = (client.transaction(), [])
                continue
            try:
                getattr(transaction, "commit" if kind != "abort" else "abort")()
            except XenError as error:
                if error.errno is not Errno.EAGAIN:
                    raise
                continue
            if kind != "abort":
                for again, *its_args in done:
                    getattr(serial, again)(*its_args)
        else:
            use, done = open_transactions.get(who, (client, []))
            try:
                getattr(use, kind)(*args)
            except XenError as error:
                if error.errno is not Errno.ENOENT:
                    raise
                continue
            if use is client:
                getattr(serial, kind)(*args)
            else:
                done.append(step)
    assert sorted(client.dump("/t")) == sorted(serial.dump("/t"))
    assert daemon.store.check() == []
