/*
 * Physical interrupts as domain 0 asks for them: physdev_op on lines and on messages of absent devices, bind_pirq, the
 * EOI map (eoi=1: version 1, which also unmasks at EOI). No device of the machine is made to interrupt.
 */
#include "lib.h"

#define PHYS(op, arg) HC2(HC_physdev_op, op, arg)
#define BASE_APIC 0xfec00000ul

struct map { u16 domid; s32 type, index, pirq, bus, devfn, entry_nr; u64 table_base; };
static u64 *eoi_map;

static s32 query(u32 irq)
{
    struct { u32 irq, flags; } q = { irq, 0x55 };
    long r = PHYS(5, &q);
    say("status_query %d: %e flags %x\n", irq, r, q.flags);
    return r;
}
static u32 bind(u32 pirq, u32 flags)
{
    struct { u32 pirq, flags, port; } b = { pirq, flags, 0 };
    long r = EV(2, &b);
    say("bind_pirq %d flags %u: %e port %u\n", pirq, flags, r, b.port);
    return r ? 0 : b.port;
}
static void status(u32 port)
{
    u32 s[6] = { DOMID_SELF, port, 0, 0, 0, 0 };
    long r = EV(5, s);
    say("  port %u: %e kind %u vcpu %u pirq %d, pending %ld mask %ld\n", port, r, s[2], s[3], s[4], SI->pending[0] >> port & 1, SI->mask[0] >> port & 1);
}
static void close(u32 port) { say("close %u: %e\n", port, EV(3, &port)); }
static void eoi(u32 irq) { say("eoi %d: %e\n", irq, PHYS(12, &irq)); }
static void unmap(u32 domid, s32 pirq)
{
    struct { u16 domid; s32 pirq; } u = { domid, pirq };
    say("unmap %x %d: %e\n", domid, pirq, PHYS(14, &u));
}
static s32 map_at(u32 domid, s32 type, s32 index, s32 pirq, s32 bus, s32 devfn, s32 entry, u64 table)
{
    struct map m = { domid, type, index, pirq, bus, devfn, entry, table };
    long r = PHYS(13, &m);
    say("map %x type %d index %d pirq %d: %e, now type %d index %d pirq %d entry %d\n", domid, type, index, pirq, r, m.type, m.index, m.pirq, m.entry_nr);
    return r ? -1 : m.pirq;
}
static s32 map(u32 domid, s32 type, s32 index, s32 pirq) { return map_at(domid, type, index, pirq, 0, 0, 0, 0); }
static u32 apic(u32 reg)
{
    struct { u64 base; u32 reg, value; } a = { BASE_APIC, reg, 0x5555 };
    PHYS(8, &a);
    return a.value;
}
static void pin(u32 n) { say("  pin %u: %x %x\n", n, apic(0x11 + 2 * n), apic(0x10 + 2 * n)); }
static void put(u32 n, u32 value)
{
    struct { u64 base; u32 reg, value; } a = { BASE_APIC, 0x10 + 2 * n, value };
    say("apic_write pin %u %x: %e\n", n, value, PHYS(9, &a));
    if (n < 24) pin(n);
}
static void gsi(s32 n, u8 triggering, u8 polarity)
{
    struct { s32 gsi; u8 triggering, polarity; } g = { n, triggering, polarity };
    say("setup_gsi %d %u %u: %e\n", n, triggering, polarity, PHYS(21, &g));
    if (n >= 0 && n < 24) pin(n);
}
static void free_pirq(s32 type)
{
    struct { s32 type; u32 pirq; } f = { type, 0x55 };
    long r = PHYS(23, &f);
    say("get_free_pirq %d: %e pirq %d\n", type, r, f.pirq);
}
static void bits(const char *name)
{
    say("eoi map %s:", name);
    for (int i = 0; i < 512; i++) if (eoi_map[i]) say(" [%d] %lx", i, eoi_map[i]);
    say("\n");
}

