"""The pytest plugin on modelled hosts (pvirq.lab.pytest_plugin): sessions and processes of their own."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

import pvirq.host  # noqa: F401  so that sessions in this process find it

pytest_plugins = ["pytester"]

PLUGIN = "pvirq.lab.pytest_plugin.plugin"

# Two guests are woken at the same time: who comes first is the schedule's to say, and the test believes to know.
RACE = """
def test_order(xen_host):
    order = []
    guests = [xen_host.model("pvops", name=name) for name in ("first", "second")]
    xen_host.settle()
    when = xen_host.clock.now() + 1000
    for guest in guests:
        guest.kernel.set_timer(when, lambda guest=guest: order.append(guest.name))
    xen_host.run(lambda: len(order) == 2, 1_000_000_000)
    print("woken in the order", order)
    assert order == ["first", "second"]
"""


@pytest.fixture
def session(pytester: pytest.Pytester, outside_ci: None) -> pytest.Pytester:
    """A directory whose pytest has the plugin, installed or not."""
    if PLUGIN not in [point.value for point in entry_points(group="pytest11")]:
        pytester.makeconftest(f"pytest_plugins = [{PLUGIN!r}]")
    pytester.makeini("[pytest]\n")
    return pytester


def run(session: pytest.Pytester, *options: str, apart: bool = False) -> pytest.RunResult:
    """A session: in this process, where all is imported, or `apart` from it."""
    method = session.runpytest_subprocess if apart else session.runpytest_inprocess
    return method("-p", "no:cacheprovider", *options)


def line(result: pytest.RunResult, start: str) -> str:
    """The only line that begins so."""
    (found,) = {text for text in result.outlines if text.startswith(start)}
    return found


def repeat(session: pytest.Pytester, result: pytest.RunResult) -> pytest.RunResult:
    """Run the command that a report gives, as it stands there."""
    _, _, command = line(result, "to repeat it: ").partition(": ")
    program, *arguments = shlex.split(command)
    assert program == "pytest"
    return run(session, *arguments)


# -- one run -----------------------------------------------------------------------------------------------------------


def test_others_tests_pay_nothing(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import sys
        def test_it():
            ours = [name for name in sys.modules if name.split(".")[0] in ("pvirq", "numpy", "unicorn")]
            plugin = {"pvirq.lab", "pvirq.lab.pytest_plugin", "pvirq.lab.pytest_plugin.plugin"}
            assert set(ours) <= {"pvirq", "pvirq.machine_code"} | plugin
        """
    )
    run(session, "--pvirq-seeds", "3", apart=True).assert_outcomes(passed=1)


def test_a_host_is_what_marks_and_options_say(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.pvirq_host(dom0_vcpus=3, hardware="writeup")

        @pytest.mark.pvirq_host(dom0_vcpus=1)
        def test_it(xen_host):
            assert len(xen_host.dom0.domain.vcpus) == 1
            assert xen_host.hardware == "writeup"
            print(xen_host.schedule)

        class TestOthers:
            def test_it(self, xen_host):
                assert len(xen_host.dom0.domain.vcpus) == 3
        """
    )
    result = run(session, "-s")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines("*<schedule script of 0>*")
    run(session, "-s", "--pvirq-seed", "7").stdout.fnmatch_lines("*<schedule seed 7>*")
    run(session, "-s", "--pvirq-choices", "1=2,3=4").stdout.fnmatch_lines("*<schedule script of 2>*")


def test_what_cant_be_is_said(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest

        @pytest.mark.pvirq_host(dom0_cpus=3)
        def test_it(xen_host): pass
        """
    )
    result = run(session)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*pvirq_host takes dom0_kernel, hardware, dom0_vcpus; not dom0_cpus*")
    assert run(session, "--pvirq-choices", "1=x").ret == pytest.ExitCode.USAGE_ERROR
    assert run(session, "--pvirq-seeds", "-1").ret == pytest.ExitCode.USAGE_ERROR
    assert run(session, "-o", "pvirq_seeds=many").ret != pytest.ExitCode.OK


