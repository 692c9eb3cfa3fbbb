"""Operations that are to look as if each were done at once."""

from __future__ import annotations

import pytest

from pvirq.check import explore
from pvirq.check.protocols.linear import as_if_one_by_one, operation
from pvirq.check.steps import Model, Thread


@pytest.mark.parametrize("locked", [True, False])
def test_operations_look_as_if_done_one_by_one(locked: bool) -> None:
    """Two that add 1: 0 and 1 are returned, whoever is first, and both count."""
    model = Model()
    number = model.var("number", 0)
    lock = model.lock("lock")

    def add() -> Thread:
        if locked:
            yield lock.acquire()
        before = yield number.read()
        yield number.write(before + 1)
        if locked:
            yield lock.release()
        return before

    results = [operation(model, name, add) for name in ("one", "other")]
    assert as_if_one_by_one(model, [*results, number]) == {(0, 1, 2), (1, 0, 2)}
    result = explore(model)
    if locked:
        assert result.complete
        assert result.failure is None
    else:
        assert result.failure is not None
        assert result.failure.message.startswith("no order of the operations gives this: ")