static void numbers(void)
{
    static const u32 irqs[] = { 0, 1, 9, 15, 16, 23, 24, 100, 5000, 0x80000000, 0xffffffff };
    u32 n;
    say("-- numbers\n");
    for (u32 i = 0; i < sizeof irqs / 4; i++) query(irqs[i]);
    for (n = 0; n < 4096; n++) { struct { u32 pirq, flags, port; } b = { n, 0, 0 }; if (EV(2, &b) == -22) break; }
    say("nr_pirqs %u\n", n);
    query(n - 1); query(n);
    bind(0, 0); bind(1, 0); bind(4, 1); bind(n - 1, 0); bind(n, 0); bind(0xffffffff, 0);
    eoi(0); eoi(1); eoi(n - 1); eoi(n); eoi(0xffffffff);
    rc("unmask_notify", PHYS(4, 0));
    rc("free_irq_vector", PHYS(11, pages[0])); rc("18", PHYS(18, pages[0])); rc("22", PHYS(22, pages[0])); rc("32", PHYS(32, pages[0]));
    rc("-1", PHYS(-1, pages[0]));
}

static void registers(void)
{
    struct { u64 base; u32 reg, value; } a = { BASE_APIC + 0x1000, 0, 0x5555 };
    say("-- apic_read\n");
    rc("other base", PHYS(8, &a)); a.base = 0; rc("base 0", PHYS(8, &a)); say("value %x\n", a.value);
    for (u32 i = 0; i < 5; i++) say("register %u: %x\n", i, apic(i));
    say("register 15: %x, 64: %x, 256: %x\n", apic(15), apic(64), apic(256));
    for (u32 i = 0; i < 24; i++) pin(i);
}

static void vectors(void)
{
    static const u32 irqs[] = { 0, 1, 7, 23, 24, 300, 0xffffffff };
    say("-- alloc_irq_vector\n");
    for (u32 i = 0; i < sizeof irqs / 4; i++) {
        struct { u32 irq, vector; } v = { irqs[i], 0x55 };
        say("%d: %e", irqs[i], PHYS(10, &v)); say("  vector %d\n", v.vector); }
}

static void lines(void)
{
    u32 a, b;
    say("-- map_pirq, lines\n");
    map(DOMID_SELF, 1, -1, -1); map(DOMID_SELF, 1, 24, -1); map(DOMID_SELF, 1, 1000, 1); map(DOMID_SELF, 1, 0, 0);
    map(DOMID_SELF, 1, 1, 1); map(DOMID_SELF, 1, 1, 1); map(DOMID_SELF, 1, 1, -1); map(DOMID_SELF, 1, 1, 6); map(DOMID_SELF, 1, 6, 1);
    map(DOMID_SELF, 1, 3, -1); map(DOMID_SELF, 1, 3, 3); map(DOMID_SELF, 1, 4, 4); map(DOMID_SELF, 1, 7, 1000); map(DOMID_SELF, 1, 7, 100);
    map(0, 1, 9, 9); map(1, 1, 9, 9); map(DOMID_XEN, 1, 9, 9); map(DOMID_SELF, 2, 9, 9); map(DOMID_SELF, 5, 9, 9); map(DOMID_SELF, -1, 9, 9);
    map(DOMID_SELF, 1, 16, 16); map(DOMID_SELF, 1, 17, -1); map(DOMID_SELF, 1, 2, 2);
    say("-- bind_pirq\n");
    query(1); eoi(1);
    a = bind(1, 0); status(a); bind(1, 0); bind(1, 1); bind(4, 1); bind(4, 0);
    query(1); eoi(1); query(9);
    b = bind(9, 1); status(b); bind(16, 1); bind(3, 0); bind(100, 1); bind(2, 0);
    { u32 v[2] = { a, 0 }; rc("bind_vcpu 0", EV(8, v)); v[1] = 1; rc("bind_vcpu 1", EV(8, v)); }
    { u32 p = a; rc("send", EV(4, &p)); rc("unmask", EV(9, &p)); status(a); }
    pin(1); pin(9); pin(16); pin(6);
    close(b); status(b); pin(9); b = bind(9, 0); bind(9, 1); close(b); close(a); pin(1); a = bind(1, 1); status(a);
    say("-- unmap_pirq\n");
    unmap(DOMID_SELF, -1); unmap(DOMID_SELF, 5); unmap(DOMID_SELF, 1000); unmap(1, 1); unmap(0, 17); unmap(DOMID_SELF, 17); unmap(DOMID_SELF, 4); bind(4, 1);
    unmap(DOMID_SELF, 1); status(a); query(1); eoi(1); unmap(DOMID_SELF, 1); bind(1, 1);
    map(DOMID_SELF, 1, 1, -1); map(DOMID_SELF, 1, 1, 1); map(DOMID_SELF, 1, 1, 8); bind(8, 0); close(a); bind(1, 0);
    map(DOMID_SELF, 1, 1, 1); a = bind(1, 0); map(DOMID_SELF, 1, 8, 8); unmap(DOMID_SELF, 8); close(a); unmap(DOMID_SELF, 1);
}

