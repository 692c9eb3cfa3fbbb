"""pytest with Xen hosts and Linux guests: fixtures, marks, schedules, and what a failure tells (docs/lab-pytest.md).

pytest loads this in each run on a machine that has pvirq: nothing of weight is imported before a test needs it, and
tests that use none of the fixtures go their usual way.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from pvirq.guest import Guest
    from pvirq.host import Host
    from pvirq.lab.faults import Faults
    from pvirq.lab.trace import Trace

HOST: Final = "xen_host"
GUEST: Final = "linux_guest"

MARKS: Final = (
    "pvirq_host(dom0_kernel='pvops', hardware='none', dom0_vcpus=2): what the host of xen_host is like",
    "pvirq_guest(vcpus=1, memory='256M', kernel='cloud', append='', disks={}, nics=0, modules=[], files={}, "
    "dom0_kernel='pvops', hardware='none', dom0_vcpus=2): what the guest of linux_guest is like",
)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    _keep_asserts_plain(pluginmanager)
    group = parser.getgroup("pvirq", "Xen hosts and guests (pvirq)")
    group.addoption(
        "--pvirq-seed", type=_number, metavar="S",
        help="run each test that uses pvirq under the schedule of this seed; 0, the default, is first-in-first-out",
    )  # fmt: skip
    group.addoption(
        "--pvirq-choices", type=_choices, metavar="N=C,...",
        help="instead, under the schedule that makes these choices: as the report of a failure gives them",
    )  # fmt: skip
    group.addoption(
        "--pvirq-seeds", type=_number, metavar="N",
        help="run each test that uses pvirq under N schedules, report the first seed that fails, and reduce it",
    )  # fmt: skip
    group.addoption("--pvirq-first-seed", type=_number, metavar="F", help="the first of those seeds (default: 0)")
    group.addoption(
        "--pvirq-reduce-tries", type=_number, metavar="N", help="how many runs a reduction may take (default: 200)"
    )
    group.addoption(
        "--pvirq-jobs", type=_number, metavar="N",
        help="how many schedules of a test run at once (default: as many as there are CPUs, and 1 under xdist)",
    )  # fmt: skip
    parser.addini("pvirq_seeds", "default of --pvirq-seeds", default="")
    parser.addini("pvirq_first_seed", "default of --pvirq-first-seed", default="")
    parser.addini("pvirq_reduce_tries", "default of --pvirq-reduce-tries", default="")
    parser.addini("pvirq_jobs", "default of --pvirq-jobs", default="")
    parser.addini("pvirq_kernel", "the kernel of linux_guest where its mark names none", default="cloud")
    parser.addini("pvirq_trace_lines", "how many events of its end a failure shows; 0 for no trace", default="40")


def _keep_asserts_plain(pluginmanager: pytest.PytestPluginManager) -> None:
    """pytest rewrites the asserts of all that a plugin's distribution has, which is the whole of pvirq.

    They aren't a test's; and it costs time, at imports and in the hypervisor's loops.
    """
    hook: Any = getattr(pluginmanager, "rewrite_hook", None)
    getattr(hook, "_must_rewrite", set()).discard("pvirq")
    getattr(hook, "_marked_for_rewrite_cache", {}).clear()


def _number(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise ValueError(text)
    return int(text)


def _choices(text: str) -> dict[int, int]:
    """ "12=1,40=2"."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {_number(number): _number(choice) for number, _, choice in pairs}


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def _uses(item: pytest.Item, *fixtures: str) -> bool:
    return not set(fixtures).isdisjoint(getattr(item, "fixturenames", ()))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and (items := [item for item in session.items if _uses(item, GUEST)]):
        from pvirq.lab.pytest_plugin.guest import guests_of

        guests_of(session.config).expect(items)


@pytest.hookimpl(specname="pytest_runtest_protocol", wrapper=True, tryfirst=True)
def pytest_pvirq_boot(item: pytest.Item) -> Generator[None, object, object]:
    """Boot what the test needs before anybody counts its time."""
    if _uses(item, GUEST):
        from pvirq.lab.pytest_plugin.guest import guests_of

        guests = guests_of(item.config)
        guests.prepare(item)
        try:
            return (yield)
        finally:
            guests.done(item)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Tests that use a real guest, or run under many schedules, run in copies of this process."""
    if _uses(item, HOST, GUEST):
        from pvirq.lab.pytest_plugin.search import perform

        return perform(item, nextitem)
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and _uses(item, HOST, GUEST):
        from pvirq.lab.pytest_plugin.report import explain

        explain(item, call, report)
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    import sys

    if "pvirq.lab.pytest_plugin.guest" in sys.modules:
        from pvirq.lab.pytest_plugin.guest import guests_of

        guests_of(config).close()


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def linux_guest(request: pytest.FixtureRequest) -> Guest:
    """A real Linux guest, booted, in a copy of the process that ends with the test; `linux_guest.host` is its host.

    `@pytest.mark.pvirq_guest` says what it is like. It is to be named among a test's arguments, or by usefixtures.
    """
    from pvirq.lab.pytest_plugin.guest import guests_of
    from pvirq.lab.pytest_plugin.run import run_of

    guests = guests_of(request.config)
    guests.check(request.node)  # skips or fails where there is none
    guest = run_of(request.node).guest
    if guest is None:
        pytest.fail("linux_guest has to be named as an argument, or by usefixtures", pytrace=False)
    return guest


@pytest.fixture
def xen_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A new Xen host, whose run its seed says: with a modelled domain 0, or that of linux_guest where a test has both.

    `@pytest.mark.pvirq_host` says what it is like.
    """
    from pvirq.lab.pytest_plugin.run import host_options, run_of

    run = run_of(request.node)
    if GUEST in request.node.fixturenames:
        request.getfixturevalue(GUEST)
        assert run.host is not None
        yield run.host
        return
    from pvirq.host import Host

    with Host(seed=run.schedule, **host_options(request.node)) as host:
        run.begin(host)
        try:
            yield host
        finally:
            run.end()


@pytest.fixture
def faults(xen_host: Host, request: pytest.FixtureRequest) -> Iterator[Faults]:
    """`pvirq.lab.faults.Faults` of the test's host; its chances come from the seed of the schedule."""
    from pvirq.lab.faults import Faults
    from pvirq.lab.pytest_plugin.run import run_of

    with Faults(xen_host, seed=run_of(request.node).seed) as faults:
        yield faults


@pytest.fixture
def trace(xen_host: Host) -> Iterator[Trace]:
    """`pvirq.lab.trace.Trace` of the test's host, in memory."""
    from pvirq.lab.trace import Trace

    with Trace(xen_host) as trace:
        yield trace
