"""xenstored and its clients: the store that toolstack, drivers and guests meet in."""

from pvirq.drivers.xenstore.client import Client, ClientTransaction, Operations, WatchHandle
from pvirq.drivers.xenstore.daemon import DomainState, Xenstored
from pvirq.drivers.xenstore.database import Quotas
from pvirq.drivers.xenstore.node import Perm
from pvirq.drivers.xenstore.ring import XenstoreRing
from pvirq.drivers.xenstore.store import Store

__all__ = [
    "Client",
    "ClientTransaction",
    "DomainState",
    "Operations",
    "Perm",
    "Quotas",
    "Store",
    "WatchHandle",
    "XenstoreRing",
    "Xenstored",
]
