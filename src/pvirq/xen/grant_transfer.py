"""Giving a frame to another domain for good (gnttab_transfer in common/grant_table.c)."""

from __future__ import annotations

from pvirq.abi import grant_table as abi
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.domain import Domain
from pvirq.xen.grant import GrantError, GrantTable
from pvirq.xen.memory import PGT_NONE


def transfer(giver: Domain, mfn: int, domid: int, ref: int) -> None:
    """GNTTABOP_transfer: hand a frame that nothing refers to any more to the domain that accepts it by `ref`.

    GrantError with the status that the giver gets. Except for bad_page the frame is lost to it even then.
    """
    machine, hypervisor = giver.machine, giver.hypervisor
    if mfn >= machine.frames or machine.owner[mfn] != giver.domid or giver.is_special_page(mfn):
        raise GrantError(abi.GNTST_bad_page, f"mfn {mfn:#x} is not domain {giver.domid}'s")
    if machine.refs[mfn] or machine.type_count[mfn] or machine.pinned[mfn]:
        raise GrantError(abi.GNTST_bad_page, f"mfn {mfn:#x} is in use")
    taker = hypervisor.domain_or_zombie(domid)
    giver.tot_pages -= 1  # before the taker's room is looked at: both may be the same
    try:
        if taker is None:
            raise GrantError(abi.GNTST_bad_domain, f"no domain {domid:#x}")
        table = _accepting(giver, taker, ref)
    except GrantError:
        giver.tot_pages += 1
        hypervisor.free_frame(mfn)
        raise
    giver.flush_tlb()
    machine.owner[mfn] = taker.domid
    machine.type[mfn] = PGT_NONE
    taker.tot_pages += 1
    taker.frame_written(mfn << PAGE_SHIFT, PAGE_SIZE)
    table.complete_transfer(ref, mfn)


def _accepting(giver: Domain, taker: Domain, ref: int) -> GrantTable:
    table = taker.grant_table
    if taker.dying or table is None or taker.tot_pages >= taker.max_pages:
        raise GrantError(abi.GNTST_general_error, f"domain {taker.domid} has no room")
    if ref >= table.entries or table.header(ref) != (abi.GTF_accept_transfer, giver.domid):
        raise GrantError(abi.GNTST_general_error, f"domain {taker.domid} doesn't accept by {ref}")
    return table
