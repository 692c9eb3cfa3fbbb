/*
 * One pointer argument after the other, in every place where it may not point: unmapped, Xen's memory, the M2P, not
 * canonical, running into an unmapped page, read-only where Xen writes, null. What Xen reads there is zero (or what
 * `prepare` puts), so that the result tells whether the copy in, the operation or the copy out failed.
 */
#include "lib.h"

static u8 *edge, *ro, *good; /* the last bytes before an unmapped page; a read-only page; plain memory */

struct probe {
    const char *name;
    u32 hypercall, cmd; /* cmd goes first, unless it is NONE */
    u32 size;           /* of the structure, for the page-crossing place */
    u64 a2, a3;         /* what follows the pointer */
    u8 only_dom0;
    u64 words[4];       /* what the structure holds */
};
#define NONE 0xffffffff
static const struct probe probes[] = {
    { "set_trap_table", HC_set_trap_table, NONE, 16, 0, 0, 0, { 0 } },
    { "mmu_update", HC_mmu_update, NONE, 16, 1, 0, 0, { 0x7, 0 } },
    { "mmuext_op", HC_mmuext_op, NONE, 24, 1, 0, 0, { 6, 0, 0 } },
    { "set_gdt", HC_set_gdt, NONE, 8, 1, 0, 0, { 0xfffffffff } },
    { "multicall", HC_multicall, NONE, 64, 1, 0, 0, { 63 } },
    { "memory_op maximum_gpfn", HC_memory_op, 14, 2, 0, 0, 0, { 0x7ff2 } },
    { "memory_op current_reservation", HC_memory_op, 3, 2, 0, 0, 0, { 77 } },
    { "memory_op machphys_mapping", HC_memory_op, 12, 24, 0, 0, 0, { 0 } },
    { "memory_op machphys_mfn_list", HC_memory_op, 5, 24, 0, 0, 0, { 0 } },
    { "memory_op exchange", HC_memory_op, 11, 72, 0, 0, 0, { 0 } },
    { "memory_op add_to_physmap", HC_memory_op, 7, 24, 0, 0, 0, { DOMID_SELF } },
    { "memory_op remove_from_physmap", HC_memory_op, 15, 16, 0, 0, 0, { DOMID_SELF } },
    { "xen_version extraversion", HC_xen_version, 1, 16, 0, 0, 0, { 0 } },
    { "xen_version platform_parameters", HC_xen_version, 5, 8, 0, 0, 0, { 0 } },
    { "xen_version get_features", HC_xen_version, 6, 8, 0, 0, 0, { 0 } },
    { "xen_version guest_handle", HC_xen_version, 8, 16, 0, 0, 0, { 0 } },
    { "grant query_size", HC_grant_table_op, 6, 16, 1, 0, 0, { DOMID_SELF } },
    { "grant setup_table", HC_grant_table_op, 2, 24, 1, 0, 0, { DOMID_SELF } },
    { "grant copy", HC_grant_table_op, 5, 40, 1, 0, 0, { 0 } },
    { "grant map", HC_grant_table_op, 0, 40, 1, 0, 0, { 0 } },
    { "grant unmap", HC_grant_table_op, 1, 24, 1, 0, 0, { 0 } },
    { "grant get_version", HC_grant_table_op, 10, 8, 1, 0, 0, { DOMID_SELF } },
    { "grant set_version", HC_grant_table_op, 8, 4, 1, 0, 0, { 1 } },
    { "sched_op poll", HC_sched_op, 3, 24, 0, 0, 0, { 0, 0, 1 } },
    { "sched_op watchdog", HC_sched_op, 6, 8, 0, 0, 0, { 5 } },
    { "callback_op register", HC_callback_op, 0, 16, 0, 0, 0, { 99 } },
    { "callback_op unregister", HC_callback_op, 1, 4, 0, 0, 0, { 99 } },
    { "nmi_op register", HC_nmi_op, 0, 16, 0, 0, 0, { 0 } },
    { "physdev set_iopl", HC_physdev_op, 6, 4, 0, 0, 0, { 0 } },
    { "physdev set_iobitmap", HC_physdev_op, 7, 16, 0, 0, 0, { 0 } },
    { "physdev irq_status_query", HC_physdev_op, 5, 8, 0, 0, 0, { 500000 } },
    { "physdev eoi", HC_physdev_op, 12, 4, 0, 0, 0, { 500000 } },
    { "evtchn alloc_unbound", HC_event_channel_op, 6, 8, 0, 0, 0, { DOMID_SELF | (u64)DOMID_SELF << 16 } },
    { "evtchn bind_interdomain", HC_event_channel_op, 0, 12, 0, 0, 0, { DOMID_SELF | 4000ul << 32 } },
    { "evtchn bind_virq", HC_event_channel_op, 1, 12, 0, 0, 0, { 99 } },
    { "evtchn bind_ipi", HC_event_channel_op, 7, 8, 0, 0, 0, { 0 } },
    { "evtchn close", HC_event_channel_op, 3, 4, 0, 0, 0, { 0 } },
    { "evtchn send", HC_event_channel_op, 4, 4, 0, 0, 0, { 0 } },
    { "evtchn status", HC_event_channel_op, 5, 24, 0, 0, 0, { DOMID_SELF } },
    { "evtchn unmask", HC_event_channel_op, 9, 4, 0, 0, 0, { 4096 * 40 } },
    { "evtchn bind_vcpu", HC_event_channel_op, 8, 8, 0, 0, 0, { 0 } },
    { "evtchn init_control", HC_event_channel_op, 11, 24, 0, 0, 0, { 0, 99ul << 32 } },
    { "evtchn set_priority", HC_event_channel_op, 13, 8, 0, 0, 0, { 99ul << 32 } },
    { "event_channel_op_compat", HC_event_channel_op_compat, NONE, 32, 0, 0, 0, { 99 } },
    { "physdev_op_compat", HC_physdev_op_compat, NONE, 32, 0, 0, 0, { 99 } },
    { "console read", HC_console_io, 1, 8, 0, 0, 1, { 0 } }, /* the pointer is the third argument: see call() */
};
static const struct probe vcpu_probes[] = { /* command, vcpu, pointer */
    { "vcpu_op get_runstate_info", HC_vcpu_op, 4, 48, 0, 0, 0, { 0 } },
    { "vcpu_op register_runstate_memory_area", HC_vcpu_op, 5, 8, 0, 0, 0, { 0 } },
    { "vcpu_op set_periodic_timer", HC_vcpu_op, 6, 8, 0, 0, 0, { 1 } },
    { "vcpu_op set_singleshot_timer", HC_vcpu_op, 8, 16, 0, 0, 0, { ~0ul >> 1 } },
    { "vcpu_op register_vcpu_info", HC_vcpu_op, 10, 16, 0, 0, 0, { 0xfffffffff } },
    { "vcpu_op register_vcpu_time_memory_area", HC_vcpu_op, 13, 8, 0, 0, 0, { 0 } },
};

