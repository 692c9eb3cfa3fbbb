"""Faults of domain 0's backends: answers that come late, never, as errors or as lies; a driver that is reloaded.

A backend's answers pass the rules on their way into the ring (`BackRing.put`, `put_all`) and when they are to be seen
(`push_responses`), which stand in front of the ring's own only while there is a rule. How far a frontend may look is
one index, so an answer that is held up holds up those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi.io_blkif import BLKIF_RESPONSE, BLKIF_RSP_ERROR
from pvirq.abi.io_netif import NETIF_RSP_ERROR, NETIF_RX_RESPONSE, NETIF_TX_RESPONSE
from pvirq.drivers.ring import BackRing
from pvirq.drivers.served import ServedRing, ServedRings
from pvirq.lab.faults.rule import Rule, ScheduledRule
from pvirq.linux.kthread import Completion
from pvirq.xen.probes import put
from pvirq.xen.timer import Timer

if TYPE_CHECKING:
    from pvirq.host import Host

STRUCTURES: Final = {"blkif": BLKIF_RESPONSE, "tx": NETIF_TX_RESPONSE, "rx": NETIF_RX_RESPONSE}
ERRORS: Final = {"blkif": BLKIF_RSP_ERROR, "tx": NETIF_RSP_ERROR, "rx": NETIF_RSP_ERROR}
BAD_STATUS: Final = -77  # of no protocol
POLL_NS: Final = 1_000_000  # how often somebody looks whether a module has gone


@dataclass(eq=False)
class Push:
    """Answers that are to be seen later: those before index `upto`. `when` is None until a rule goes."""

    rule: AnswerRule
    upto: int
    when: int | None


@dataclass(eq=False)
class Disturbed:
    """A ring with rules in front of it."""

    served: ServedRing
    pushes: list[Push] = field(default_factory=list)
    timer: Timer | None = None


class AnswerRule(Rule):
    """A rule that the answers of some rings pass."""

    def is_for(self, served: ServedRing) -> bool:
        wanted, device, ring = self.spec.get("domain"), self.spec.get("device"), self.spec.get("ring")
        if device is not None and served.device != device:
            return False
        if ring is not None and served.name != ring:
            return False
        return self.names.is_domain(served.domid, wanted if isinstance(wanted, (int, str)) else None)

    def note_answer(self, action: str, served: ServedRing, **fields: Any) -> None:
        self.note(action, d=served.domid, device=served.device, ring=served.name, **fields)

    def changed(self, served: ServedRing, response: bytes) -> bytes:
        """An answer on its way into the ring."""
        return response

    def holds(self, served: ServedRing) -> int | None:
        """Answers are to be seen: in how many ns? 0: now; None: when the rule goes."""
        return 0

    def pushed(self, served: ServedRing) -> None:
        """Answers have been shown."""


class Slow(AnswerRule):
    """Each answer takes longer."""

    def holds(self, served: ServedRing) -> int | None:
        if not self.due():
            return 0
        ns = self.jittered()
        self.note_answer("slowed", served, ns=ns)
        return ns


class Silent(AnswerRule):
    """Answers aren't shown as long as the rule is there; then all at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self._end is not None:
            self._timer = self.clock.at(self._end, self.remove)

    def holds(self, served: ServedRing) -> int | None:
        if not self.due():
            return 0
        self.note_answer("silenced", served)
        return None

    def lifted(self) -> None:
        if self._end is not None:
            self._timer.cancel()


class ErrorAnswer(AnswerRule):
    """BLKIF_RSP_ERROR or NETIF_RSP_ERROR for a request that was carried out."""

    def changed(self, served: ServedRing, response: bytes) -> bytes:
        structure = STRUCTURES[served.name]
        if len(response) != structure.size or not self.due():
            return response
        self.note_answer("failed", served)
        return structure.pack(*structure.unpack(response)[:-1], ERRORS[served.name])


class Hostile(AnswerRule):
    """Answers that a frontend mustn't believe."""

    def changed(self, served: ServedRing, response: bytes) -> bytes:
        lie, structure = self.spec["lie"], STRUCTURES[served.name]
        if lie == "index" or len(response) != structure.size or not self.due():
            return response
        self.note_answer("lied", served, lie=lie)
        values = structure.unpack(response)
        if lie == "garbage":
            return self.random.randbytes(len(response))
        if lie == "status":
            return structure.pack(*values[:-1], BAD_STATUS)
        # Beyond all ids that there are: a frontend has no more of them than its ring has entries.
        return structure.pack(values[0] ^ 0x8000, *values[1:])

    def pushed(self, served: ServedRing) -> None:
        if self.spec["lie"] == "index" and self.due():
            ring = served.ring
            self.note_answer("lied", served, lie="index")
            ring.rsp_prod = ring.rsp_prod + ring.size + 1 + self.random.randrange(1 << 16)


ANSWER_RULES: Final[dict[str, type[AnswerRule]]] = {
    "slow": Slow, "silent": Silent, "error": ErrorAnswer, "hostile": Hostile
}  # fmt: skip


