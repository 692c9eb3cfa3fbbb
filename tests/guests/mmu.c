/*
 * Page tables: update_va_mapping, mmu_update and every mmuext_op, with what Xen refuses (mm.c: mod_l1_entry to
 * mod_l4_entry, alloc_l1_table to alloc_l4_table, get_page_and_type, do_mmuext_op, do_mmu_update,
 * do_update_va_mapping). Entries are shown by their flags, frames only compared.
 */
#include "lib.h"

enum { PIN_L1, PIN_L2, PIN_L3, PIN_L4, UNPIN, NEW_BASE, FLUSH_LOCAL, INVLPG_LOCAL, FLUSH_MULTI, INVLPG_MULTI, FLUSH_ALL,
       INVLPG_ALL, FLUSH_CACHE, SET_LDT, NEW_USER_BASE = 15, CLEAR, COPY, FLUSH_CACHE_GLOBAL, MARK_SUPER, UNMARK_SUPER };
static u64 flags_of(u64 e) { return e & 0xfff0000000000fff; }
static void entry(const char *name, u64 *e) { say("%s: flags %lx\n", name, flags_of(*e)); }
static long uva(void *va, u64 pte, u64 flags) { return HC3(HC_update_va_mapping, va, pte, flags); }
#define BADMFN 0xffffffffful /* far beyond any memory */

static void va_mapping(void)
{
    volatile u8 *b = pages[1]; /* and so it is seen through `a` too */
    u8 *a = pages[0];
    u64 *e = l1e_of((u64)a), old = *e;
    say("-- update_va_mapping\n");
    say("as built by the domain builder: flags %lx\n", flags_of(*e) & ~(A | D | NX)); /* these are the builder's choice */
    rc("swap in another page", uva(a, PTE(b, P | RW | US), 2));
    entry("  entry", e);
    b[5] = 0x42; say("  seen through it %x\n", *(volatile u8 *)(a + 5));
    entry("  touched", e);
    rc("read-only", uva(a, PTE(b, P), 2)); entry("  without US", e);
    rc("global", uva(a, PTE(b, P | RW | G), 2)); entry("  kernel global", e);
    rc("user global", uva(a, PTE(b, P | RW | US | G), 2)); entry("  user global", e);
    DOM0 { /* a domain without devices may not */
        rc("PWT PCD PAT", uva(a, PTE(b, P | RW | PWT | PCD | PSE), 2)); entry("  caching", e);
    }
    rc("software bits", uva(a, PTE(b, P | RW | 0xe00), 2)); entry("  avail", e);
    rc("high software bits", uva(a, PTE(b, P | RW | 1ul << 52), 2));
    rc("high software bits", uva(a, PTE(b, P | RW | 1ul << 58), 2)); entry("  avail", e);
    rc("protection key", uva(a, PTE(b, P | RW | 1ul << 59), 2)); entry("  key", e);
    rc("NX", uva(a, PTE(b, P | RW | NX), 2)); entry("  nx", e);
    rc("not present, garbage", uva(a, 0xdeadbeefdeadbeee, 2)); say("  entry %lx\n", *e);
    rc("A and D given", uva(a, PTE(b, P | RW | A | D), 2)); entry("  a, d", e);
    rc("no flush", uva(a, PTE(b, P | RW), 0));
    rc("flush local", uva(a, PTE(b, P | RW), 1));
    rc("flush all", uva(a, PTE(b, P | RW), 1 | 4));
    rc("invlpg all", uva(a, PTE(b, P | RW), 2 | 4));
    rc("flush type 3", uva(a, PTE(b, P | RW), 3));
    { u64 mask = 1; rc("flush by a mask", uva(a, PTE(b, P | RW), (u64)&mask | 1)); }
    rc("flush by a bad mask", uva(a, PTE(b, P | RW), (u64)EFAULT_ADDR | 1));
    rc("no L4 entry", uva(EFAULT_ADDR, PTE(b, P | RW), 0));
    rc("Xen's area", uva(XEN_ADDR, PTE(b, P | RW), 0));
    rc("M2P", uva((void *)0xffff800000000000, PTE(b, P | RW), 0));
    rc("non-canonical", uva(NONCANON, PTE(b, P | RW), 0));
    rc("a page table, read-only", uva(a, PTE(si->pt_base, P), 2));
    rc("a page table, writable", uva(a, PTE(si->pt_base, P | RW), 2));
    rc("shared info", uva(a, si->shared_info | P | RW, 2));
    say("  the same memory %d\n", ((volatile struct shared_info *)a)->wc_sec == SI->wc_sec);
    rc("back", uva(a, old, 2)); say("  as before %d\n", ((*e ^ old) & ~(A | D)) == 0);
    rc("otherdomain, self", HC(HC_update_va_mapping_otherdomain, a, old, 2, DOMID_SELF));
    rc("otherdomain, no such", HC(HC_update_va_mapping_otherdomain, a, old, 2, 77));
    rc("otherdomain, invalid", HC(HC_update_va_mapping_otherdomain, a, old, 2, DOMID_INVALID));
    DOM0 {
        rc("otherdomain, DOMID_XEN, my page", HC(HC_update_va_mapping_otherdomain, a, old, 2, DOMID_XEN));
        rc("otherdomain, DOMID_IO, my page", HC(HC_update_va_mapping_otherdomain, a, old, 2, DOMID_IO));
        rc("otherdomain, DOMID_IO, beyond memory", HC(HC_update_va_mapping_otherdomain, a, BADMFN << 12 | 1, 2, DOMID_IO));
        rc("back", uva(a, old, 2));
    }
}

