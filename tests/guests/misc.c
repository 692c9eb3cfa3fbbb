/*
 * The small hypercalls: xen_version, vm_assist, set_callbacks, callback_op, console_io, multicall, nmi_op, vcpu_op
 * (without timers), physdev_op (what any domain may), unknown numbers.
 */
#include "lib.h"

static struct { u64 op, result, args[6]; } mc[8];

static void version(void)
{
    char buf[1200];
    struct { u32 index, submap; } f;
    u64 *w = (u64 *)buf;
    say("-- xen_version\n");
    say("version: major %ld minor at least 17 %d\n", HC2(HC_xen_version, 0, 0) >> 16, (HC2(HC_xen_version, 0, 0) & 0xffff) >= 17);
    memset(buf, 0, 100); rc("extraversion", HC2(HC_xen_version, 1, buf)); say("  first %c\n", buf[0]);
    rc("compile_info", HC2(HC_xen_version, 2, buf)); say("  compiler given %d\n", buf[0] != 0);
    rc("capabilities", HC2(HC_xen_version, 3, buf)); buf[15] = 0; say("  %s\n", buf);
    rc("changeset", HC2(HC_xen_version, 4, buf));
    w[0] = 0; rc("platform_parameters", HC2(HC_xen_version, 5, buf)); say("  %lx\n", w[0]);
    for (f.index = 0; f.index < 3; f.index++) { /* without XENFEAT_dom0 and _pae_pgdir_above_4gb */
        f.submap = 0x55; say("features %u: %e", f.index, HC2(HC_xen_version, 6, &f)); say(" %x\n", f.submap & ~0x810); }
    f.index = 0; HC2(HC_xen_version, 6, &f); say("XENFEAT_dom0 as SIF_INITDOMAIN %d\n", (f.submap >> 11 & 1) == (u32)priv());
    rc("pagesize", HC2(HC_xen_version, 7, 0));
    memset(buf, 0x5a, 16); rc("guest_handle", HC2(HC_xen_version, 8, buf));
    DOM0 say("  zero %d\n", w[0] == 0 && w[1] == 0); /* others have a UUID */
    rc("commandline", HC2(HC_xen_version, 9, buf));
    DOM0 {
      say("build_id, no buffer: positive %d\n", HC2(HC_xen_version, 10, 0) > 0);
      struct { u32 len; u8 b[60]; } id = { 60, { 0 } }; say("build_id: positive %d\n", HC2(HC_xen_version, 10, &id) > 0);
      id.len = 1; rc("build_id, short", HC2(HC_xen_version, 10, &id)); }
    rc("11", HC2(HC_xen_version, 11, buf));
    for (u32 i = 0; i < 10; i++)
        if (i != 7 && i != 0) { say("%u to a bad pointer: %e", i, HC2(HC_xen_version, i, EFAULT_ADDR)); say(", to Xen: %e\n", HC2(HC_xen_version, i, XEN_ADDR)); }
}

static void callbacks(void)
{
    struct { u16 type, flags; u64 address; } cb = { 0, 0, (u64)upcall_entry };
    struct { u16 type, pad; } un = { 0, 0 };
    say("-- callbacks\n");
    for (u32 t = 0; t < 9; t++) {
        static char *const to[] = { upcall_entry, failsafe_entry, syscall_entry, sysenter_entry, 0, sysenter_entry, 0, syscall32_entry, 0 };
        cb.type = t; cb.address = (u64)(t == 4 ? trap_entries + 2 * 32 : to[t]);
        un.type = t;
        say("type %u: register %e", t, HC2(HC_callback_op, 0, &cb));
        say(" unregister %e\n", HC2(HC_callback_op, 1, &un));
    }
    cb.type = 0; cb.address = (u64)NONCANON; rc("non-canonical", HC2(HC_callback_op, 0, &cb));
    cb.type = 99; cb.address = (u64)upcall_entry; rc("type 99", HC2(HC_callback_op, 0, &cb));
    un.type = 99; rc("unregister type 99", HC2(HC_callback_op, 1, &un));
    rc("command 2", HC2(HC_callback_op, 2, &cb));
    rc("bad pointer", HC2(HC_callback_op, 0, EFAULT_ADDR)); rc("bad pointer", HC2(HC_callback_op, 1, XEN_ADDR));
    rc("set_callbacks non-canonical", HC3(HC_set_callbacks, NONCANON, NONCANON, NONCANON));
    rc("set_callbacks", HC3(HC_set_callbacks, upcall_entry, failsafe_entry, syscall_entry));
}

