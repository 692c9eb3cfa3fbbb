"""A driver's own event handling, checked: it takes responses from a ring, and sleeps while there are none.

    pvirq check examples/check_driver.py --explain

The first version loses a wake-up. The second looks at the ring once more after it has asked for the next event, as
RING_FINAL_CHECK_FOR_RESPONSES does, and is right, if each CPU sees at once what the other one does. x86 isn't like
that (--order tso): the third has the barriers that it takes.
"""

from pvirq.check import End, Model, Thread, mb

RESPONSES = 2


def ring(*, looks_again: bool, barriers: bool) -> Model:
    """A backend that answers, and a driver that waits for it."""
    model = Model()
    rsp_prod = model.var("rsp_prod")  # how many responses there are
    rsp_event = model.var("rsp_event", 1)  # with which of them the driver wants an event
    pending = model.var("pending")  # the event channel

    def backend() -> Thread:
        for number in range(1, RESPONSES + 1):
            yield rsp_prod.write(number).saying(f"puts response {number} into the ring")
            if barriers:
                yield mb()
            if (yield rsp_event.read()) == number:
                yield pending.xchg(1).saying("sends an event")

    def driver() -> Thread:
        taken = 0
        while taken < RESPONSES:
            yield pending.wait(bool).saying("sleeps until an event is pending")
            yield pending.xchg(0).saying("clears the event")
            while True:
                taken = yield rsp_prod.read()
                yield rsp_event.write(taken + 1).saying(f"asks for an event with response {taken + 1}")
                if barriers:
                    yield mb()
                if not looks_again or (yield rsp_prod.read()) == taken:
                    break

    model.thread("backend", backend)
    model.thread("driver", driver)
    model.at_end(lambda end: asleep(end) if "driver" in end.waiting else None)

    def asleep(end: End) -> str:
        return f"the driver sleeps for ever, with {end[rsp_prod]} responses in the ring"

    return model


def check_first_version() -> Model:
    """Takes what there is, asks for an event with the next one, sleeps."""
    return ring(looks_again=False, barriers=False)


def check_looks_again() -> Model:
    """Looks once more before it sleeps."""
    return ring(looks_again=True, barriers=False)


def check_looks_again_on_x86() -> Model:
    """The same where stores are buffered: the driver asks, looks, and neither has seen the other."""
    model = ring(looks_again=True, barriers=False)
    model.order = "tso"
    return model


def check_barriers_on_x86() -> Model:
    """With mb() between the store and the load, on both sides."""
    model = ring(looks_again=True, barriers=True)
    model.order = "tso"
    return model
