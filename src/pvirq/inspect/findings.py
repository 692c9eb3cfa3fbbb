"""What is wrong with a machine's interrupts, most severe first, in sentences with their evidence and a way out.

docs/inspect.md has the table of the checks. At one severity, they come in the order of CHECKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from pvirq.inspect import checks_counts, checks_ports
from pvirq.inspect.finding import Finding
from pvirq.inspect.join import join
from pvirq.inspect.model import Snapshot
from pvirq.inspect.picture import Picture


@dataclass(frozen=True)
class Explanation:
    """A picture and what is to be said of it."""

    picture: Picture
    findings: tuple[Finding, ...]


def explain(snapshot: Snapshot, earlier: Snapshot | None = None, seconds: float | None = None) -> Explanation:
    """Join what was read and look for trouble; with an earlier snapshot of the same machine also for what changed.

    `seconds`: as `join`'s.
    """
    picture = join(snapshot, earlier, seconds)
    found = [finding for check in CHECKS for finding in check(picture)]
    found.sort(key=lambda finding: -finding.severity)
    return Explanation(picture, tuple(found))


CHECKS: Final[tuple[Callable[[Picture], Iterator[Finding]], ...]] = (
    checks_ports.device_port,
    checks_ports.stuck_pending,
    checks_counts.timer_stopped,
    checks_counts.storm,
    checks_ports.pending_masked,
    checks_ports.zombie_domain,
    checks_ports.leaked_port,
    checks_ports.unbound_port,
    checks_counts.one_cpu,
    checks_counts.lateeoi,
    checks_counts.near_limit,
    checks_counts.spurious_irq,
    checks_ports.one_sided,
    checks_ports.misplaced,
    checks_counts.not_balanced,
)
