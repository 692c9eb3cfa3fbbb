/*
 * memory_op of a PV domain: reservations given back and taken, exchange, M2P after each, the maps (memory.c,
 * arch/x86/mm.c, pv/../x86_64/mm.c). Frame numbers are compared, never shown.
 */
#include "lib.h"

struct res { u64 *extents, nr; u32 order, flags; u16 dom; };
#define MEM(cmd, arg) HC2(HC_memory_op, cmd, arg)
static u16 self = DOMID_SELF;
static s64 pages_now(void) { return MEM(3, &self); }

void test(void)
{
    u64 list[8], old[8], pfn[8];
    s64 start = pages_now();
    struct res r = { list, 1, 0, 0, DOMID_SELF };
    u16 dom;

    say("-- sizes\n");
    say("current_reservation: at least nr_pages %d\n", start >= (s64)si->nr_pages);
    say("maximum_reservation: not below the current %d\n", MEM(4, &self) >= start);
    say("maximum_ram_page: above my frames %d\n", (u64)MEM(2, 0) >= MFN(pages));
    dom = 77; rc("current_reservation of no domain", MEM(3, &dom));
    rc("current_reservation, bad pointer", MEM(3, EFAULT_ADDR));
    dom = DOMID_INVALID; rc("current_reservation of DOMID_INVALID", MEM(3, &dom));
    say("maximum_gpfn: as max_pfn %d\n", (u64)MEM(14, &self) + 1 >= SI->max_pfn);
    SI->max_pfn = si->nr_pages; say("  set: %d\n", MEM(14, &self) == (s64)si->nr_pages - 1);
    { u64 m[3] = { 0, 0, 0 }; rc("machphys_mapping", MEM(12, m)); say("  %lx %lx max is above my frames %d\n", m[0], m[1], m[2] >= MFN(pages)); }
    rc("machphys_mapping, bad pointer", MEM(12, EFAULT_ADDR));
    { struct { u32 max, pad; u64 *list; u32 nr; } m = { 4, 0, list, 99 }; list[0] = 0; rc("machphys_mfn_list", MEM(5, &m)); say("  nr at least 1 %d first %d\n", m.nr >= 1, list[0] != 0);
      m.max = 0; rc("machphys_mfn_list, none", MEM(5, &m)); say("  nr %u\n", m.nr); }
    rc("memory_map, bad pointer", MEM(9, EFAULT_ADDR));

    say("-- decrease, populate, increase\n");
    for (u32 i = 0; i < 4; i++) { old[i] = MFN(pages[i]); pfn[i] = PFN(pages[i]); list[i] = old[i]; memset(pages[i], 0x40 + i, PAGE); }
    rc("unmap", remap(pages[0], 0) | remap(pages[1], 0));
    r.nr = 2; rc("decrease two", MEM(1, &r)); say("  total %ld\n", pages_now() - start);
    rc("map one that is gone", remap(pages[0], old[0] << 12 | P | RW));
    r.nr = 1; rc("decrease it again", MEM(1, &r));
    list[0] = pfn[0]; list[1] = pfn[1]; r.nr = 2; rc("populate two", MEM(6, &r)); say("  total %ld\n", pages_now() - start);
    say("  frames given %d M2P says so %d %d\n", list[0] != pfn[0], M2P[list[0]] == pfn[0], M2P[list[1]] == pfn[1]);
    for (u32 i = 0; i < 2; i++) { p2m[pfn[i]] = list[i]; rc("map", set_rw(pages[i])); }
    pages[0][7] = 9; say("  usable %d\n", pages[0][7]);
    list[0] = MFN(pages[0]); remap(pages[0], 0); r.nr = 1; rc("decrease", MEM(1, &r));
    list[0] = 0x1234; rc("increase", MEM(0, &r)); say("  frame given %d total %ld\n", list[0] != 0x1234, pages_now() - start);
    p2m[pfn[0]] = list[0]; rc("M2P", mmu_update1(list[0] << 12 | 1, pfn[0], 0)); rc("map", set_rw(pages[0]));
    list[0] = MFN(pages[2]); rc("decrease one still mapped", MEM(1, &r)); say("  total %ld still readable %x\n", pages_now() - start, pages[2][0]);
    rc("unmap", remap(pages[2], 0)); say("  total %ld\n", pages_now() - start);
    list[0] = pfn[2]; rc("populate", MEM(6, &r)); p2m[pfn[2]] = list[0]; rc("map", set_rw(pages[2])); say("  total %ld\n", pages_now() - start);
    list[0] = MFN(si->pt_base); rc("decrease a page table", MEM(1, &r)); say("  total %ld\n", pages_now() - start);
    list[0] = 0xfffffffff; rc("decrease nothing", MEM(1, &r));
    r.extents = EFAULT_ADDR; rc("decrease, bad list", MEM(1, &r)); rc("populate, bad list", MEM(6, &r)); say("  total %ld\n", pages_now() - start);
    r.extents = list; r.nr = 0; rc("decrease none", MEM(1, &r)); rc("populate none", MEM(6, &r)); rc("increase none", MEM(0, &r));
    r.nr = 1; r.order = 30; rc("increase, order 30", MEM(0, &r)); rc("decrease, order 30", MEM(1, &r)); rc("populate, order 30", MEM(6, &r));
    r.order = 0; r.dom = 77; rc("decrease, no domain", MEM(1, &r)); r.dom = DOMID_SELF;
    r.nr = ~0ul; rc("decrease, too many", MEM(1, &r)); r.nr = 1;
    rc("bad pointer", MEM(1, EFAULT_ADDR)); rc("Xen's pointer", MEM(0, XEN_ADDR));
    r.extents = 0; r.nr = 1;
    DOM0 { /* others are at their limit */
        rc("increase without a list", MEM(0, &r)); say("  total %ld\n", pages_now() - start);
    }

    say("-- exchange\n");
    { struct { struct res in, out; u64 done; } x = { { &list[0], 2, 0, 0, DOMID_SELF }, { &list[4], 2, 0, 0, DOMID_SELF }, 0 };
      s64 before = pages_now();
      for (u32 i = 0; i < 2; i++) { list[i] = MFN(pages[i]); list[4 + i] = pfn[i]; remap(pages[i], 0); }
      rc("two for two", MEM(11, &x)); say("  done %ld total %ld\n", x.done, pages_now() - before);
      say("  M2P %d %d\n", M2P[list[4]] == pfn[0], M2P[list[5]] == pfn[1]);
      for (u32 i = 0; i < 2; i++) { p2m[pfn[i]] = list[4 + i]; rc("map", set_rw(pages[i])); }
      x.done = 0; x.in.nr = 1; rc("one for two", MEM(11, &x));
      x.in.nr = 2; x.in.dom = 77; rc("no domain", MEM(11, &x));
      x.in.dom = DOMID_SELF; x.done = 5; rc("done beyond", MEM(11, &x));
      x.done = 0; x.in.extents = EFAULT_ADDR; rc("bad list", MEM(11, &x));
      x.done = 0; x.in.extents = list; list[0] = 0xfffffffff; rc("of nothing", MEM(11, &x)); say("  done %ld\n", x.done);
      rc("bad pointer", MEM(11, EFAULT_ADDR)); }
    rc("99", MEM(99, 0)); rc("translate_gpfn_list", MEM(8, 0)); rc("63", MEM(63, 0));
}
