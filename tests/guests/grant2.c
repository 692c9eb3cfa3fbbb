/*
 * More of grant_table_op: version 2 (status frames, parts of pages, grants of grants), device mappings, the flags of
 * an entry, handles, transfer, many operations in one call (grant_table.c, pv/grant_table.c).
 */
#include "lib.h"

#define GT(op, arg, n) HC3(HC_grant_table_op, op, arg, n)
struct entry1 { u16 flags, domid; u32 frame; };
struct entry2 { u16 flags, domid, off, len; u64 frame; };
struct ptr { union { u32 ref; u64 mfn; } u; u16 domid, offset; };
struct copy_op { struct ptr src, dst; u16 len, flags; short status; };
struct map_op { u64 addr; u32 flags, ref; u16 dom; short status; u32 handle; u64 bus; };
struct unmap_op { u64 addr, bus; u32 handle; short status; };
struct transfer_op { u64 mfn; u16 dom; u32 ref; short status; };
static volatile struct entry1 *g1;
static volatile struct entry2 *g2;
static volatile u16 *st;
static u16 me;
static struct map_op maps[300];
static struct unmap_op unmaps[300];
static struct copy_op copies[3000];

static struct map_op map1(u64 addr, u32 flags, u32 ref)
{
    struct map_op m = { addr, flags, ref, me, 99, 0x5555, 0x77 };
    rc("map", GT(0, &m, 1));
    return m;
}
static void map(const char *name, u64 addr, u32 flags, u32 ref)
{
    struct map_op m = map1(addr, flags, ref);
    say("  %s: status %d handle %d bus is the frame's %d\n", name, m.status, m.handle, m.bus == MFN(pages[0]) << 12);
}
static void unmap(const char *name, u64 addr, u64 bus, u32 handle)
{
    struct unmap_op u = { addr, bus, handle, 99 };
    say("%s: %e", name, GT(1, &u, 1)); say(" status %d\n", u.status);
}
static void copy(const char *name, u32 sref, u16 soff, u32 dref, u16 doff, u16 len, u16 flags)
{
    struct copy_op c = { { { .mfn = 0 }, DOMID_SELF, soff }, { { .mfn = 0 }, DOMID_SELF, doff }, len, flags, 99 };
    if (flags & 1) c.src.u.ref = sref; else c.src.u.mfn = MFN(pages[0]);
    if (flags & 2) c.dst.u.ref = dref; else c.dst.u.mfn = MFN(pages[2]);
    memset(pages[2], 0, PAGE);
    say("%s: %e", name, GT(5, &c, 1)); say(" status %d -> %x\n", c.status, pages[2][doff]);
}
static void transfer(const char *name, u64 mfn, u16 dom, u32 ref)
{
    struct transfer_op t = { mfn, dom, ref, 99 };
    say("%s: %e", name, GT(4, &t, 1)); say(" status %d\n", t.status);
}
static s64 total(void) { u16 self = DOMID_SELF; return HC2(HC_memory_op, 3, &self); }