static s64 call(const struct probe *p, void *where, int vcpu)
{
    if (vcpu)
        return HC3(p->hypercall, p->cmd, 0, where);
    if (p->hypercall == HC_console_io)
        return HC3(p->hypercall, p->cmd, p->size, where);
    if (p->cmd == NONE)
        return HC(p->hypercall, where, p->a2, p->a3, p->hypercall == HC_mmu_update || p->hypercall == HC_mmuext_op ? DOMID_SELF : 0);
    return HC(p->hypercall, p->cmd, where, p->a2, p->a3);
}
static void probe(const struct probe *p, int vcpu)
{
    u8 *cross = edge + PAGE - p->size / 2, *fits = edge + PAGE - p->size;
    say("%s:", p->name);
    memset(good, 0, 256); memcpy(good, p->words, sizeof p->words); say(" good %e", call(p, good, vcpu));
    say(" unmapped %e Xen %e M2P %e non-canonical %e", call(p, EFAULT_ADDR, vcpu), call(p, XEN_ADDR, vcpu),
        call(p, (void *)(0xffff800000000000 + 0x1000), vcpu), call(p, NONCANON, vcpu));
    memset(fits, 0, p->size); memcpy(fits, p->words, p->size < 32 ? p->size : 32); say(" fits %e", call(p, fits, vcpu));
    memset(cross, 0, p->size / 2); memcpy(cross, p->words, p->size / 2 < 32 ? p->size / 2 : 32); say(" crossing %e", call(p, cross, vcpu));
    set_rw(ro); memset(ro, 0, 256); memcpy(ro, p->words, sizeof p->words); set_ro(ro); say(" read-only %e\n", call(p, ro, vcpu));
}

void test(void)
{
    good = pages[0]; edge = pages[1]; ro = pages[3];
    remap(pages[2], 0);
    for (u32 i = 0; i < sizeof probes / sizeof *probes; i++) {
        if (probes[i].only_dom0)
            DOM0 probe(probes + i, 0);
        else
            probe(probes + i, 0);
    }
    for (u32 i = 0; i < sizeof vcpu_probes / sizeof *vcpu_probes; i++)
        probe(vcpu_probes + i, 1);
}