def test_a_failure_tells_of_both_sides(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("word", ["it's"])
        def test_it(xen_host, word):
            xen_host.model("pvops", name="guest of mine")
            xen_host.settle()
            print("seen by the test")
            assert word == "that"
        """
    )
    result = run(session, "--pvirq-seed", "5", "--junit-xml", "junit.xml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "schedule: seed 5; * choices until now, *; virtual time 0.0*",
            "to repeat it: pytest *test_it* --pvirq-seed 5",
            "*Captured stdout call*",
            "seen by the test",
            "*pvirq: /proc/interrupts of domain 0*",
            " 24: *xen-percpu*timer0",
            "*pvirq: /proc/interrupts of guest of mine*",
            "*xenbus",
            "*debug key e*",
            "(XEN) Event channel information for domain 1:",
        ]
    )
    command = line(result, "to repeat it: ")
    assert "--pvirq-seed 5" in Path(session.path, "junit.xml").read_text()
    again = repeat(session, result)
    again.assert_outcomes(failed=1)
    assert line(again, "to repeat it: ") == command


def test_a_failure_has_the_end_of_the_trace(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        def test_it(xen_host, trace):
            xen_host.model("pvops", name="mine")
            xen_host.settle()
            assert len(trace.where(k="irq")) > 3
            assert 0
        """
    )
    result = run(session, "-o", "pvirq_trace_lines=7")
    result.assert_outcomes(failed=1)
    start = next(i for i, text in enumerate(result.outlines) if "pvirq: the last events" in text)
    for text in result.outlines[start + 1 : start + 8]:
        assert re.match(r" +\d+\.\d{9} d\d\S* +[a-z]+", text), text
    assert "pvirq" in result.outlines[start + 8]
    run(session, "-o", "pvirq_trace_lines=0").stdout.no_fnmatch_line("*events*---")


def test_faults_are_of_the_same_seed(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        def test_it(xen_host, faults):
            assert faults.host is xen_host
            assert faults.seed == 9
        """
    )
    run(session, "--pvirq-seed", "9", "--pvirq-choices", "1=1").assert_outcomes(passed=1)


def test_unittest_classes(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import unittest, pytest

        class TestIt(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def _host(self, xen_host):
                self.host = xen_host

            def test_it(self):
                self.assertTrue(self.host.settle())

            def test_other(self):
                self.assertEqual(self.host.clock.now(), 1)
        """
    )
    for options in ((), ("--pvirq-seeds", "2")):
        result = run(session, *options)
        result.assert_outcomes(passed=1, failed=1)
        line(result, "to repeat it: pytest test_unittest_classes.py::TestIt::test_other --pvirq-seed 0")


# -- many schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [("--pvirq-jobs", "1"), ("--pvirq-jobs", "4"), ("-n", "2")], ids=" ".join)
def test_a_race_is_found_reduced_and_repeated(session: pytest.Pytester, how: tuple[str, ...]) -> None:
    session.makepyfile(f"def test_plain(): pass\n{RACE}")
    run(session).assert_outcomes(passed=2)
    result = run(session, "--pvirq-seeds", "30", *how)
    result.assert_outcomes(passed=1, failed=1)
    found = re.fullmatch(r"seed (\d+) is the first of 30 that fails: 0 to (\d+) passed", line(result, "seed ").strip())
    assert found is not None
    seed = int(found[1])
    assert int(found[2]) == seed - 1
    result.stdout.fnmatch_lines(
        [
            "of its * choices others than the first * needed: * tries",
            "choices that were not first-in-first-out:",
            "  *=* at 0.00000* s, answer: d* had its turn * us after it was woken; at once otherwise",
            "woken in the order ['second', 'first']",
        ]
    )
    command = line(result, "to repeat it: ")
    choices = re.search(r" --pvirq-choices (\S+)$", command)
    assert choices is not None
    assert 1 <= len(choices[1].split(",")) <= 3
    again = repeat(session, result)
    again.assert_outcomes(failed=1)
    assert line(again, "to repeat it: ") == command
    again.stdout.fnmatch_lines("woken in the order ['second', 'first']")
    # The seed by itself fails as well, and the ones before it don't.
    run(session, "--pvirq-seed", str(seed)).assert_outcomes(passed=1, failed=1)
    run(session, "--pvirq-seeds", str(seed)).assert_outcomes(passed=2)
    same = run(session, "--pvirq-seeds", "3", "--pvirq-first-seed", str(seed), "--pvirq-jobs", "2")
    assert line(same, "to repeat it: ") == command


