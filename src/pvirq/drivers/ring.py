"""The two ends of a shared ring: the macros of xen/include/public/io/ring.h.

Indexes run free in 32 bits. What the other end writes is read anew each time and trusted for nothing but how much
there may be to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from pvirq.abi.io_ring import REQ_EVENT, REQ_PROD, RING_HEADER, RSP_EVENT, RSP_PROD, ring_size
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.memory import Machine

U32: Final = 0xFFFFFFFF


class RingPages:
    """The pages of a ring as one range of bytes, wherever in machine memory they are."""

    def __init__(self, machine: Machine, mfns: Sequence[int]) -> None:
        self.size = len(mfns) * PAGE_SIZE
        first = mfns[0]
        self.words = machine.page(first)[:16].cast("I")
        self._pages = [machine.page(mfn) for mfn in mfns]
        self.whole: memoryview | None = None  # all of it, where the pages lie one behind the other
        if list(mfns) == list(range(first, first + len(mfns))):
            self.whole = machine.mem[first << PAGE_SHIFT : (first + len(mfns)) << PAGE_SHIFT]

    def read(self, at: int, size: int) -> bytes:
        """A copy of some bytes: what is decided on can't change any more."""
        if self.whole is not None:
            return bytes(self.whole[at : at + size])
        page, start = at // PAGE_SIZE, at % PAGE_SIZE
        data = bytes(self._pages[page][start : start + size])
        return data if len(data) == size else data + bytes(self._pages[page + 1][: size - len(data)])

    def write(self, at: int, data: bytes) -> None:
        if self.whole is not None:
            self.whole[at : at + len(data)] = data
            return
        page, start = at // PAGE_SIZE, at % PAGE_SIZE
        here = min(PAGE_SIZE - start, len(data))
        self._pages[page][start : start + here] = data[:here]
        if here < len(data):
            self._pages[page + 1][: len(data) - here] = data[here:]


class FrontRing:
    """A frontend's end: makes requests, takes responses."""

    def __init__(self, pages: RingPages, entry_size: int) -> None:
        """A new ring, both events at 1, so that the first of each is notified (SHARED_RING_INIT, FRONT_RING_INIT)."""
        self.entry_size = entry_size
        self.size = ring_size(entry_size, pages.size)
        self.req_prod_pvt = 0
        self.rsp_cons = 0
        self._pages = pages
        self._words = pages.words
        for index, value in ((REQ_PROD, 0), (REQ_EVENT, 1), (RSP_PROD, 0), (RSP_EVENT, 1)):
            self._words[index] = value

    @property
    def free(self) -> int:
        """How many requests there is room for (RING_FREE_REQUESTS)."""
        return self.size - (self.req_prod_pvt - self.rsp_cons & U32)

    def put(self, request: bytes) -> None:
        """Write the next request; unseen until `push_requests`."""
        at = RING_HEADER + (self.req_prod_pvt & self.size - 1) * self.entry_size
        self._pages.write(at, request)
        self.req_prod_pvt = self.req_prod_pvt + 1 & U32

    def push_requests(self) -> bool:
        """Show the requests; True: the backend wants to be told (RING_PUSH_REQUESTS_AND_CHECK_NOTIFY)."""
        words, new = self._words, self.req_prod_pvt
        old = words[REQ_PROD]
        words[REQ_PROD] = new
        return (new - words[REQ_EVENT] & U32) < (new - old & U32)

    @property
    def rsp_prod(self) -> int:
        return self._words[RSP_PROD]

    def overflow(self, rsp_prod: int) -> bool:
        """The backend claims more responses than there were requests (RING_RESPONSE_PROD_OVERFLOW)."""
        return (rsp_prod - self.rsp_cons & U32) > (self.req_prod_pvt - self.rsp_cons & U32)

    def response(self, size: int) -> bytes:
        """The first `size` bytes of the next response, which is taken with that."""
        at = RING_HEADER + (self.rsp_cons & self.size - 1) * self.entry_size
        self.rsp_cons = self.rsp_cons + 1 & U32
        return self._pages.read(at, size)

    def more_responses(self) -> bool:
        """Nothing more now? Then the next one is to be notified (RING_FINAL_CHECK_FOR_RESPONSES)."""
        words = self._words
        if words[RSP_PROD] != self.rsp_cons:
            return True
        words[RSP_EVENT] = self.rsp_cons + 1 & U32
        return words[RSP_PROD] != self.rsp_cons