void test(void)
{
    u64 frames[64], status[8], before;
    volatile u8 *window = pages[1];
    { struct { u16 dom, rdom; u32 port; } al = { DOMID_SELF, DOMID_SELF, 0 };
      struct { u16 dom; u32 port; u32 status, vcpu; u16 rdom; u32 more; } s = { DOMID_SELF, 0, 0, 0, 0, 0 };
      EV(6, &al); s.port = al.port; EV(5, &s); me = s.rdom; EV(3, &al.port); }
    { struct { u16 dom; u32 nr; short status; u64 *list; } s = { DOMID_SELF, 1, 99, frames };
      GT(2, &s, 1); remap(pages[8], frames[0] << 12 | P | RW); g1 = (void *)pages[8]; g2 = (void *)pages[8]; }
    memset(pages[0], 0xab, PAGE);
    g1[20] = (struct entry1){ 1, me, MFN(pages[0]) };
    g1[21] = (struct entry1){ 5, me, MFN(pages[0]) };

    say("-- handles\n");
    for (u32 i = 0; i < 3; i++)
        map("host", (u64)pages[10 + i], 2, 20);
    unmap("unmap 1", (u64)pages[11], 0, 1); unmap("unmap 0", (u64)pages[10], 0, 0);
    map("the next", (u64)pages[10], 2, 20); map("fails", (u64)pages[10], 2, 22); map("the one after", (u64)pages[11], 2, 20);
    unmap("no address at all", 0, 0, 2); unmap("unmap 2", (u64)pages[12], 0, 2); unmap("unmap 3", (u64)pages[10], 0, 3); unmap("unmap 5", (u64)pages[11], 0, 5);
    unmap("unmap 4", (u64)pages[11], 0, 4);
    say("  grant flags %x\n", g1[20].flags);

    say("-- flags\n");
    { struct map_op m = map1((u64)window, 2 | 8 | 5 << 16, 20); say("  application, avail: %d entry %lx\n", m.status, *l1e_of((u64)window) & 0xfff0000000000fff); unmap("unmap", (u64)window, 0, m.handle);
      m = map1((u64)window, 2 | 4 | 7 << 16, 20); say("  read-only, avail: %d entry %lx\n", m.status, *l1e_of((u64)window) & 0xfff0000000000fff); unmap("unmap", (u64)window, 0, m.handle);
      m = map1(l1e_maddr((u64)window) + 4, 2 | 16, 20); say("  entry not aligned: %d\n", m.status);
      m = map1(MFN(pages[0]) << 12, 2 | 16, 20); say("  entry not in a table: %d\n", m.status);
      m = map1(0xffffffffff000, 2 | 16, 20); say("  entry nowhere: %d\n", m.status);
      say("  grant flags %x\n", g1[20].flags);
      m = map1(0, 1, 20); say("  device: %d flags %x\n", m.status, g1[20].flags);
      unmap("wrong bus address", 0, 0x1000, m.handle); unmap("host part", (u64)window, 0, m.handle);
      rc("pin it", (set_ro(pages[0]), mmuext1(0, MFN(pages[0]), 0)));
      unmap("unmap", 0, m.bus, m.handle); say("  flags %x\n", g1[20].flags); set_rw(pages[0]);
      m = map1((u64)window, 3, 20); say("  both: %d flags %x\n", m.status, g1[20].flags);
      unmap("host part", (u64)window, 0, m.handle); say("  flags %x\n", g1[20].flags); unmap("host part again", (u64)window, 0, m.handle);
      unmap("device part", 0, m.bus, m.handle); say("  flags %x\n", g1[20].flags);
      m = map1((u64)window, 2, 20);
      rc("pin a mapped one", (set_ro(pages[0]), mmuext1(0, MFN(pages[0]), 0)));
      g1[20].flags &= ~1; say("  revoked: flags %x\n", g1[20].flags); window[5] = 0x66; say("  still there %x\n", pages[0][5]);
      { struct map_op n = map1((u64)pages[3], 2, 20); say("  mapped once more: %d\n", n.status); unmap("unmap", (u64)pages[3], 0, n.handle); }
      unmap("unmap", (u64)window, 0, m.handle); say("  flags %x\n", g1[20].flags);
      m = map1((u64)window, 2, 20); say("  and now: %d\n", m.status);
      g1[20].flags = 1; set_rw(pages[0]); }
    rc("map a page table, read-only", (g1[23] = (struct entry1){ 1, me, MFN(si->pt_base) }, 0));
    { struct map_op m = map1((u64)window, 2 | 4, 23); say("  status %d reads the same %d\n", m.status, *(u64 *)window == *(u64 *)si->pt_base); unmap("unmap", (u64)window, 0, m.handle);
      m = map1((u64)window, 2, 23); say("  writable: status %d flags %x\n", m.status, g1[23].flags); }
    { set_rw(window); set_rw(pages[3]); }

    say("-- many\n");
    for (u32 i = 0; i < 3000; i++) copies[i] = (struct copy_op){ { { .mfn = MFN(pages[0]) }, DOMID_SELF, 0 }, { { .mfn = MFN(pages[2]) }, DOMID_SELF, i }, 1, 0, 99 };
    rc("copy 3000", GT(5, copies, 3000)); { u32 bad = 0; for (u32 i = 0; i < 3000; i++) bad += copies[i].status != 0; say("  failed %u last %x\n", bad, pages[2][2999]); }

    say("-- transfer\n");
    before = total();
    transfer("mapped", MFN(pages[4]), me, 30); transfer("nothing", 0xfffffffff, me, 30); transfer("Xen's", si->shared_info >> 12, me, 30);
    g1[30] = (struct entry1){ 2, me, PFN(pages[4]) };
    rc("unmap", remap(pages[4], 0));
    transfer("to myself", MFN(pages[4]), me, 30); say("  total %ld entry flags %x frame the same %d\n", total() - before, g1[30].flags, g1[30].frame == MFN(pages[4]));
    if (g1[30].flags & 8) { p2m[PFN(pages[4])] = g1[30].frame; rc("map", set_rw(pages[4])); }
    rc("unmap", remap(pages[5], 0));
    transfer("not accepted", MFN(pages[5]), me, 31); say("  total %ld\n", total() - before);
    rc("map", set_rw(pages[5]));
    rc("unmap", remap(pages[6], 0));
    transfer("to no domain", MFN(pages[6]), 77, 31); say("  total %ld\n", total() - before);

    say("-- version 2\n");
    g1[3] = (struct entry1){ 1, 7, 0x1234 };
    { u32 v = 2; rc("set_version 2", GT(8, &v, 1)); say("  gives %u entry 20 gone %d entry 3 kept %x %x %lx\n", v, g2[20].flags == 0, g2[3].flags, g2[3].domid, g2[3].frame); }
    { u32 v = 1; rc("set_version 1", GT(8, &v, 1)); say("  entry 3 kept %x %x %x\n", g1[3].flags, g1[3].domid, g1[3].frame); v = 2; rc("set_version 2", GT(8, &v, 1)); }
    { struct { u32 nr; u16 dom; short status; u64 *list; } s = { 1, DOMID_SELF, 99, status };
      rc("get_status_frames", GT(9, &s, 1)); say("  status %d\n", s.status); s.nr = 2; rc("get_status_frames 2", GT(9, &s, 1)); say("  status %d\n", s.status); }
    rc("map the status frame", remap(pages[9], status[0] << 12 | P | RW)); st = (void *)pages[9];
    { u32 v = 1; rc("set_version 1 with it mapped", GT(8, &v, 1)); say("  gives %u\n", v); }
    g2[20] = (struct entry2){ 1, me, 0, 0, MFN(pages[0]) };
    { struct map_op m = map1((u64)window, 2, 20); say("  status %d flags %x in use %x\n", m.status, g2[20].flags, st[20]);
      { u32 v = 1; rc("set_version 1 with a mapping", GT(8, &v, 1)); }
      unmap("unmap", (u64)window, 0, m.handle); say("  flags %x in use %x\n", g2[20].flags, st[20]); }
    map("one too far", (u64)window, 2, 256);
    g2[21] = (struct entry2){ 1 | 1 << 8, me, 100, 50, MFN(pages[0]) };
    map("part of a page", (u64)window, 2, 21);
    copy("part of a page", 21, 100, 0, 0, 50, 1); copy("before it", 21, 99, 0, 0, 2, 1); copy("beyond it", 21, 120, 0, 0, 40, 1); copy("none of it", 21, 150, 0, 0, 0, 1);
    say("  in use %x\n", st[21]);
    g2[22] = (struct entry2){ 3, me, me, 0, 20 };
    copy("grant of my own", 22, 0, 0, 0, 4, 1); say("  in use %x\n", st[22]);
    g2[22].off = 77; copy("grant of no domain's", 22, 0, 0, 0, 4, 1);
    map("grant of a grant", (u64)window, 2, 22);
    g2[23] = (struct entry2){ 5, me, 0, 0, MFN(pages[0]) };
    copy("from a read-only one", 23, 0, 0, 0, 4, 1); copy("to a read-only one", 0, 0, 23, 0, 4, 2); say("  in use %x\n", st[23]);
    g2[24] = (struct entry2){ 1, me, 0, 0, 1ul << 40 };
    copy("no frame", 24, 0, 0, 0, 4, 1); say("  in use %x\n", st[24]);
    { struct { u32 a, b; short status; } sw = { 20, 24, 99 }; rc("swap_grant_ref", GT(11, &sw, 1)); say("  status %d moved %d\n", sw.status, g2[20].frame == 1ul << 40); }
    g2[5] = (struct entry2){ 1, me, 0, 0, 1ul << 40 };
    { u32 v = 1; rc("unmap the status frame", remap(pages[9], 0)); rc("set_version 1 with a far frame", GT(8, &v, 1)); g2[5].flags = 0; v = 1; rc("set_version 1", GT(8, &v, 1)); say("  gives %u\n", v); }
    { struct { u16 dom; u32 nr, max; short status; } q = { DOMID_SELF, 99, 99, 99 }; GT(6, &q, 1); say("  nr %u\n", q.nr); }

    say("-- more than there can be\n");
    g1[21] = (struct entry1){ 5, me, MFN(pages[0]) };
    for (u32 i = 0; i < 300; i++) maps[i] = (struct map_op){ (u64)pages[10 + i % 16], 2 | 4, 21, me, 99, 0, 0 };
    { u32 bad = 0; for (u32 i = 0; i < 300; i++) { GT(0, maps + i, 1); bad += maps[i].status != 0; } say("  of 300 mappings %u failed, the 128th %d, the 129th %d\n", bad, maps[127].status, maps[128].status); }
    for (u32 i = 0; i < 300; i++) unmaps[i] = (struct unmap_op){ (u64)pages[10 + i % 16], 0, maps[i].handle, 99 };
    rc("unmap those", GT(1, unmaps, 128)); { u32 bad = 0; for (u32 i = 0; i < 128; i++) bad += unmaps[i].status != 0; say("  failed %u flags %x\n", bad, g1[21].flags); }
    for (u32 i = 10; i < 26; i++) set_rw(pages[i]);

    say("-- arguments\n");
    rc("command with high bits", GT(0x1000, maps, 0)); rc("map none", GT(0, EFAULT_ADDR, 0)); rc("map none at Xen's", GT(0, XEN_ADDR, 0));
    rc("unmap at Xen's", GT(1, XEN_ADDR, 1)); rc("set_version, count 7", GT(10, EFAULT_ADDR, 7));
    { struct { u64 bus; u16 off, len; u32 op; } c = { MFN(pages[0]) << 12, 0, 64, 1 };
      rc("cache_flush", GT(12, &c, 1)); c.op = 4; rc("unknown", GT(12, &c, 1)); c.op = 1; c.off = 4090; rc("over the end", GT(12, &c, 1));
      c.off = 0; c.len = 0; rc("nothing", GT(12, &c, 1)); c.len = 1; c.bus = 1ul << 50; rc("nowhere", GT(12, &c, 1)); }
    rc("dump_table", GT(3, maps, 1));
}