static void pin_l1(void)
{
    u64 *t = (u64 *)pages[2];
    u8 *a = pages[3];
    say("-- L1\n");
    rc("pin a writable page", mmuext1(PIN_L1, MFN(t), 0));
    rc("ro", set_ro(t));
    rc("pin, empty", mmuext1(PIN_L1, MFN(t), 0));
    rc("pin again", mmuext1(PIN_L1, MFN(t), 0));
    rc("pin as L2", mmuext1(PIN_L2, MFN(t), 0));
    rc("map writable", set_rw(t));
    rc("unpin", mmuext1(UNPIN, MFN(t), 0));
    rc("unpin again", mmuext1(UNPIN, MFN(t), 0));
    rc("rw", set_rw(t));
    t[0] = PTE(t, P | RW); rc("ro", set_ro(t));
    rc("pin, maps itself writable", mmuext1(PIN_L1, MFN(t), 0));
    set_rw(t); t[0] = PTE(t, P); set_ro(t);
    rc("pin, maps itself read-only", mmuext1(PIN_L1, MFN(t), 0));
    rc("unpin", mmuext1(UNPIN, MFN(t), 0));
    set_rw(t); t[0] = 0; t[5] = PTE(si->pt_base, P | RW); set_ro(t);
    rc("pin, maps the L4 writable", mmuext1(PIN_L1, MFN(t), 0));
    set_rw(t); t[5] = PTE(a, P | RW | 1ul << 51); set_ro(t);
    rc("pin, address bit 51", mmuext1(PIN_L1, MFN(t), 0));
    set_rw(t); t[5] = PTE(a, P | RW | 1ul << 52); set_ro(t);
    rc("pin, bit 52", mmuext1(PIN_L1, MFN(t), 0));
    mmuext1(UNPIN, MFN(t), 0);
    set_rw(t); t[5] = PTE(a, P | RW | G); set_ro(t);
    rc("pin, G", mmuext1(PIN_L1, MFN(t), 0)); entry("  entry", t + 5);
    mmuext1(UNPIN, MFN(t), 0);
    set_rw(t);
    for (u32 i = 0; i < 4; i++)
        t[i] = PTE(a, P | (i & 1 ? RW : 0) | (i & 2 ? US : 0));
    t[4] = 0xabcdef00; t[5] = PTE(a, P | RW | NX); t[511] = PTE(a, P | RW | 0xe00); set_ro(t);
    rc("pin", mmuext1(PIN_L1, MFN(t), 0));
    for (u32 i = 0; i < 6; i++)
        entry("  entry", t + i);
    rc("its page as a page table", mmuext1(PIN_L1, MFN(a), 0));
    rc("unpin", mmuext1(UNPIN, MFN(t), 0));
    rc("pin of nothing", mmuext1(PIN_L1, BADMFN, 0));
    rc("unpin of nothing", mmuext1(UNPIN, BADMFN, 0));
    set_rw(t); memset(t, 0, PAGE);
}