def test_few_tries_leave_more_choices(session: pytest.Pytester) -> None:
    session.makepyfile(RACE)
    session.makeini("[pytest]\npvirq_seeds = 30\npvirq_reduce_tries = 2\n")
    result = run(session)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines("of its * are needed: 2 tries, no more were allowed")
    repeat(session, result).assert_outcomes(failed=1)


def test_one_that_fails_anyhow_needs_no_choices(session: pytest.Pytester) -> None:
    session.makepyfile(RACE.replace("assert order ==", "assert 0, "))
    result = run(session, "--pvirq-seeds", "5", "--pvirq-first-seed", "3")
    result.stdout.fnmatch_lines(
        ["seed 3 is the first of 5 that fails", "of its * 0 are needed (it fails first-in-first-out, too)*"]
    )
    assert line(result, "to repeat it: ").endswith("::test_order --pvirq-seed 3 --pvirq-choices ''")
    again = repeat(session, result)
    again.stdout.fnmatch_lines("schedule: 0 choices given; *")


def test_what_isnt_the_schedules_doing_is_said(session: pytest.Pytester) -> None:
    session.makepyfile(
        f"""
        from pathlib import Path
        def test_it(xen_host):
            xen_host.settle()
            file = Path({str(session.path)!r}, "runs")
            file.write_text(file.read_text() + "x" if file.exists() else "x")
            assert len(file.read_text()) != 3
        """
    )
    result = run(session, "--pvirq-seeds", "8", "--pvirq-jobs", "1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "schedule: seed 2; *",
            "seed 2 is the first of 8 that fails: 0 to 1 passed",
            "NOT REPEATABLE: another run under the same schedule passed",
            "to repeat it: * --pvirq-seed 2",
        ]
    )


def test_one_that_dies_is_a_failure_as_any_other(session: pytest.Pytester) -> None:
    session.makepyfile(
        RACE.replace('assert order == ["first", "second"]', 'order[0] == "first" or os.kill(os.getpid(), 9)')
        + "\nimport os\ndef test_next(xen_host): pass"
    )
    result = run(session, "--pvirq-seeds", "30")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*test_order: it ended without a result (signal 9, SIGKILL)", "*its choices went with it: not reduced"]
    )
    assert re.search(r"::test_order --pvirq-seed \d+$", line(result, "to repeat it: "))


