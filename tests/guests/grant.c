/*
 * grant_table_op of one domain with itself: table set-up and versions, copy by reference and by frame, mapping
 * its own grants by address and by page-table entry, statuses of what is wrong (grant_table.c, pv/grant_table.c).
 */
#include "lib.h"

#define GT(op, arg, n) HC3(HC_grant_table_op, op, arg, n)
struct entry { u16 flags, domid; u32 frame; };
struct ptr { union { u32 ref; u64 mfn; } u; u16 domid, offset; };
struct copy_op { struct ptr src, dst; u16 len, flags; short status; };
struct map_op { u64 addr; u32 flags, ref; u16 dom; short status; u32 handle; u64 bus; };
struct unmap_op { u64 addr, bus; u32 handle; short status; };
static volatile struct entry *gt;
static u16 me;

static void grant(u32 ref, u16 dom, u64 mfn, u16 flags) { gt[ref].domid = dom; gt[ref].frame = mfn; __atomic_thread_fence(__ATOMIC_SEQ_CST); gt[ref].flags = flags; }
static void copy(const char *name, struct copy_op c)
{
    c.status = 99; memset(pages[2], 0, 16);
    say("%s: %e", name, GT(5, &c, 1)); say(" status %d -> %x\n", c.status, pages[2][c.dst.offset & 0xf]);
}
static struct map_op map(const char *name, u64 addr, u32 flags, u32 ref, u16 dom)
{
    struct map_op m = { addr, flags, ref, dom, 99, 0x5555, 0x77 };
    say("%s: %e", name, GT(0, &m, 1)); say(" status %d grant flags %x\n", m.status, gt[ref & 511].flags);
    return m;
}
static void unmap(const char *name, u64 addr, u32 handle, u32 ref)
{
    struct unmap_op u = { addr, 0, handle, 99 };
    say("%s: %e", name, GT(1, &u, 1)); say(" status %d grant flags %x\n", u.status, gt[ref].flags);
}