static void upper(void)
{
    u64 *l1 = (u64 *)pages[4], *l2 = (u64 *)pages[5], *l3 = (u64 *)pages[6], *l4 = (u64 *)pages[7], *cur = (u64 *)si->pt_base;
    u32 done = 99;
    say("-- L2, L3, L4\n");
    l2[0] = PTE(l1, P | RW | US | A);
    set_ro(l2);
    rc("pin L2 of a writable L1", mmuext1(PIN_L2, MFN(l2), 0));
    set_ro(l1);
    rc("pin L2", mmuext1(PIN_L2, MFN(l2), 0));
    entry("  entry", l2);
    rc("pin its L1 too", mmuext1(PIN_L1, MFN(l1), 0));
    rc("unpin L1", mmuext1(UNPIN, MFN(l1), 0));
    rc("L1 writable", set_rw(l1));
    rc("mmu_update PSE", mmu_update1(MFN(l2) << 12 | 8, PTE(pages[8], P | RW | PSE), &done)); say("  done %u\n", done);
    rc("mmu_update plain page", mmu_update1(MFN(l2) << 12 | 8, PTE(si, P | RW), 0));
    rc("mmu_update G", mmu_update1(MFN(l2) << 12 | 8, PTE(l1, P | RW | G), 0));
    rc("mmu_update NX, no US", mmu_update1(MFN(l2) << 12 | 8, PTE(l1, P | RW | NX), 0)); entry("  entry", l2 + 1);
    rc("mmu_update PCD", mmu_update1(MFN(l2) << 12 | 16, PTE(l1, P | RW | PCD | PWT), 0)); entry("  entry", l2 + 2);
    rc("mmu_update itself as L1", mmu_update1(MFN(l2) << 12 | 24, PTE(l2, P), 0));
    rc("mmu_update itself as L1, RW", mmu_update1(MFN(l2) << 12 | 24, PTE(l2, P | RW), 0));
    rc("mmu_update L4 as L1", mmu_update1(MFN(l2) << 12 | 24, PTE(cur, P), 0));
    rc("mmu_update high bit", mmu_update1(MFN(l2) << 12 | 24, PTE(l1, P | 1ul << 51), 0));
    rc("mmu_update bit 58", mmu_update1(MFN(l2) << 12 | 24, PTE(l1, P | 1ul << 58), 0));
    l3[0] = PTE(l2, P | RW | US); l3[1] = PTE(l2, P | PSE); set_ro(l3);
    rc("pin L3 with PSE", mmuext1(PIN_L3, MFN(l3), 0));
    set_rw(l3); l3[1] = PTE(l2, P); set_ro(l3);
    rc("pin L3", mmuext1(PIN_L3, MFN(l3), 0)); entry("  entry", l3); entry("  entry", l3 + 1);
    rc("unpin L2, still used", mmuext1(UNPIN, MFN(l2), 0));
    rc("L2 writable", set_rw(l2));
    for (u32 i = 0; i < 512; i++)
        l4[i] = i < 256 || i >= 272 ? cur[i] : 0;
    l4[1] = PTE(l3, P | RW | US); l4[256] = PTE(l3, P | RW); l4[260] = 0x1230;
    rc("new base, writable", mmuext1(NEW_BASE, MFN(l4), 0));
    set_ro(l4);
    rc("pin L4", mmuext1(PIN_L4, MFN(l4), 0)); entry("  [1]", l4 + 1); say("  [511]: flags %lx\n", flags_of(l4[511]) & ~(A | D | NX));
    rc("write a Xen slot", mmu_update1(MFN(l4) << 12 | 256 * 8, 0, 0));
    rc("write a Xen slot", mmu_update1(MFN(l4) << 12 | 271 * 8, PTE(l3, P), 0));
    rc("write slot 272", mmu_update1(MFN(l4) << 12 | 272 * 8, PTE(l3, P | RW | US), 0));
    rc("write slot 255", mmu_update1(MFN(l4) << 12 | 255 * 8, PTE(l3, P | RW), 0)); entry("  [255]", l4 + 255);
    rc("PSE in an L4", mmu_update1(MFN(l4) << 12 | 2 * 8, PTE(l3, P | RW | PSE), 0));
    rc("G in an L4", mmu_update1(MFN(l4) << 12 | 2 * 8, PTE(l3, P | RW | G), 0));
    rc("itself, read-only", mmu_update1(MFN(l4) << 12 | 3 * 8, PTE(l4, P), 0));
    rc("itself, writable", mmu_update1(MFN(l4) << 12 | 4 * 8, PTE(l4, P | RW), 0));
    rc("another L4, read-only", mmu_update1(MFN(l4) << 12 | 5 * 8, PTE(cur, P), 0));
    rc("new base", mmuext1(NEW_BASE, MFN(l4), 0));
    { u64 cr3; __asm__ volatile("mov %%cr3, %0" : "=r"(cr3)); say("  cr3 is it %d\n", cr3 >> 12 == MFN(l4)); }
    rc("map by slot 1", mmu_update1(MFN(l1) << 12, PTE(pages[8], P | RW | US), 0));
    pages[8][9] = 0x99; say("  seen %x\n", *(u8 *)(0x8000000000 + 9));
    rc("L1 of slot 1 by update_va_mapping", uva((void *)0x8000001000, PTE(pages[8], P | RW), 2));
    say("  seen %x\n", *(u8 *)(0x8000001000 + 9));
    rc("unpin the current base", mmuext1(UNPIN, MFN(l4), 0));
    rc("old base", mmuext1(NEW_BASE, MFN(cur), 0));
    rc("L4 writable again", set_rw(l4));
    rc("new base, unpinned and writable", mmuext1(NEW_BASE, MFN(l4), 0));
    rc("new base of nothing", mmuext1(NEW_BASE, BADMFN, 0));
    rc("new base, an L1", mmuext1(NEW_BASE, MFN(l1), 0));
    rc("unpin L3", mmuext1(UNPIN, MFN(l3), 0));
    rc("all writable", set_rw(l3) | set_rw(l2) | set_rw(l1));
    rc("unpin of a plain page", mmuext1(UNPIN, MFN(l1), 0));
}