class BackRing:
    """A backend's end: takes requests, makes responses.

    `put`, `put_all` and `push_responses` are `do_put` and so on, unless something has been put in front of them
    (`pvirq.xen.probes.put`).
    """

    def __init__(self, pages: RingPages, entry_size: int) -> None:
        """Go on where the frontend's ring stands (BACK_RING_ATTACH at rsp_prod)."""
        self.put: Callable[[bytes], None] = self.do_put
        self.put_all: Callable[[Sequence[bytes]], None] = self.do_put_all
        self.push_responses: Callable[[], bool] = self.do_push_responses
        self.entry_size = entry_size
        self.size = ring_size(entry_size, pages.size)
        self._pages = pages
        self._whole = pages.whole
        self._words = pages.words
        self.rsp_prod_pvt = self.req_cons = self._words[RSP_PROD]

    @property
    def req_prod(self) -> int:
        return self._words[REQ_PROD]

    def overflow(self, req_prod: int) -> bool:
        """The frontend claims more requests than the ring holds (RING_REQUEST_PROD_OVERFLOW)."""
        return (req_prod - self.rsp_prod_pvt & U32) > self.size

    def unconsumed(self) -> int:
        """How many requests wait, at most as many as there is room to answer (RING_HAS_UNCONSUMED_REQUESTS)."""
        waiting = self._words[REQ_PROD] - self.req_cons & U32
        return min(waiting, self.size - (self.req_cons - self.rsp_prod_pvt & U32))

    def request(self) -> bytes:
        """The next request, copied, which is taken with that."""
        at = RING_HEADER + (self.req_cons & self.size - 1) * self.entry_size
        self.req_cons = self.req_cons + 1 & U32
        return self._pages.read(at, self.entry_size)

    def take(self) -> tuple[memoryview | bytes, int]:
        """The next request, in place where it can be: what it is in, and where. It is taken with that.

        Its bytes stay what they are until the frontend runs: so long they need no copy.
        """
        at = RING_HEADER + (self.req_cons & self.size - 1) * self.entry_size
        self.req_cons = self.req_cons + 1 & U32
        whole = self._whole
        return (whole, at) if whole is not None else (self._pages.read(at, self.entry_size), 0)

    def more_requests(self) -> bool:
        """Nothing more now? Then the next one is to be notified (RING_FINAL_CHECK_FOR_REQUESTS)."""
        if self._words[REQ_PROD] != self.req_cons and self.unconsumed():
            return True
        # The macro looks once more, for what came in between. Here no frontend has run meanwhile.
        self._words[REQ_EVENT] = self.req_cons + 1 & U32
        return False

    def has_requests(self, count: int) -> bool:
        """Are there so many? If not, the next one is to be notified (xenvif_rx_ring_slots_available)."""
        words = self._words
        while True:
            prod = words[REQ_PROD]
            if count <= (prod - self.req_cons & U32) <= self.size:
                return True
            words[REQ_EVENT] = prod + 1 & U32
            if words[REQ_PROD] == prod:
                return False

    def do_put(self, response: bytes) -> None:
        """Write the next response; unseen until `push_responses`."""
        prod, whole = self.rsp_prod_pvt, self._whole
        at = RING_HEADER + (prod & self.size - 1) * self.entry_size
        if whole is not None:
            whole[at : at + len(response)] = response
        else:
            self._pages.write(at, response)
        self.rsp_prod_pvt = prod + 1 & U32

    def do_put_all(self, responses: Sequence[bytes]) -> None:
        """Write the next responses."""
        whole, size, mask, prod = self._whole, self.entry_size, self.size - 1, self.rsp_prod_pvt
        for response in responses:
            at = RING_HEADER + (prod & mask) * size
            if whole is not None:
                whole[at : at + len(response)] = response
            else:
                self._pages.write(at, response)
            prod += 1
        self.rsp_prod_pvt = prod & U32

    @property
    def rsp_prod(self) -> int:
        """Up to where responses have been shown; the index is the backend's, but the frontend can write it too."""
        return self._words[RSP_PROD]

    @rsp_prod.setter
    def rsp_prod(self, value: int) -> None:
        self._words[RSP_PROD] = value & U32

    def do_push_responses(self, upto: int | None = None) -> bool:
        """Show the responses; True: the frontend wants to be told (RING_PUSH_RESPONSES_AND_CHECK_NOTIFY).

        With `upto` only those before that index.
        """
        words, new = self._words, self.rsp_prod_pvt if upto is None else upto
        old = words[RSP_PROD]
        words[RSP_PROD] = new
        return (new - words[RSP_EVENT] & U32) < (new - old & U32)