void test(void)
{
    u64 frames[64];
    volatile u8 *a = pages[0], *window = pages[1]; /* often the same memory */
    u8 *dst = pages[2];
    struct map_op m;
    { struct { u16 dom, rdom; u32 port; } al = { DOMID_SELF, DOMID_SELF, 0 };
      struct { u16 dom; u32 port; u32 status, vcpu; u16 rdom; u32 more; } st = { DOMID_SELF, 0, 0, 0, 0, 0 };
      EV(6, &al); st.port = al.port; EV(5, &st); me = st.rdom; EV(3, &al.port); }

    say("-- table\n");
    { struct { u16 dom; u32 nr, max; short status; } q = { DOMID_SELF, 99, 99, 99 };
      rc("query_size", GT(6, &q, 1)); say("  status %d nr %u max at least 32 %d\n", q.status, q.nr, q.max >= 32);
      q.dom = 77; rc("query_size of no domain", GT(6, &q, 1)); say("  status %d\n", q.status); }
    { struct { u16 dom; u32 nr; short status; u64 *list; } s = { DOMID_SELF, 2, 99, frames };
      rc("setup_table 2", GT(2, &s, 1)); say("  status %d two frames %d\n", s.status, frames[0] != frames[1]);
      rc("map it", remap(pages[8], frames[0] << 12 | P | RW)); gt = (void *)pages[8];
      say("  entries 0 to 15 empty %d\n", gt[2].flags == 0 && gt[15].flags == 0);
      s.nr = 100000; rc("setup_table 100000", GT(2, &s, 1)); say("  status %d\n", s.status);
      s.nr = 1; s.dom = 77; rc("setup_table, no domain", GT(2, &s, 1)); say("  status %d\n", s.status);
      s.dom = DOMID_SELF; s.list = EFAULT_ADDR; rc("setup_table, bad list", GT(2, &s, 1)); say("  status %d\n", s.status);
      rc("setup_table, count 2", GT(2, &s, 2)); rc("setup_table, bad pointer", GT(2, EFAULT_ADDR, 1)); }
    { struct { u16 dom; u32 nr, max; short status; } q = { DOMID_SELF, 99, 99, 99 }; GT(6, &q, 1); say("  nr now %u\n", q.nr); }
    { struct { u16 dom, pad; u32 version; } v = { DOMID_SELF, 0, 99 }; rc("get_version", GT(10, &v, 1)); say("  %u\n", v.version);
      v.dom = 77; rc("get_version of no domain", GT(10, &v, 1)); }
    { u32 v = 3; rc("set_version 3", GT(8, &v, 1)); v = 0; rc("set_version 0", GT(8, &v, 1)); v = 1; rc("set_version 1", GT(8, &v, 1)); rc("set_version, bad pointer", GT(8, EFAULT_ADDR, 1)); }
    { struct { u32 nr; u16 dom; short status; u64 *list; } s = { 1, DOMID_SELF, 99, frames }; rc("get_status_frames in version 1", GT(9, &s, 1)); say("  status %d\n", s.status); }

    say("-- copy\n");
    memset(pages[0], 0xab, PAGE); memset(dst, 0, PAGE);
    grant(20, me, MFN(a), 1); grant(21, me, MFN(a), 5); grant(22, me == 1 ? 2 : 1, MFN(a), 1); grant(23, me, 0xffffffff, 1); grant(24, me, MFN(dst), 1);
    copy("frame to frame", (struct copy_op){ { { .mfn = MFN(a) }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 0 }, 16, 0, 0 });
    copy("ref to frame", (struct copy_op){ { { .ref = 20 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    say("  its flags %x\n", gt[20].flags);
    copy("read-only ref to frame", (struct copy_op){ { { .ref = 21 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("ref by own id", (struct copy_op){ { { .ref = 20 }, me, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("ref to ref", (struct copy_op){ { { .ref = 20 }, DOMID_SELF, 0 }, { { .ref = 24 }, DOMID_SELF, 1 }, 4, 3, 0 });
    copy("to a read-only ref", (struct copy_op){ { { .mfn = MFN(dst) }, DOMID_SELF, 0 }, { { .ref = 21 }, DOMID_SELF, 1 }, 4, 2, 0 });
    copy("ref for another", (struct copy_op){ { { .ref = 22 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("ref to no frame", (struct copy_op){ { { .ref = 23 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("unused ref", (struct copy_op){ { { .ref = 30 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("ref out of the table", (struct copy_op){ { { .ref = 70000 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("over the end", (struct copy_op){ { { .ref = 20 }, DOMID_SELF, 4094 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("no domain", (struct copy_op){ { { .ref = 20 }, 77, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("to no frame", (struct copy_op){ { { .ref = 20 }, DOMID_SELF, 0 }, { { .mfn = 0xfffffffff }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("to a page table", (struct copy_op){ { { .ref = 20 }, DOMID_SELF, 0 }, { { .mfn = MFN(si->pt_base) }, DOMID_SELF, 3 }, 4, 1, 0 });
    copy("length 0", (struct copy_op){ { { .ref = 20 }, DOMID_SELF, 0 }, { { .mfn = MFN(dst) }, DOMID_SELF, 3 }, 0, 1, 0 });
    rc("bad pointer", GT(5, EFAULT_ADDR, 1)); rc("count 0", GT(5, EFAULT_ADDR, 0)); rc("count -1", GT(5, EFAULT_ADDR, -1));

    say("-- map\n");
    map("own ref, by DOMID_SELF", (u64)window, 2, 20, DOMID_SELF); /* only a real id will do */
    m = map("own ref, writable", (u64)window, 2, 20, me); say("  reads %x\n", window[0]);
    window[0] = 0x17; say("  writes through %x\n", a[0]);
    say("  entry flags %lx\n", *l1e_of((u64)window) & 0xfff0000000000fff);
    unmap("unmap, wrong address", (u64)dst, m.handle, 20);
    unmap("unmap", (u64)window, m.handle, 20);
    say("  entry %lx\n", *l1e_of((u64)window) & 1);
    unmap("unmap again", (u64)window, m.handle, 20); unmap("unmap, no such handle", (u64)window, 9999, 20);
    m = map("read-only", (u64)window, 2 | 4, 21, me); say("  entry flags %lx\n", *l1e_of((u64)window) & 0xfff0000000000fff);
    TRY("movb $1, (%0)", , R("r"(window))); show("write to it");
    unmap("unmap", (u64)window, m.handle, 21);
    map("read-only grant, writable map", (u64)window, 2, 21, me);
    map("grant for another", (u64)window, 2, 22, me);
    map("no frame", (u64)window, 2, 23, me);
    map("unused ref", (u64)window, 2, 30, me);
    map("out of the table", (u64)window, 2, 70000, me);
    map("no flags", (u64)window, 0, 20, me);
    m = map("unknown flags", (u64)window, 2 | 1 << 12, 20, me); unmap("unmap", (u64)window, m.handle, 20);
    map("no domain", (u64)window, 2, 20, 77);
    map("nowhere", (u64)EFAULT_ADDR, 2, 20, me);
    map("Xen's address", (u64)XEN_ADDR, 2, 20, me);
    m = map("by its entry", l1e_maddr((u64)window), 2 | 16, 20, me); say("  reads %x\n", window[0]);
    unmap("unmap by address", (u64)window, m.handle, 20);
    unmap("unmap by entry", l1e_maddr((u64)window), m.handle, 20);
    m = map("twice, first", (u64)window, 2, 20, me);
    { struct map_op n = map("twice, second", (u64)pages[3], 2, 20, me);
      grant(20, me, MFN(a), gt[20].flags);
      unmap("first away", (u64)window, m.handle, 20); unmap("second away", (u64)pages[3], n.handle, 20); }
    m = map("mapped, then overwritten", (u64)window, 2, 20, me);
    { u64 pte = *l1e_of((u64)window);
      rc("overwrite", set_rw(window)); unmap("unmap", (u64)window, m.handle, 20);
      rc("map it again by hand", remap(window, pte)); set_rw(window); }
    { struct { u64 addr, new_addr; u32 handle; short status; } ur = { (u64)window, (u64)pages[4], 0, 99 };
      m = map("to be replaced", (u64)window, 2, 20, me); ur.handle = m.handle; memset(pages[4], 0xcd, 16);
      rc("unmap_and_replace", GT(7, &ur, 1)); say("  status %d reads %x other present %ld\n", ur.status, window[0], *l1e_of((u64)pages[4]) & 1);
      set_rw(window); set_rw(pages[4]); }

    say("-- others\n");
    { struct { u32 a, b; short status; } sw = { 20, 24, 99 }; u32 f = gt[20].frame; rc("swap_grant_ref", GT(11, &sw, 1)); say("  status %d moved %d\n", sw.status, gt[24].frame == f);
      sw.a = 70000; rc("swap_grant_ref, out of the table", GT(11, &sw, 1)); say("  status %d\n", sw.status); }
    rc("transfer, count 0", GT(4, 0, 0)); rc("99", GT(99, 0, 0));
    { u32 v = 2; rc("set_version 2", GT(8, &v, 1)); say("  gives %u\n", v); }
    { struct { u32 nr; u16 dom; short status; u64 *list; } s = { 1, DOMID_SELF, 99, frames }; rc("get_status_frames", GT(9, &s, 1)); say("  status %d\n", s.status);
      s.nr = 100; rc("get_status_frames 100", GT(9, &s, 1)); say("  status %d\n", s.status); }
    { u32 v = 1; rc("set_version 1", GT(8, &v, 1)); say("  gives %u\n", v); }
}
