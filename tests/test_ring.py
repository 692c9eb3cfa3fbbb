"""Shared rings: entries arrive in order, whatever pages they lie in, and nobody sleeps over one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.abi.io_ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, ring_size
from pvirq.drivers.ring import BackRing, FrontRing, RingPages
from pvirq.xen.memory import Machine

U32 = (1 << 32) - 1


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine(1 << 26)
    yield machine
    machine.close()


@pytest.mark.parametrize(
    ("entry", "pages", "entries"), [(112, 1, 32), (112, 2, 64), (112, 16, 512), (12, 1, 256), (8, 1, 256)]
)
def test_sizes(entry: int, pages: int, entries: int) -> None:
    assert ring_size(entry, pages * 4096) == entries


@pytest.mark.parametrize("order", [[0], [0, 1, 2, 3], [3, 1, 0, 2], [2, 0]])
@settings(max_examples=30, deadline=None)
@given(start=st.sampled_from([0, 1, U32 - 3, U32]), steps=st.lists(st.integers(0, 7), max_size=300))
def test_both_ends(machine: Machine, order: list[int], start: int, steps: list[int]) -> None:
    """Requests and answers at random; each end sleeps when its final check finds nothing, and is told of the next."""
    first = machine.alloc(4)
    pages = RingPages(machine, [first + i for i in order])
    front = FrontRing(pages, 112)
    for index, value in ((REQ_PROD, start), (RSP_PROD, start), (REQ_EVENT, start + 1), (RSP_EVENT, start + 1)):
        pages.words[index] = value & U32
    front.req_prod_pvt = front.rsp_cons = start
    back = BackRing(pages, 112)
    size, number, answered = front.size, 0, 0
    requests: deque[int] = deque()
    served: deque[int] = deque()
    answers: deque[int] = deque()
    back_sleeps = front_sleeps = True
    for step in steps:
        if step < 3:
            put = min(step * step + 1, front.free)
            for _ in range(put):
                front.put(number.to_bytes(8, "little") + bytes(96) + number.to_bytes(8, "big"))
                requests.append(number)
                number += 1
            if front.push_requests():
                back_sleeps = False
            assert not (put and back_sleeps)
        elif step < 5 and not back_sleeps:
            for i in range(back.unconsumed()):
                buffer, at = (back.request(), 0) if i & 1 else back.take()
                entry = bytes(buffer[at : at + 112])
                assert int.from_bytes(entry[:8], "little") == int.from_bytes(entry[104:], "big") == requests[0]
                served.append(requests.popleft())
                if step == 4:
                    break
            if step == 3:
                back_sleeps = not back.more_requests()
                assert back_sleeps == (not requests)
        elif step == 5:
            some = [served.popleft() for _ in range(min(len(served), 3))]
            if len(some) == 1:
                back.put(some[0].to_bytes(8, "little"))
            else:
                back.put_all([number.to_bytes(8, "little") for number in some])
            answers += some
            told = back.push_responses()
            if told:
                front_sleeps = False
            assert not (answers and front_sleeps)
        elif not front_sleeps:
            while front.rsp_cons != front.rsp_prod:
                assert not front.overflow(front.rsp_prod)
                assert int.from_bytes(front.response(8), "little") == answers.popleft()
                answered += 1
            front_sleeps = not front.more_responses()
        assert front.free == size - (number - answered)
        assert not back.overflow(back.req_prod)
    machine.free(first, 4)


def test_what_can_not_be(machine: Machine) -> None:
    pages = RingPages(machine, [machine.alloc(1)])
    front, back = FrontRing(pages, 112), BackRing(pages, 112)
    pages.words[REQ_PROD] = 33
    assert back.overflow(back.req_prod)
    assert back.unconsumed() == 32
    pages.words[REQ_PROD] = U32
    assert back.overflow(back.req_prod)
    pages.words[RSP_PROD] = 1
    assert front.overflow(front.rsp_prod)


def test_enough_requests_or_a_call(machine: Machine) -> None:
    pages = RingPages(machine, [machine.alloc(1)])
    front, back = FrontRing(pages, 8), BackRing(pages, 8)
    assert not back.has_requests(1)
    front.put(bytes(8))
    assert front.push_requests()
    assert back.has_requests(1)
    assert not back.has_requests(2)
    front.put(bytes(8))
    assert front.push_requests()
    assert back.has_requests(2)
    pages.words[REQ_PROD] = 300  # nonsense is no room
    assert not back.has_requests(2)