static void free_numbers(void)
{
    say("-- get_free_pirq\n");
    free_pirq(0); free_pirq(0); free_pirq(1); free_pirq(1); free_pirq(2); free_pirq(-1); free_pirq(3); free_pirq(4);
    unmap(DOMID_SELF, 18); unmap(DOMID_SELF, 207); free_pirq(0); map(DOMID_SELF, 1, 18, 18); map(DOMID_SELF, 1, 19, -1); bind(207, 0); eoi(207); query(207);
}

static void messages(void)
{
    say("-- map_pirq, messages of absent devices\n");
    map_at(DOMID_SELF, 0, -1, -1, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 0, -1, 150, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 0, -1, -1, 0, 0xf8, 3, 0xfe000000);
    map_at(DOMID_SELF, 3, -1, -1, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 3, -1, -1, 0x10000, 0xf8, 0, 0);
    map_at(DOMID_SELF, 4, -1, -1, 0, 0xf8, 1, 0); map_at(DOMID_SELF, 4, -1, -1, 0, 0xf8, 2, 0); map_at(DOMID_SELF, 4, -1, -1, 0, 0xf8, 0, 0);
    map_at(DOMID_SELF, 4, -1, -1, 0, 0xf8, 33, 0); map_at(DOMID_SELF, 4, -1, -1, 0, 0xf8, 1, 0xfe000000); map_at(DOMID_SELF, 4, -1, 160, 0, 0xf8, 4, 0);
    map_at(DOMID_SELF, 0, 5, -1, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 0, 24, -1, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 0, 500, -1, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 0, -2, -1, 0, 0xf8, 0, 0);
    map_at(1, 0, -1, -1, 0, 0xf8, 0, 0); map_at(DOMID_SELF, 0, -1, 1000, 0, 0xf8, 0, 0);
    { u8 d[2] = { 0, 0xf8 }; rc("restore_msi", PHYS(19, d)); rc("manage_pci_remove", PHYS(16, d)); }
    { struct { u16 seg; u8 bus, devfn; } d = { 0, 0, 0xf8 };
      rc("restore_msi_ext", PHYS(27, &d)); rc("prepare_msix", PHYS(30, &d)); rc("release_msix", PHYS(31, &d)); rc("pci_device_remove", PHYS(26, &d));
      d.seg = 7; rc("restore_msi_ext, segment 7", PHYS(27, &d)); rc("prepare_msix, segment 7", PHYS(30, &d)); rc("pci_device_remove, segment 7", PHYS(26, &d)); }
    { struct { u8 bus, devfn; u32 ext, virt; u8 pbus, pdevfn; } d = { 0, 0xf8, 2, 0, 0, 0 }; rc("manage_pci_add_ext, ext 2", PHYS(20, &d)); d.ext = 0; d.virt = 2; rc("manage_pci_add_ext, virt 2", PHYS(20, &d)); }
    { u8 d[2] = { 0, 0xf8 }; rc("manage_pci_add", PHYS(15, d)); rc("again", PHYS(15, d)); rc("restore_msi", PHYS(19, d)); map_at(DOMID_SELF, 0, -1, -1, 0, 0xf8, 0, 0);
      map_at(DOMID_SELF, 0, -1, -1, 0, 0xf8, 0, 0xfe000000); rc("manage_pci_remove", PHYS(16, d)); rc("again", PHYS(16, d)); }
    { struct { u16 seg; u8 bus, devfn; u32 flags; u8 pbus, pdevfn; u32 opt[1]; } d = { 0, 0, 0xf8, 0, 0, 0, { 0 } };
      rc("pci_device_add", PHYS(25, &d)); rc("pci_device_remove", PHYS(26, &d)); }
}

