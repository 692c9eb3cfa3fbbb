"""Copies of a process, and of a host in it (pvirq.fork, Host.fork)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pvirq import Host
from pvirq.drivers.blockstore import SECTOR, MemoryStore
from pvirq.drivers.filestore import FileStore
from pvirq.fork import ForkError, ForkTimeout, fork


def test_the_result_comes_back() -> None:
    assert fork(lambda: [os.getpid(), b"x" * 5_000_000]).result(30) != [os.getpid(), b"x" * 5_000_000]


def test_what_it_changes_is_its_own() -> None:
    there: list[int] = []
    copies = [fork(lambda i=i: there.append(i) or there) for i in range(3)]  # type: ignore[misc,func-returns-value]
    assert [copy.result(30) for copy in copies] == [[0], [1], [2]]
    assert there == []


def test_what_it_raises_is_raised_here() -> None:
    def fail() -> None:
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck") as caught:
        fork(fail).result(30)
    assert "in fail" in str(caught.value.__cause__)


def test_a_result_that_cant_be_sent_says_so() -> None:
    with pytest.raises(ForkError, match="its result can't be sent"):
        fork(lambda: lambda: None).result(30)


def test_an_exception_that_cant_be_sent_says_what_it_was() -> None:
    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("from here")

    with pytest.raises(ForkError, match="Local: from here"):
        fork(fail).result(30)


def test_one_that_dies_says_how() -> None:
    with pytest.raises(ForkError, match="exit status 7"):
        fork(lambda: os._exit(7)).result(30)
    with pytest.raises(ForkError, match="signal 15"):
        fork(lambda: os.kill(os.getpid(), signal.SIGTERM)).result(30)


def test_one_that_takes_too_long_goes_on_until_it_is_killed() -> None:
    with fork(lambda: time.sleep(100)) as copy:
        with pytest.raises(ForkTimeout):
            copy.result(0.01)
        assert not copy.done()
        copy.kill()
        assert copy.done()
    with pytest.raises(ForkError, match="signal 9"):
        copy.result()


def test_the_caller_goes_on_once() -> None:
    """A copy never returns from `fork`, whatever its function does."""

    def leave() -> None:
        raise SystemExit(3)

    before = os.getpid()
    with pytest.raises(SystemExit):
        fork(leave).result(30)
    assert os.getpid() == before


def test_prepare_comes_first_and_its_failure_counts() -> None:
    order: list[str] = []
    assert fork(lambda: order, lambda: order.append("prepared")).result(30) == ["prepared"]
    with pytest.raises(ZeroDivisionError):
        fork(lambda: 1, lambda: 1 // 0).result(30)


# -- hosts -------------------------------------------------------------------------------------------------------------


def test_futures_of_a_host_dont_see_each_other() -> None:
    with Host(seed=1) as host:
        guest = host.model("pvops")
        host.settle()

        def timer_after(host: Host, ns: int) -> tuple[int, str]:
            fired: list[int] = []
            kernel = host.modelled[0].kernel
            kernel.set_timer(host.clock.now() + ns, lambda: fired.append(host.clock.now()))
            host.run(lambda: bool(fired))
            return fired[0], kernel.proc_interrupts()

        now, before = host.clock.now(), guest.proc_interrupts()
        futures = [host.fork(lambda host, ns=ns: timer_after(host, ns)) for ns in (10_000, 20_000, 10_000)]  # type: ignore[misc]
        a, b, c = (future.result(30) for future in futures)
        assert (host.clock.now(), guest.proc_interrupts()) == (now, before)
        assert a == c == timer_after(host, 10_000)
        assert b[0] - a[0] == 10_000


def test_a_future_can_have_a_seed_of_its_own() -> None:
    with Host(seed=1) as host:
        seeds = [host.fork(lambda host: repr(host.schedule), seed=seed).result(30) for seed in (None, 7)]
        assert seeds == ["<schedule seed 1>", "<schedule seed 7>"]
    with Host() as host, pytest.raises(ValueError, match="only a host with a seed"):
        host.fork(lambda host: None, seed=7)


def test_what_a_future_writes_to_a_disk_stays_in_it(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"original" * (8 * SECTOR // 8))
    with Host() as host:
        guest = host.model("pvops")
        memory = MemoryStore(8, b"original" * (8 * SECTOR // 8))
        host.attach_disk(guest, "xvda", image)
        host.attach_disk(guest, "xvdb", memory)
        for settled in (False, True):  # also before domain 0 has made the image a device
            if settled:
                host.settle()

            def write(host: Host) -> list[bytes]:
                stores = host.backends.stores()
                for store in stores:
                    assert isinstance(store, (FileStore, MemoryStore))
                    assert store.writev(1, [memoryview(b"changed!" * (SECTOR // 8))]) is None
                    store.flush(lambda _data, error: None)
                    store.discard(2, 1, lambda _data, error: None)
                return [store.read(0, 4)[SECTOR - 8 : 2 * SECTOR + 8] for store in stores]  # type: ignore[attr-defined]

            whole = b"original" + b"changed!" * (SECTOR // 8) + bytes(8)
            assert host.fork(write).result(30) == [whole, whole]
            assert image.read_bytes() == memory.read(0, 8) == b"original" * (8 * SECTOR // 8)


def test_what_comes_from_outside_cant_be_copied() -> None:
    class Outsider:
        awaited = False

        def fileno(self) -> int:
            return 0

        def due_ns(self) -> int | None:
            return None

        def poll(self, *, ready: bool) -> None:
            pass

        def close(self) -> None:
            pass

    with Host() as host:
        host.outside.add(Outsider())
        with pytest.raises(ForkError, match="outside"):
            host.fork(lambda host: None)
