"""Reads what any Linux or Xen host prints of its interrupts; explains, compares, exports and watches it.

    snapshot = pvirq.inspect.read_files(["interrupts", "lsevtchn-0", "debug-e"])
    for finding in pvirq.inspect.explain(snapshot).findings:
        print(finding.text)

Nothing here knows of pvirq's own hosts: their texts are read like any other's (docs/inspect.md).
"""

from pvirq.inspect.finding import Finding, Severity
from pvirq.inspect.findings import Explanation, explain
from pvirq.inspect.join import join
from pvirq.inspect.live import live
from pvirq.inspect.model import Channel, ChannelList, Interrupts, IrqRow, Kind, Snapshot, Unread
from pvirq.inspect.picture import Picture
from pvirq.inspect.read import Reader, read_files, read_text
from pvirq.inspect.source import InspectError, Where

__all__ = [
    "Channel",
    "ChannelList",
    "Explanation",
    "Finding",
    "InspectError",
    "Interrupts",
    "IrqRow",
    "Kind",
    "Picture",
    "Reader",
    "Severity",
    "Snapshot",
    "Unread",
    "Where",
    "explain",
    "join",
    "live",
    "read_files",
    "read_text",
]
