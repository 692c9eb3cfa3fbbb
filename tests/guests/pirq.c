/*
 * Lines that do interrupt: the keyboard controller is told to put a byte into its output buffer (as from the keyboard,
 * irq 1, or from the mouse, irq 12), and asserts its line until that is read. A pseudo-random series of such bytes, EOIs,
 * masks, bindings, changes of trigger and pauses; after each what became of it: the ports' pending bits and the pins.
 * With settle=1 there are 2 vCPUs, each on a CPU of its own, to which the ports are moved; and a pause after each step.
 * Nothing is printed before the end: a character takes the serial line 87 us, and an EOI that is due for 1 ms is forced.
 */
#include "lib.h"
#define now() system_time(&VI->time)

#define PHYS(op, arg) HC2(HC_physdev_op, op, arg)
enum { BYTE, READ, EOI, MASK, UNMASK, CONSUME, BIND, CLOSE, TRIGGER, WAIT, NOTIFY, MOVE, OPS };
static const char *names[OPS] = { "byte", "read", "eoi", "mask", "unmask", "consume", "bind", "close", "trigger", "wait", "notify", "move" };
struct record { u8 op, irq, arg, full; s32 result; u8 pending[2], masked[2]; u32 pin[2], dest[2]; };
static struct record records[4000];
static const u32 irqs[2] = { 1, 12 };
static u32 ports[2], n;
static u64 state, settle;

static u32 rnd(u32 below) { state = state * 6364136223846793005ul + 1442695040888963407ul; return (u32)(state >> 33) % below; }
static void out(u16 port, u8 v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static u8 in(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u32 pin(u32 irq, u32 half)
{
    struct { u64 base; u32 reg, value; } a = { 0xfec00000ul, 0x10 + 2 * irq + half, 0 };
    PHYS(8, &a);
    return a.value & ~0x1000u; /* without the delivery status */
}
static u64 bit(u32 port) { return 1ul << port; }

static s32 doit(u32 op, u32 i, u32 arg)
{
    u32 irq = irqs[i], port = ports[i];
    switch (op) {
    case BYTE: if (in(0x64) & 1) return -16; out(0x64, i ? 0xd3 : 0xd2); out(0x60, 0x55); return 0;
    case READ: if (!(in(0x64) & 1)) return -61; in(0x60); return 0;
    case EOI: return PHYS(12, &irq);
    case MASK: if (!port) return -2; __atomic_or_fetch((u64 *)&SI->mask[0], bit(port), __ATOMIC_SEQ_CST); return 0;
    case UNMASK: return port ? EV(9, &port) : -2;
    case CONSUME: if (!port) return -2; __atomic_and_fetch((u64 *)&SI->pending[0], ~bit(port), __ATOMIC_SEQ_CST); return 0;
    case BIND: { struct { u32 pirq, flags, port; } b = { irq, arg, 0 }; s32 r = EV(2, &b); if (!r) ports[i] = b.port; return r; }
    case CLOSE: { s32 r = EV(3, &port); if (!r) ports[i] = 0; return r; }
    case TRIGGER: { struct { u64 base; u32 reg, value; } a = { 0xfec00000ul, 0x10 + 2 * irq, irq | arg << 15 };
                    if (in(0x64) & 1) return -16; /* QEMU sees a level only when it begins */
                    if (port) { EV(3, &port); ports[i] = 0; }
                    return PHYS(9, &a); }
    /* A pause is where QEMU lets another CPU run. */
    case WAIT: { u64 t = now() + 3000000; while (now() < t) __asm__ volatile("pause"); return 0; }
    case MOVE: { u32 v[2] = { port, arg }; return EV(8, v); }
    default: return PHYS(4, 0);
    }
}

static void step(u32 op, u32 i, u32 arg)
{
    struct record *r = &records[n++];
    s32 result = doit(op, i, arg);
    if (settle) doit(WAIT, 0, 0);
    u8 full = in(0x64) & 1;
    *r = (struct record){ op, irqs[i], arg, full, result, { 0, 0 }, { 0, 0 }, { pin(1, 0), pin(12, 0) }, { pin(1, 1) >> 24, pin(12, 1) >> 24 } };
    for (i = 0; i < 2; i++) if (ports[i]) { r->pending[i] = SI->pending[0] >> ports[i] & 1; r->masked[i] = SI->mask[0] >> ports[i] & 1; }
}

void test(void)
{
    static const u8 choice[] = { BYTE, BYTE, BYTE, READ, READ, READ, EOI, EOI, EOI, MASK, UNMASK, CONSUME, CONSUME, BIND, BIND, CLOSE, TRIGGER, TRIGGER, WAIT, NOTIFY };
    static const u8 moving[] = { BYTE, BYTE, BYTE, READ, READ, READ, CONSUME, CONSUME, BIND, BIND, CLOSE, TRIGGER, MOVE, MOVE, MOVE, MASK, UNMASK };
    u32 iopl = 1, ops = num("ops", 500);
    settle = num("settle", 0);
    state = num("seed", 1);
    PHYS(6, &iopl);
    out(0x64, 0x60); out(0x60, 0x03); /* both interrupts on, both devices on */
    while (in(0x64) & 1) in(0x60);
    for (u32 i = 0; i < 2; i++) {
        struct { u16 domid; s32 type, index, pirq, bus, devfn, entry_nr; u64 table_base; } m = { DOMID_SELF, 1, irqs[i], irqs[i], 0, 0, 0, 0 };
        PHYS(13, &m); }
    while (n < ops) { u32 op = settle ? moving[rnd(sizeof moving)] : choice[rnd(sizeof choice)], i = rnd(2), arg = rnd(4) != 0; step(op, i, arg); }
    for (u32 i = 0; i < n; i++) {
        struct record *r = &records[i];
        say("%s %u %u: %e full %u pending %u%u masked %u%u pins %x %x", names[r->op], r->irq, r->arg, (long)r->result, r->full,
            r->pending[0], r->pending[1], r->masked[0], r->masked[1], r->pin[0], r->pin[1]);
        if (settle) say(" to %x %x", r->dest[0], r->dest[1]);
        say("\n"); }
}