static void updates(void)
{
    u64 *t = (u64 *)pages[10];
    u8 *a = pages[11];
    u32 done = 99;
    u64 tm = MFN(t) << 12;
    struct mmu_update u[6];
    say("-- mmu_update\n");
    set_ro(t); mmuext1(PIN_L1, MFN(t), 0);
    rc("normal", mmu_update1(tm, PTE(a, P | RW), &done)); say("  done %u\n", done); entry("  entry", t);
    rc("preserve AD, new A", mmu_update1(tm | 2, PTE(a, P | RW | A | D), &done)); entry("  entry", t);
    rc("normal, A D", mmu_update1(tm, PTE(a, P | RW | A | D), &done)); entry("  entry", t);
    rc("preserve AD, without", mmu_update1(tm | 2, PTE(a, P), &done)); entry("  entry", t);
    rc("preserve AD, other frame", mmu_update1(tm | 2, PTE(pages[12], P | RW), &done)); entry("  entry", t);
    rc("normal, without", mmu_update1(tm, PTE(a, P), &done)); entry("  entry", t);
    rc("command 3", mmu_update1(tm | 3, 0, &done)); say("  done %u\n", done);
    rc("unaligned", mmu_update1(tm | 4, PTE(a, P), &done)); say("  done %u\n", done);
    rc("in a plain page", mmu_update1(MFN(a) << 12 | 0x20, 0x1234567, &done)); say("  done %u value %lx\n", done, *(u64 *)(a + 0x20));
    rc("in nothing", mmu_update1(BADMFN << 12, 0, &done)); say("  done %u\n", done);
    for (u32 i = 0; i < 6; i++)
        u[i] = (struct mmu_update){ tm + 8 * i, i == 3 ? PTE(t, P | RW) : PTE(a, P | RW) };
    done = 99; rc("batch of six, the fourth bad", HC(HC_mmu_update, u, 6, &done, DOMID_SELF)); say("  done %u, fifth %lx\n", done, t[4]);
    done = 99; rc("count 0", HC(HC_mmu_update, u, 0, &done, DOMID_SELF)); say("  done %u\n", done);
    done = 99; rc("bad pointer", HC(HC_mmu_update, EFAULT_ADDR, 2, &done, DOMID_SELF)); say("  done %u\n", done);
    done = 99; rc("Xen's pointer", HC(HC_mmu_update, XEN_ADDR, 2, &done, DOMID_SELF)); say("  done %u\n", done);
    rc("done in unmapped memory", HC(HC_mmu_update, u, 1, EFAULT_ADDR, DOMID_SELF));
    { struct mmu_update *edge = (struct mmu_update *)(pages[13] + PAGE - 2 * sizeof *edge);
      edge[0] = u[0]; edge[1] = u[1]; remap(pages[14], 0); done = 99;
      rc("runs into an unmapped page", HC(HC_mmu_update, edge, 3, &done, DOMID_SELF)); say("  done %u\n", done);
      set_rw(pages[14]); }
    rc("no such domain", HC(HC_mmu_update, u, 1, 0, 77));
    rc("page-table domain and foreign domain", HC(HC_mmu_update, u, 1, 0, DOMID_SELF | 0x7ff1 << 16));
    { u64 old = M2P[MFN(a)];
      rc("M2P", mmu_update1(MFN(a) << 12 | 1, 0x777, &done)); say("  done %u is %lx\n", done, M2P[MFN(a)]);
      rc("M2P back", mmu_update1(MFN(a) << 12 | 1, old, &done)); say("  is the old %d\n", M2P[MFN(a)] == old);
      rc("M2P with an offset", mmu_update1(MFN(a) << 12 | 0x11, old, &done));
      rc("M2P of nothing", mmu_update1(BADMFN << 12 | 1, 1, &done)); say("  done %u\n", done);
      rc("M2P of a page table", mmu_update1(tm | 1, M2P[MFN(t)], &done)); }
    for (u32 i = 0; i < 512; i++)
        if (t[i]) mmu_update1(tm + 8 * i, 0, 0);
    rc("unpin", mmuext1(UNPIN, MFN(t), 0));
    set_rw(t);
}

