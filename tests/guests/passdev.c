/*
 * Lines given to another domain, which never runs: what domain 0 may map to it and take back, permission by domctl, the
 * other's numbers, its end.
 */
#include "lib.h"

#define PHYS(op, arg) HC2(HC_physdev_op, op, arg)
static u32 version;
static struct { u32 cmd, version; u16 domain, pad[3]; union { u8 bytes[128]; u32 words[32]; } u; } d;

static long domctl(u32 cmd, u16 domain) { d.cmd = cmd; d.version = version; d.domain = domain; return HC1(HC_domctl, &d); }
static void map(u32 domid, s32 index, s32 pirq)
{
    struct { u16 domid; s32 type, index, pirq, bus, devfn, entry_nr; u64 table_base; } m = { domid, 1, index, pirq, 0, 0, 0, 0 };
    long r = PHYS(13, &m);
    say("map %u %d %d: %e pirq %d\n", domid, index, pirq, r, m.pirq);
}
static void map_msi(u32 domid, s32 index, s32 pirq)
{
    struct { u16 domid; s32 type, index, pirq, bus, devfn, entry_nr; u64 table_base; } m = { domid, 0, index, pirq, 0, 0x28, 0, 0 };
    long r = PHYS(13, &m);
    say("map_msi %u %d %d: %e pirq %d\n", domid, index, pirq, r, m.pirq);
}
static void unmap(u32 domid, s32 pirq)
{
    struct { u16 domid; s32 pirq; } m = { domid, pirq };
    say("unmap %u %d: %e\n", domid, pirq, PHYS(14, &m));
}
static void permit(u32 domid, u32 pirq, u32 allow)
{
    memset(d.u.bytes, 0, sizeof d.u); d.u.words[0] = pirq; d.u.bytes[4] = allow;
    say("permit %u %u %u: %e\n", domid, pirq, allow, domctl(19, domid));
}
static u32 port;
static void bind(u32 pirq, u32 flags)
{
    struct { u32 pirq, flags, port; } b = { pirq, flags, 0 };
    say("bind %u %u: %e\n", pirq, flags, EV(2, &b));
    if (b.port) port = b.port;
}
static void close(void) { say("close: %e\n", EV(3, &port)); }

void test(void)
{
    for (version = 0x10; version < 0x20; version++) {
        memset(d.u.bytes, 0, sizeof d.u);
        d.u.words[7] = 1; d.u.words[8] = 1023; d.u.words[9] = 4; d.u.words[10] = 4; d.u.words[11] = 1;
        long r = domctl(1, 1);
        if (r == -13) continue;
        if (r) { say("domctl %x: %e\n", version, r); return; }
        break; }
    { u8 dev[2] = { 0, 0x28 }; PHYS(15, dev); }
    say("begin steps\n");
    map(1, 9, 9); map(1, 10, -1); map(1, 11, 55); map(1, 11, 54); map(1, 11, -1); map(1, 12, 56); map(1, 12, 55); map(1, 0, 0); map(1, 24, 3); map(1, 13, -1);
    map(2, 9, 9); map(0, 9, 9); map(0, 9, 9); bind(9, 1); close(); map(0, 11, 11); bind(11, 0); close();
    unmap(1, 12); unmap(1, 55); unmap(1, 56); unmap(2, 9); unmap(1, -1); map(1, 11, 20); bind(11, 1); close();
    permit(1, 9, 0); permit(1, 9, 1); permit(1, 14, 1); permit(1, 200, 1); permit(1, 11, 1); permit(0, 11, 0); bind(11, 1); map(1, 11, 20); map(0, 11, 11); map(1, 11, -1);
    permit(0, 11, 1); unmap(0, 9); unmap(1, 9); map(0, 9, 9); map(1, 9, 9); permit(1, 9, 1);
    for (u32 i = 0; i < 4; i++) map(1, 5 + i, -1);
    map_msi(1, -1, -1); map_msi(1, 9, -1); map_msi(1, 24, -1); map_msi(1, -1, 70);
    say("destroy: %e\n", domctl(2, 1)); map(1, 10, 10); map(0, 10, 10); bind(10, 0); map(0, 12, 12); bind(12, 0);
}
