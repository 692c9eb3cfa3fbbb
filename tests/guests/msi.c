/*
 * Messages that do interrupt: QEMU's "edu" (at 00:05.0: one MSI, without a mask bit) raises its own when a register says
 * so, a virtio serial controller (00:06.0: MSI-X) that of a queue whose data it throws away. A pseudo-random series of
 * mapping, binding, raising, EOIs; after each the ports' pending bits, and the mask and pending bits of the MSI-X table.
 * Printed at the end, as in pirq.c.
 */
#include "lib.h"
#define now() system_time(&VI->time)

#define PHYS(op, arg) HC2(HC_physdev_op, op, arg)
#define COUNT 6 /* 0 to 4 are entries of MSI-X, 5 the edu's message */
enum { MAP, UNMAP, BIND, CLOSE, RAISE, EOI, MASK, UNMASK, CONSUME, WAIT, OPS };
static const char *names[OPS] = { "map", "unmap", "bind", "close", "raise", "eoi", "mask", "unmask", "consume", "wait" };
struct record { u8 op, which, arg; s32 result, pirq; u32 ports, pending, control, held; };
static struct record records[4000];
static s32 pirqs[COUNT];
static u32 ports[COUNT], n;
static u64 state, table_base;
static volatile u32 *table, *held, *edu;
static u16 serial; /* its I/O ports */
/* Queues that nobody reads: the output of ports that aren't there. A ring is two pages of `pages`. */
static const u16 queues[5] = { 1, 5, 7, 9, 11 };
static u16 kicked[5];