static void ext(void)
{
    u8 *a = pages[16], *b = pages[17];
    u64 mask = 1;
    u32 done = 99;
    struct mmuext_op o[4] = { { FLUSH_LOCAL, 0, 0 }, { INVLPG_LOCAL, (u64)a, 0 }, { 99, 0, 0 }, { FLUSH_LOCAL, 0, 0 } };
    say("-- mmuext_op\n");
    rc("TLB_FLUSH_LOCAL", mmuext1(FLUSH_LOCAL, 0, 0));
    rc("INVLPG_LOCAL", mmuext1(INVLPG_LOCAL, (u64)a, 0));
    rc("INVLPG_LOCAL Xen's", mmuext1(INVLPG_LOCAL, (u64)XEN_ADDR, 0));
    rc("INVLPG_LOCAL non-canonical", mmuext1(INVLPG_LOCAL, (u64)NONCANON, 0));
    rc("TLB_FLUSH_MULTI", mmuext1(FLUSH_MULTI, 0, (u64)&mask));
    rc("TLB_FLUSH_MULTI bad mask", mmuext1(FLUSH_MULTI, 0, (u64)EFAULT_ADDR));
    rc("INVLPG_MULTI", mmuext1(INVLPG_MULTI, (u64)a, (u64)&mask));
    rc("TLB_FLUSH_ALL", mmuext1(FLUSH_ALL, 0, 0));
    rc("INVLPG_ALL", mmuext1(INVLPG_ALL, (u64)a, 0));
    DOM0 {
        rc("FLUSH_CACHE", mmuext1(FLUSH_CACHE, 0, 0));
        rc("FLUSH_CACHE_GLOBAL", mmuext1(FLUSH_CACHE_GLOBAL, 0, 0));
    }
    memset(a, 0x11, PAGE); memset(b, 0x22, PAGE);
    rc("CLEAR_PAGE", mmuext1(CLEAR, MFN(a), 0)); say("  %x %x\n", a[0], a[4095]);
    rc("COPY_PAGE", mmuext1(COPY, MFN(a), MFN(b))); say("  %x %x\n", a[0], a[4095]);
    rc("CLEAR_PAGE of nothing", mmuext1(CLEAR, BADMFN, 0));
    rc("COPY_PAGE from nothing", mmuext1(COPY, MFN(a), BADMFN));
    rc("CLEAR_PAGE of a page table", mmuext1(CLEAR, MFN(si->pt_base), 0));
    rc("COPY_PAGE from a page table", mmuext1(COPY, MFN(a), MFN(si->pt_base)));
    say("  copied %d\n", memcmp(a, (void *)si->pt_base, 8 * 256) == 0);
    rc("MARK_SUPER", mmuext1(MARK_SUPER, MFN(a), 0));
    rc("UNMARK_SUPER", mmuext1(UNMARK_SUPER, MFN(a), 0));
    rc("command 14", mmuext1(14, 0, 0));
    rc("command 99", mmuext1(99, 0, 0));
    rc("batch with a bad third", HC(HC_mmuext_op, o, 4, &done, DOMID_SELF)); say("  done %u\n", done);
    done = 99; rc("count 0", HC(HC_mmuext_op, o, 0, &done, DOMID_SELF)); say("  done %u\n", done);
    done = 99; rc("bad pointer", HC(HC_mmuext_op, EFAULT_ADDR, 1, &done, DOMID_SELF)); say("  done %u\n", done);
    done = 99; rc("Xen's pointer", HC(HC_mmuext_op, XEN_ADDR, 1, &done, DOMID_SELF)); say("  done %u\n", done);
    rc("done in unmapped memory", HC(HC_mmuext_op, o, 1, EFAULT_ADDR, DOMID_SELF));
    rc("no such domain", HC(HC_mmuext_op, o, 1, 0, 77));
}

void test(void)
{
    va_mapping();
    pin_l1();
    upper();
    updates();
    ext();
}