static void multicall(void)
{
    say("-- multicall\n");
    memset(mc, 0, sizeof mc);
    mc[0].op = HC_xen_version; mc[0].args[0] = 7;
    mc[1].op = 55;
    mc[2].op = HC_multicall; mc[2].args[0] = (u64)mc; mc[2].args[1] = 1;
    mc[3].op = HC_fpu_taskswitch; mc[3].args[0] = 0;
    mc[4].op = HC_xen_version; mc[4].args[0] = 99;
    mc[5].op = 1ul << 40 | HC_xen_version;
    mc[6].op = HC_set_segment_base; mc[6].args[0] = 9;
    mc[7].op = HC_get_debugreg; mc[7].args[0] = 7;
    rc("eight", HC2(HC_multicall, mc, 8));
    for (u32 i = 0; i < 8; i++) say("  %u: %e\n", i, mc[i].result);
    say("  arguments kept %d\n", mc[0].args[0] == 7 && mc[4].args[0] == 99 && mc[0].op == HC_xen_version);
    rc("none", HC2(HC_multicall, mc, 0));
    rc("bad pointer", HC2(HC_multicall, EFAULT_ADDR, 1));
    rc("Xen's pointer", HC2(HC_multicall, XEN_ADDR, 1));
    rc("too many", HC2(HC_multicall, mc, 1ul << 40));
    mc[0].result = mc[1].result = 0x77;
    { u8 *edge = pages[1] + PAGE - sizeof mc[0]; /* the second one is not mapped */
      remap(pages[2], 0); memcpy(edge, mc, sizeof mc[0]);
      rc("runs into an unmapped page", HC2(HC_multicall, edge, 2)); say("  first's result %ld\n", ((u64 *)edge)[1]);
      memcpy(edge, mc, sizeof mc[0]); ((u64 *)edge)[1] = 0x77; set_ro(pages[1]);
      rc("in a read-only page", HC2(HC_multicall, edge, 1)); say("  result %ld\n", ((u64 *)edge)[1]);
      set_rw(pages[1]); set_rw(pages[2]); }
}

static void vcpu(void)
{
    struct { u32 state; u32 pad; u64 entry, time[4]; } rs, *area = (void *)pages[4];
    struct { u64 mfn; u32 offset, rsvd; } vi = { MFN(pages[5]), 64, 0 };
    u64 ptr;
    say("-- vcpu_op\n");
    rc("is_up 0", HC3(HC_vcpu_op, 3, 0, 0)); rc("is_up 1", HC3(HC_vcpu_op, 3, 1, 0)); rc("is_up 9999", HC3(HC_vcpu_op, 3, 9999, 0));
    rc("up 0", HC3(HC_vcpu_op, 1, 0, 0)); rc("up 1", HC3(HC_vcpu_op, 1, 1, 0)); rc("down 1", HC3(HC_vcpu_op, 2, 1, 0));
    rc("initialise 1", HC3(HC_vcpu_op, 0, 1, pages[3])); rc("initialise 0, bad pointer", HC3(HC_vcpu_op, 0, 0, EFAULT_ADDR));
    rc("get_runstate_info", HC3(HC_vcpu_op, 4, 0, &rs)); say("  state %u ran %d\n", rs.state, rs.time[0] > 0);
    rc("get_runstate_info, bad pointer", HC3(HC_vcpu_op, 4, 0, EFAULT_ADDR));
    ptr = (u64)area; rc("register_runstate_memory_area", HC3(HC_vcpu_op, 5, 0, &ptr)); say("  state %u entered %d\n", area->state, area->entry != 0);
    ptr = (u64)EFAULT_ADDR; rc("register_runstate_memory_area, unmapped", HC3(HC_vcpu_op, 5, 0, &ptr));
    ptr = (u64)XEN_ADDR; rc("register_runstate_memory_area, Xen's", HC3(HC_vcpu_op, 5, 0, &ptr));
    ptr = 0; rc("register_runstate_memory_area, none", HC3(HC_vcpu_op, 5, 0, &ptr));
    rc("register_runstate_memory_area, bad pointer", HC3(HC_vcpu_op, 5, 0, EFAULT_ADDR));
    ptr = (u64)pages[6]; rc("register_vcpu_time_memory_area", HC3(HC_vcpu_op, 13, 0, &ptr));
    say("  filled %d even %d\n", ((struct time_info *)pages[6])->tsc_to_system_mul != 0, !(((struct time_info *)pages[6])->version & 1));
    ptr = (u64)XEN_ADDR; rc("register_vcpu_time_memory_area, Xen's", HC3(HC_vcpu_op, 13, 0, &ptr));
    ptr = 0; rc("register_vcpu_time_memory_area, none", HC3(HC_vcpu_op, 13, 0, &ptr));
    DOM0 rc("get_physid", HC3(HC_vcpu_op, 12, 0, &ptr));
    rc("99", HC3(HC_vcpu_op, 99, 0, 0)); rc("99 of vcpu 1", HC3(HC_vcpu_op, 99, 1, 0));
    vi.offset = 4040; rc("register_vcpu_info over the end", HC3(HC_vcpu_op, 10, 0, &vi));
    vi.offset = 4096 - 64 + 1; rc("register_vcpu_info over the end by one", HC3(HC_vcpu_op, 10, 0, &vi));
    vi.offset = 64; vi.mfn = 0xfffffffff; rc("register_vcpu_info of nothing", HC3(HC_vcpu_op, 10, 0, &vi));
    vi.mfn = MFN(si->pt_base); rc("register_vcpu_info in a page table", HC3(HC_vcpu_op, 10, 0, &vi));
    rc("register_vcpu_info, bad pointer", HC3(HC_vcpu_op, 10, 0, EFAULT_ADDR));
    rc("register_vcpu_info of vcpu 1", HC3(HC_vcpu_op, 10, 1, &vi));
    VI->upcall_mask = 1; VI->pending_sel = 0; VI->cr2 = 0x1234;
    vi.mfn = MFN(pages[5]); rc("register_vcpu_info", HC3(HC_vcpu_op, 10, 0, &vi));
    { volatile struct vcpu_info *v = (void *)(pages[5] + 64);
      say("  pending %d mask %d sel %lx cr2 %lx time %d\n", v->upcall_pending, v->upcall_mask, v->pending_sel, v->cr2, v->time.tsc_to_system_mul != 0);
      say("  old one: pending %d mask %d sel %lx\n", VI->upcall_pending, VI->upcall_mask, VI->pending_sel);
      rc("again", HC3(HC_vcpu_op, 10, 0, &vi));
      TRY("movb 0x77, %%al", , ); /* cr2 is found in the new one; the trap's frame is as ever */
      show("fault"); say("  cr2 %lx\n", v->cr2);
      rc("page table of it", (set_ro(pages[5]), mmuext1(0, MFN(pages[5]), 0))); set_rw(pages[5]); }
}