static void writes(void)
{
    struct { u64 base; u32 reg, value; } a = { BASE_APIC + 0x1000, 0x1c, 6 };
    say("-- apic_write\n");
    rc("other base", PHYS(9, &a)); a.base = BASE_APIC;
    a.reg = 0; a.value = 0xffffffff; rc("register 0", PHYS(9, &a)); a.reg = 1; rc("register 1", PHYS(9, &a)); a.reg = 0x1d; rc("second half", PHYS(9, &a));
    say("register 0 %x 1 %x\n", apic(0), apic(1)); pin(6);
    put(6, 0x200); put(6, 0x10006); put(6, 6); bind(6, 0); put(6, 0x8006); put(6, 0x10006);
    put(7, 0x807); bind(7, 0); put(7, 0xa007); bind(100, 0); put(12, 0x8000 | 200); put(12, 255); put(12, 0x100ff); put(12, 12); put(12, 0xffff0000 | 12);
    put(20, 0x1a014); put(20, 0xa014); bind(20, 1); put(20, 0x14); put(4, 4); put(0, 0); put(0, 0x10000);
    put(21, 22); bind(21, 0); bind(22, 0); put(22, 22); put(23, 0x17); bind(23, 0);
}

static void gsis(void)
{
    say("-- setup_gsi\n");
    gsi(-1, 0, 0); gsi(24, 0, 0); gsi(1000, 1, 1); gsi(0, 0, 0); gsi(4, 1, 1); gsi(9, 1, 0); gsi(9, 0, 1);
    gsi(5, 1, 1); gsi(5, 0, 0); gsi(14, 1, 1); gsi(14, 1, 1); gsi(15, 0, 0); gsi(16, 1, 1); gsi(18, 1, 1); gsi(18, 1, 1); gsi(19, 0, 1); gsi(13, 2, 3);
    gsi(6, 1, 1); gsi(20, 1, 1); map(DOMID_SELF, 1, 18, 18); bind(18, 0); gsi(18, 0, 0);
}

static void gmfn(long version)
{
    u64 g;
    u32 a, b, c;
    eoi_map = (u64 *)pages[1];
    memset(eoi_map, 0, PAGE); eoi_map[0] = 0x8002; eoi_map[63] = 1;
    say("-- pirq_eoi_gmfn\n");
    g = ~0ul; rc("no frame", PHYS(28, &g)); g = 0; rc("frame 0", PHYS(28, &g)); g = *(u64 *)((char *)si + 56) >> 12; rc("not ours", PHYS(28, &g));
    g = MFN(si->pt_base); rc("a page table", PHYS(28, &g)); g = MFN(pages[2]); set_ro(pages[2]); set_rw(pages[2]);
    g = MFN(pages[1]); rc("good", PHYS(version == 1 ? 17 : 28, &g)); rc("again", PHYS(28, &g)); rc("version 1", PHYS(17, &g)); rc("bad after good", (g = ~0ul, PHYS(28, &g)));
    bits("at first");
    map(DOMID_SELF, 1, 11, 11); a = bind(11, 0); bits("level bound"); map(DOMID_SELF, 1, 15, 15); b = bind(15, 0); bits("edge bound");
    map(DOMID_SELF, 1, 10, 170); c = bind(170, 1); bits("level bound as 170");
    __atomic_or_fetch((u64 *)&SI->mask[0], 1ul << a | 1ul << b, __ATOMIC_SEQ_CST);
    eoi(11); eoi(15); status(a); status(b); eoi(12); eoi(199);
    close(a); close(b); close(c); bits("closed"); unmap(DOMID_SELF, 11); bits("unmapped");
}

/* How many bytes each operation reads: the least that end at an unmapped page and don't fault. All of them are 0. */
static void sizes(void)
{
    static const u8 ops[] = { 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 19, 20, 16, 21, 23, 24, 25, 26, 27, 28, 29, 30, 31 };
    say("-- sizes\n");
    memset(pages[8], 0, PAGE);
    remap(pages[9], 0);
    for (u32 i = 0; i < sizeof ops; i++) {
        long r = -14;
        u32 size = 0;
        while (r == -14 && size < 64) r = PHYS(ops[i], pages[9] - ++size);
        say("%u: %u bytes, %e\n", ops[i], size, r);
        memset(pages[8], 0, PAGE); }
}

void test(void)
{
    numbers(); registers(); vectors(); lines(); free_numbers(); messages(); writes(); gsis(); gmfn(num("eoi", 2));
    sizes();
    { u32 r = DOMID_SELF; rc("reset", EV(10, &r)); }
    bind(9, 0); query(9); for (u32 i = 0; i < 24; i++) pin(i);
}