static u32 rnd(u32 below) { state = state * 6364136223846793005ul + 1442695040888963407ul; return (u32)(state >> 33) % below; }
static void outl(u16 port, u32 v) { __asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port)); }
static u32 inl(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static void outw(u16 port, u16 v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static void outb(u16 port, u8 v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u32 config(u32 slot, u32 reg) { outl(0xcf8, 0x80000000u | slot << 11 | reg); return inl(0xcfc); }
static void set_config(u32 slot, u32 reg, u32 v) { outl(0xcf8, 0x80000000u | slot << 11 | reg); outl(0xcfc, v); }
static u32 capability(u32 slot, u32 id)
{
    u32 at = config(slot, 0x34) & 0xff;
    while (at && (config(slot, at) & 0xff) != id) at = config(slot, at) >> 8 & 0xff;
    return at;
}
static volatile u32 *mmio(u32 page, u64 address, u64 flags)
{
    rc("map registers", remap(pages[page], (address & ~0xffful) | P | PCD | A | D | flags));
    return (volatile u32 *)pages[page];
}
static void enable(u32 slot, u32 id, u16 bit) /* Xen lets only 16 bits of it be written */
{
    u32 at = capability(slot, id), control = config(slot, at) >> 16;
    outl(0xcf8, 0x80000000u | slot << 11 | at);
    outw(0xcfe, control | bit);
}
static void raise(u32 i)
{
    u8 *ring = pages[20 + 2 * i];
    *(u64 *)ring = MFN(pages[40]) << 12;
    *(u64 *)(ring + 8) = 16; /* bytes, to be read by the device */
    *(u16 *)(ring + 2048 + 4 + kicked[i] % 128 * 2) = 0;
    *(volatile u16 *)(ring + 2048 + 2) = ++kicked[i];
    outw(serial + 16, queues[i]);
}
static s32 doit(u32 op, u32 i, u32 arg)
{
    u32 port = ports[i];
    switch (op) {
    case MAP: {
        struct { u16 domid; s32 type, index, pirq, bus, devfn, entry_nr; u64 table_base; }
            m = { DOMID_SELF, 0, -1, arg ? -1 : 100 + (s32)i, 0, i == 5 ? 0x28 : 0x30, i == 5 ? 0 : i, i == 5 ? 0 : table_base };
        s32 r;
        /* Without a message register of its own a second MSI would go nowhere. */
        if (i == 5 && pirqs[i]) return -16;
        r = PHYS(13, &m);
        if (!r) { pirqs[i] = m.pirq; if (i == 5) enable(5, 5, 1); }
        return r; }
    case UNMAP: { struct { u16 domid; s32 pirq; } u = { DOMID_SELF, pirqs[i] }; s32 r = PHYS(14, &u); if (!r && !port) pirqs[i] = 0; return r; }
    case BIND: { struct { u32 pirq, flags, port; } b = { pirqs[i], arg, 0 }; s32 r = EV(2, &b); if (!r) ports[i] = b.port; return r; }
    case CLOSE: { s32 r = EV(3, &port); if (!r) ports[i] = 0; return r; }
    case RAISE: if (i == 5) { edu[0x60 / 4] = 1; edu[0x64 / 4] = 1; return 0; }
                raise(i); return 0;
    case EOI: { u32 irq = pirqs[i]; return PHYS(12, &irq); }
    case MASK: if (!port) return -2; __atomic_or_fetch((u64 *)&SI->mask[0], 1ul << port, __ATOMIC_SEQ_CST); return 0;
    case UNMASK: return port ? EV(9, &port) : -2;
    case CONSUME: if (!port) return -2; __atomic_and_fetch((u64 *)&SI->pending[0], ~(1ul << port), __ATOMIC_SEQ_CST); return 0;
    default: { u64 t = now() + 3000000; while (now() < t); return 0; }
    }
}
static void step(u32 op, u32 i, u32 arg)
{
    struct record *r = &records[n++];
    s32 result = doit(op, i, arg);
    *r = (struct record){ op, i, arg, result, pirqs[i], 0, 0, 0, 0 };
    for (i = 0; i < COUNT; i++) if (ports[i]) { r->ports |= 1u << i; r->pending |= (SI->pending[0] >> ports[i] & 1) << i; }
    for (i = 0; i < 5; i++) r->control |= (table[i * 4 + 3] & 1) << i;
    r->held = held[0] & 31;
}
void test(void)
{
    static const u8 choice[] = { MAP, MAP, MAP, UNMAP, BIND, BIND, BIND, CLOSE, RAISE, RAISE, RAISE, RAISE, RAISE, RAISE, EOI, EOI, MASK, UNMASK, CONSUME, CONSUME, CONSUME, WAIT };
    u32 iopl = 1, ops = num("ops", 500);
    state = num("seed", 1);
    PHYS(6, &iopl);
    for (u8 slot = 5; slot < 7; slot++) {
        u8 d[2] = { 0, slot << 3 };
        rc("manage_pci_add", PHYS(15, d));
        say("device %x command %x\n", config(slot, 0), config(slot, 4) & 7);
        set_config(slot, 4, (config(slot, 4) & 0xffff) | 6); }
    edu = mmio(10, config(5, 0x10) & ~15u, RW);
    serial = config(6, 0x10) & ~3u;
    table_base = config(6, 0x14) & ~15u;
    table = mmio(12, table_base, 0); held = mmio(13, table_base + 0x800, 0);
    say("msi %x msix %x, table at %x, pending bits at %x\n", config(5, capability(5, 5)) >> 16, config(6, capability(6, 17)) >> 16,
        config(6, capability(6, 17) + 4), config(6, capability(6, 17) + 8));
    held = mmio(13, table_base + (config(6, capability(6, 17) + 8) & ~7u), 0) + (config(6, capability(6, 17) + 8) & 0xff8) / 4;
    enable(6, 17, 0x8000);
    outb(serial + 18, 0); outb(serial + 18, 1); outb(serial + 18, 3); outl(serial + 4, 0);
    for (u16 i = 0; i < 5; i++) {
        outw(serial + 14, queues[i]);
        outl(serial + 8, MFN(pages[20 + 2 * i]));
        outw(serial + 22, i);
        say("queue %u: %u entries, vector %u, contiguous %d\n", queues[i], inw(serial + 12), inw(serial + 22),
            MFN(pages[21 + 2 * i]) == MFN(pages[20 + 2 * i]) + 1); }
    outb(serial + 18, 7);
    say("begin steps\n");
    while (n < ops) { u32 op = choice[rnd(sizeof choice)], i = rnd(COUNT), arg = rnd(4) != 0; step(op, i, arg); }
    for (u32 i = 0; i < n; i++) {
        struct record *r = &records[i];
        say("%s %u %u: %e pirq %d ports %x pending %x control %x held %x\n", names[r->op], r->which, r->arg, (long)r->result, r->pirq, r->ports,
            r->pending, r->control, r->held); }
}
