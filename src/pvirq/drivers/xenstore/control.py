"""XS_CONTROL: the commands of xenstore-control that concern the store itself (xenstored_control.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.xenstore.node import U32, atoi

if TYPE_CHECKING:
    from pvirq.drivers.xenstore.store import Store

# Name on the wire, attribute of Quotas, description.
HARD_QUOTAS: Final = (
    ("nodes", "nodes", "Nodes per domain"),
    ("watches", "watches", "Watches per domain"),
    ("transactions", "transactions", "Transactions per domain"),
    ("outstanding", "outstanding", "Outstanding requests per domain"),
    ("transaction-nodes", "transaction_nodes", "Max. number of accessed nodes per transaction"),
    ("memory", "memory", "Total Xenstore memory per domain (error level)"),
    ("node-size", "node_size", "Max. size of a node"),
    ("path-max", "path_max", "Max. length of a node path"),
    ("permissions", "permissions", "Max. number of permissions per node"),
)
SOFT_QUOTAS: Final = (("memory", "memory_soft", "Total Xenstore memory per domain (warning level)"),)

# There is no binary to update live, so that command is absent, as in a daemon built without it.
COMMANDS: Final = {
    "check": "",
    "log": "on|off",
    "logfile": "<file>",
    "memreport": "[<file>]",
    "print": "<string>",
    "quota": "[set <name> <val>|<domid>]",
    "quota-soft": "[set <name> <val>]",
    "help": "",
}


def control(store: Store, payload: bytes) -> bytes:
    """Serve one command and return the reply's payload; XenError(EINVAL), ENOENT (do_control)."""
    command, *args = payload.decode("latin-1").split("\0")[:-1] or [""]
    if command not in COMMANDS:
        raise XenError(Errno.EINVAL, command)
    reply = "OK"
    if command == "help":
        _expect(not args)
        reply = "".join(f"{name}\t{parameters}\n" for name, parameters in COMMANDS.items())
    elif command == "check":
        _expect(not args)
        store.check()
    elif command == "log":  # there is no log, so its commands have nothing to do
        _expect(args in (["on"], ["off"]))
    elif command in ("logfile", "print"):
        _expect(len(args) == 1)
    elif command == "memreport":
        _expect(len(args) <= 1)
        raise XenError(Errno.EBADF, "no file to report to")
    elif not args:
        reply = "Quota settings:\n"
        for name, attribute, description in HARD_QUOTAS if command == "quota" else SOFT_QUOTAS:
            reply += f"{name:<17}: {getattr(store.quotas, attribute):8d} {description}\n"
    elif args[0] == "set":
        _expect(len(args) == 3)
        _set_quota(store, command, args[1], args[2])
    else:
        _expect(command == "quota" and len(args) == 1)
        reply = _domain_usage(store, atoi(args[0].encode("latin-1")) & U32)
    return reply.encode("latin-1") + b"\0"


def _expect(condition: bool) -> None:
    if not condition:
        raise XenError(Errno.EINVAL, "wrong arguments")


def _set_quota(store: Store, command: str, name: str, text: str) -> None:
    value = atoi(text.encode("latin-1"))
    _expect(value >= 1)
    for quota, attribute, _ in HARD_QUOTAS if command == "quota" else SOFT_QUOTAS:
        if quota == name:
            setattr(store.quotas, attribute, value)
            return
    raise XenError(Errno.EINVAL, f"no quota {name!r}")


def _domain_usage(store: Store, domid: int) -> str:
    account = store.domains.get(domid)
    if account is None:
        raise XenError(Errno.ENOENT, f"no domain {domid}")
    conn = account.connection
    usage = {
        "nodes": account.entries,
        "watches": account.watches,
        "transactions": len(conn.transactions) if conn is not None else 0,
        "outstanding": account.outstanding,
        "memory": account.memory,
    }
    return f"Domain {domid}:\n" + "".join(f"{name:<16}: {value:8d}\n" for name, value in usage.items())