void test(void)
{
    version();
    say("-- vm_assist\n");
    for (u32 t = 0; t < 7; t++) {
        say("type %u: enable %e", t, HC2(HC_vm_assist, 0, t)); say(" disable %e\n", HC2(HC_vm_assist, 1, t)); }
    rc("type 31", HC2(HC_vm_assist, 0, 31)); rc("type 32", HC2(HC_vm_assist, 0, 32)); rc("type 32 off", HC2(HC_vm_assist, 1, 32)); rc("type 63", HC2(HC_vm_assist, 0, 63));
    rc("type 64", HC2(HC_vm_assist, 0, 64)); rc("type -1", HC2(HC_vm_assist, 0, -1)); rc("command 2", HC2(HC_vm_assist, 2, 0));
    callbacks();
    say("-- console_io\n");
    DOM0 { /* any other domain's output is only for a debugging Xen's log */
        rc("write nothing", HC3(HC_console_io, 0, 0, pages[0]));
        rc("write from a bad pointer", HC3(HC_console_io, 0, 5, EFAULT_ADDR));
        rc("write from Xen", HC3(HC_console_io, 0, 5, XEN_ADDR));
        rc("read, nothing there", HC3(HC_console_io, 1, 5, pages[0]));
        rc("command 2", HC3(HC_console_io, 2, 0, 0));
    }
    multicall();
    say("-- nmi_op\n");
    { struct { u64 handler, pad; } cb = { (u64)trap_entries + 64, 0 };
      rc("register", HC2(HC_nmi_op, 0, &cb)); rc("unregister", HC2(HC_nmi_op, 1, 0)); rc("2", HC2(HC_nmi_op, 2, 0));
      rc("bad pointer", HC2(HC_nmi_op, 0, EFAULT_ADDR)); cb.handler = (u64)NONCANON; rc("non-canonical", HC2(HC_nmi_op, 0, &cb)); }
    say("-- physdev_op\n");
    { u32 x = 2; rc("set_iopl 2", HC2(HC_physdev_op, 6, &x)); x = 3; rc("set_iopl 3", HC2(HC_physdev_op, 6, &x)); x = 0; rc("set_iopl 0", HC2(HC_physdev_op, 6, &x)); }
    rc("set_iopl, bad pointer", HC2(HC_physdev_op, 6, EFAULT_ADDR)); rc("set_iobitmap, bad pointer", HC2(HC_physdev_op, 7, EFAULT_ADDR));
    { u32 irq[2] = { 500000, 0 }; rc("irq_status_query 500000", HC2(HC_physdev_op, 5, irq)); rc("eoi 500000", HC2(HC_physdev_op, 12, irq)); }
    rc("99", HC2(HC_physdev_op, 99, pages[0]));
    rc("compat 99", HC1(HC_physdev_op_compat, pages[0]));
    say("-- unknown hypercalls\n");
    for (u32 n = 0; n < 64; n++) {
        static const u64 known = 0xfful | 0x3ul << 8 | 1ul << 10 | 0x1ful << 12 | 0x7ful << 17 | 0xful << 24 | 0x3ul << 28 | 1ul << 30 | 7ul << 31 | 0xful << 34 | 3ul << 38 | 7ul << 40;
        if (known >> n & 1 || (n >= 48 && n < 56))
            continue;
        say("%u: %e\n", n, HC1(n, 0));
    }
    rc("50, arch 2", HC1(50, 0)); rc("55, arch 7", HC1(55, 0));
#ifdef RAW
    rc("64", HC1(64, 0)); rc("-1", HC1(-1, 0)); rc("1 << 32", HC1(1ul << 32, 0));
#endif
    vcpu();
}