class Restart(ScheduledRule):
    """A backend's module is unloaded without a word to the frontends, and loaded again (rmmod, modprobe)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._gone: Completion[None] | None = None
        self._next: Timer | None = None

    def act(self) -> None:
        backend = str(self.spec["backend"])
        if not self.host.backends.xenbus.backends.drives(backend):
            return  # it is away already
        self.note("unloaded", backend=backend)
        self._gone = self.host.backends.unload(backend)
        self._next = self.clock.at(self.clock.now() + self.spec.number("down"), self._load)

    def _load(self) -> None:
        assert self._gone is not None
        if not self._gone.done:
            self._next = self.clock.at(self.clock.now() + POLL_NS, self._load)
            return
        backend = str(self.spec["backend"])
        self.note("loaded", fires=False, backend=backend)
        self._gone = self._next = None
        self.host.backends.load(backend)

    def lifted(self) -> None:
        """It comes back as soon as it has gone."""
        if self._next is not None:
            self._next.cancel()
            self._next = self.clock.at(self.clock.now(), self._load)


class AnswerFaults:
    """The rules that backends' answers pass, in the order of their making."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._rules: tuple[AnswerRule, ...] = ()
        self._rings: dict[BackRing, Disturbed] = {}

    @property
    def _served(self) -> ServedRings:
        return self._host.backends.xenbus.served

    def add(self, rule: AnswerRule) -> None:
        served = self._served
        if not self._rules:
            served.on_served.append(self._cover)
            served.on_over.append(self._over)
            for ring in served.rings:
                self._cover(ring)
        self._rules = (*self._rules, rule)

    def remove(self, rule: AnswerRule) -> None:
        """What it holds is shown."""
        if rule not in self._rules:
            return
        self._rules = tuple(other for other in self._rules if other is not rule)
        for disturbed in list(self._rings.values()):
            for push in disturbed.pushes:
                if push.rule is rule:
                    push.when = self._host.clock.now()
            self._show(disturbed)
        if not self._rules:
            self._served.on_served.remove(self._cover)
            self._served.on_over.remove(self._over)
            for disturbed in list(self._rings.values()):
                self._uncover(disturbed)

    @property
    def _covers(self) -> tuple[tuple[str, Callable[..., Any]], ...]:
        """What stands in front of a ring's own."""
        return ("put", self._put), ("put_all", self._put_all), ("push_responses", self._push)

    def _cover(self, served: ServedRing) -> None:
        disturbed = self._rings[served.ring] = Disturbed(served)
        for name, function in self._covers:
            put(served.ring, name, partial(function, disturbed))

    def _uncover(self, disturbed: Disturbed) -> None:
        ring = disturbed.served.ring
        del self._rings[ring]
        for name, _function in self._covers:
            put(ring, name, None)

    def _over(self, served: ServedRing) -> None:
        """The ring is served no more: its pages are the frontend's, or somebody else's."""
        disturbed = self._rings.get(served.ring)
        if disturbed is not None:
            if disturbed.timer is not None:
                disturbed.timer.cancel()
            self._uncover(disturbed)

    def _put(self, disturbed: Disturbed, response: bytes) -> None:
        for rule in self._rules:
            if rule.is_for(disturbed.served):
                response = rule.changed(disturbed.served, response)
        disturbed.served.ring.do_put(response)

    def _put_all(self, disturbed: Disturbed, responses: Sequence[bytes]) -> None:
        for response in responses:
            self._put(disturbed, response)

    def _push(self, disturbed: Disturbed) -> bool:
        served, ring, now = disturbed.served, disturbed.served.ring, self._host.clock.now()
        rules = [rule for rule in self._rules if rule.is_for(served)]
        if ring.rsp_prod_pvt == (disturbed.pushes[-1].upto if disturbed.pushes else ring.rsp_prod):
            return False  # nothing new: netback asks after each look at its ring
        for rule in rules:
            wait = rule.holds(served)
            if wait != 0:
                when = None if wait is None else now + wait
                disturbed.pushes.append(Push(rule, ring.rsp_prod_pvt, when))
                self._set_timer(disturbed)
                return False
        if disturbed.pushes:  # behind what is held
            last = disturbed.pushes[-1]
            last.upto = ring.rsp_prod_pvt
            return False
        return self._show_upto(disturbed, ring.rsp_prod_pvt)

    def _show_upto(self, disturbed: Disturbed, upto: int) -> bool:
        served = disturbed.served
        wanted = served.ring.do_push_responses(upto)
        for rule in self._rules:
            if rule.is_for(served):
                rule.pushed(served)
        return wanted

    def _show(self, disturbed: Disturbed) -> None:
        """Show what is due, in order: a push waits for those before it."""
        now, pushes, upto = self._host.clock.now(), disturbed.pushes, None
        while pushes and pushes[0].when is not None and pushes[0].when <= now:
            upto = pushes.pop(0).upto
        if upto is not None and self._show_upto(disturbed, upto):
            disturbed.served.notify()
        self._set_timer(disturbed)

    def _set_timer(self, disturbed: Disturbed) -> None:
        if disturbed.timer is not None:
            disturbed.timer.cancel()
            disturbed.timer = None
        if disturbed.pushes and disturbed.pushes[0].when is not None:
            disturbed.timer = self._host.clock.at(disturbed.pushes[0].when, lambda: self._due(disturbed))

    def _due(self, disturbed: Disturbed) -> None:
        disturbed.timer = None
        self._show(disturbed)
