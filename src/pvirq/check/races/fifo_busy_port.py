"""A port is closed while it is linked, and bound again: its events show on the old queue."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, choose
from pvirq.xen.evtchn_channels import ECS_FREE, ECS_IPI
from pvirq.xen.evtchn_fifo import LINKED, MASKED

REBOUND = ECS_IPI + 0x100  # the same, for whom the old one was closed


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=2, vcpus=2)
    fifo.word[2].initial = MASKED
    state = model.array("state", 3, ECS_FREE)
    state[1].initial = ECS_IPI
    event_lock = model.lock("event_lock")
    channel_lock = [model.lock(f"lock of port {port}") for port in range(3)]

    def send(port: int, bound: int) -> Thread:
        yield channel_lock[port].acquire()
        if (yield state[port].read()) == bound:
            yield from xen.send(fifo, port)
        yield channel_lock[port].release()

    def close(port: int) -> Thread:
        yield event_lock.acquire()
        yield channel_lock[port].acquire()
        yield from xen.clear_pending(fifo, port)
        yield state[port].write(ECS_FREE)
        yield fifo.notify_vcpu[port].write(0)
        yield channel_lock[port].release()
        yield event_lock.release()

    def bind_ipi(vcpu: int) -> Thread:
        yield event_lock.acquire()
        for port in fifo.ports:
            free = (yield state[port].read()) == ECS_FREE
            if free and (fault or not (yield fifo.word[port].read()) & LINKED):
                break
        else:
            yield event_lock.release()
            return 0
        yield channel_lock[port].acquire()
        yield state[port].write(REBOUND)
        yield fifo.notify_vcpu[port].write(vcpu)
        yield from xen.set_priority(fifo, port, xen.DEFAULT)
        yield channel_lock[port].release()
        yield event_lock.release()
        return port

    def going() -> Thread:
        yield fifo.word[1].update(lambda value: value | MASKED, "masks port 1")
        yield from close(1)
        if (yield choose(2, "goes offline, or stays")):
            yield from linux.idle(fifo, 0, linux.edge(fifo))

    def coming() -> Thread:
        port = yield from bind_ipi(1)
        if port:
            yield from linux.unmask(fifo, port)
            yield from send(port, REBOUND)
        yield from linux.idle(fifo, 1, linux.edge(fifo))

    model.thread("vCPU 0", going, may_wait=True)
    model.thread("vCPU 1", coming, may_wait=True)
    model.thread("sender", send, 1, ECS_IPI)
    model.at_end(fifo.lost)
    return model


RACE = Race(
    name="fifo-busy-port",
    title="a port is closed while it is linked, and bound again: its events show on the old queue",
    where="Xen 4.4-4.6, xen/common/event_channel.c: get_free_port()",
    brought="88910061ec (4.4)",
    cured="78e24c269b (4.7)",
    story=(
        "A guest closes a port that is still linked, because nobody has consumed its queue yet, and gets the same port "
        "for something new, on another vCPU. An event of the new one finds LINKED set and isn't put on any queue: it "
        "shows on the old one, and is lost if that vCPU has gone. The cure gives out no port that is linked."
    ),
    model=model,
)