def test_skips_and_expected_failures(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest
        def test_skip(xen_host): pytest.skip("not now")
        @pytest.mark.skipif(True, reason="never")
        def test_skipif(xen_host): pass
        @pytest.mark.xfail
        def test_xfail(xen_host): assert 0
        @pytest.mark.xfail(strict=True)
        def test_xpass(xen_host): pass
        """
    )
    for options in ((), ("--pvirq-seeds", "3")):
        run(session, *options).assert_outcomes(skipped=2, xfailed=1, failed=1)


# -- runs in copies of the process -------------------------------------------------------------------------------------


def test_fixtures_of_wider_scope(session: pytest.Pytester) -> None:
    """What is set up already is used in copies and ends where it began; what a copy sets up ends in it."""
    session.makepyfile(
        f"""
        import os, pytest

        def log(text):
            with open({str(session.path / "log")!r}, "a") as file:
                file.write(f"{{text}} {{'here' if os.getpid() == int(os.environ['HERE']) else 'copy'}}\\n")

        os.environ.setdefault("HERE", str(os.getpid()))

        @pytest.fixture(scope="session")
        def early():
            log("early up")
            yield os.getpid()
            log("early down")

        @pytest.fixture(scope="session", params=[1])
        def one(request):
            log("one up")
            yield request.param
            log("one down")

        @pytest.fixture(scope="module")
        def late(early):
            log("late up")
            yield
            log("late down")

        def test_plain(early, one): pass
        @pytest.mark.parametrize("one", [2], indirect=True)
        def test_other(xen_host, one): assert one == 2
        def test_copy(xen_host, early, late): assert early == int(os.environ["HERE"]) != os.getpid()
        def test_plain_again(early, late): assert early == os.getpid()
        """
    )
    run(session, "--pvirq-seeds", "1").assert_outcomes(passed=4)
    log = Path(session.path, "log").read_text().splitlines()
    assert log[:-2] == [
        "early up here", "one up here", "one up copy", "one down copy", "late up copy", "late down copy",
        "late up here", "late down here",
    ]  # fmt: skip
    assert set(log[-2:]) == {"one down here", "early down here"}


def test_a_teardown_that_fails_after_a_copy(session: pytest.Pytester) -> None:
    session.makepyfile(
        test_a="""
        import pytest
        @pytest.fixture(scope="module")
        def bad():
            yield
            raise RuntimeError("in its teardown")
        def test_plain(bad): pass
        def test_copy(xen_host): pass
        """,
        test_b="def test_b(): pass",
    )
    result = run(session, "--pvirq-seeds", "1")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_copy*", "*in its teardown*"])


def test_what_comes_back_from_a_copy(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import sys, warnings, logging, pytest

        def test_it(xen_host, tmp_path, record_property, capsys):
            (tmp_path / "x").write_text("")
            warnings.warn("from the copy", DeprecationWarning)
            record_property("colour", "blue")
            print("to capsys")
            assert capsys.readouterr().out == "to capsys\\n"
            print("to stdout")
            print("to stderr", file=sys.stderr)
            logging.getLogger().warning("to the log")

        @pytest.mark.filterwarnings("error")
        def test_error(xen_host):
            with pytest.raises(UserWarning):
                warnings.warn("as an error")
        """
    )
    result = run(session, "--pvirq-seeds", "2", "-rP", "--junit-xml", "junit.xml")
    result.stdout.fnmatch_lines(["*DeprecationWarning: from the copy", "to stdout", "to stderr", "*to the log"])
    assert result.stdout.str().count("DeprecationWarning: from the copy") == 1
    junit = Path(session.path, "junit.xml").read_text()
    assert 'name="colour" value="blue"' in junit
    assert 'name="pvirq_seeds" value="0 to 1"' in junit


@pytest.mark.skipif(find_spec("_pytest.subtests") is None, reason="this pytest has no subtests")
def test_subtests(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        def test_sub(xen_host, subtests):
            for number in range(3):
                with subtests.test(number=number):
                    assert number != 1
        """
    )
    for options in ((), ("--pvirq-seeds", "2")):
        result = run(session, *options)
        result.stdout.fnmatch_lines("*test_sub (number=*1*)*")
        assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_test_that_hangs_ends_by_its_own_timeout(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest, signal
        @pytest.mark.timeout(1, method="signal")
        def test_hangs(xen_host):
            while True:
                pass
        def test_next(xen_host): pass
        """
    )
    result = run(session, "--pvirq-seeds", "2")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines([">*while True:*", "*Timeout (>1.0s) from pytest-timeout*"])


def test_the_session_ends_where_it_would(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest
        def test_fails(xen_host): assert 0
        def test_exits(xen_host): pytest.exit("enough", 3)
        def test_interrupts(xen_host): raise KeyboardInterrupt
        """
    )
    run(session, "--pvirq-seeds", "2", "-x").assert_outcomes(failed=1)
    result = run(session, "--pvirq-seeds", "2", apart=True)
    assert result.ret == 3
    result.stdout.fnmatch_lines("*enough*")
    assert run(session, "--pvirq-seeds", "2", "-k", "interrupts", apart=True).ret == pytest.ExitCode.INTERRUPTED


def test_the_debugger_is_entered_in_the_reduced_run_only(session: pytest.Pytester) -> None:
    session.makepyfile(RACE)
    done = session.popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pdb", "--pvirq-seeds", "30"],
        stdin=b"p order\nq\n",
    )
    out, _ = done.communicate()
    assert out.count(b"entering PDB") == 1
    assert b"(Pdb) ['second', 'first']" in out
    assert b"is the first of 30 that fails" in out
