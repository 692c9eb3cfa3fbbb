/*
 * evfuzz-deep: as evfuzz, a pseudo-random sequence of event-channel operations run as a guest kernel whose transcript
 * must be the same on every faithful implementation; with what evfuzz leaves out: upcalls held off so that queues
 * grow, a second vCPU (never started) with queues of its own, the switch to FIFO in mid-run with events pending,
 * control blocks and array pages that come late or are refused, priorities moved at will, reset out of FIFO.
 * Command line: seed=N ops=N. VIRQs 2 and 8 are left alone: Xen's own console raises them at its own times.
 */
typedef unsigned long ulong;
typedef unsigned int u32; typedef int s32; typedef unsigned short u16; typedef unsigned char u8; typedef unsigned long u64;

struct vcpu_info { u8 upcall_pending, upcall_mask; u8 pad[6]; ulong pending_sel; ulong cr2, arch_pad; u8 time[32]; };
struct shared_info { struct vcpu_info vcpu[32]; ulong pending[64]; ulong mask[64]; u8 rest[512]; };
extern char shared_page[4096], hypercall_page[4096];
#define SI ((volatile struct shared_info *)shared_page)
void upcall_entry(void); void failsafe_entry(void);

#define HC(n, a, b, c, d) ({ long r; register long r10 __asm__("r10") = (long)(d); \
    __asm__ volatile("call *%[p]" : "=a"(r), "+r"(r10) : [p] "r"((ulong)hypercall_page + (n) * 32), \
      "D"((long)(a)), "S"((long)(b)), "d"((long)(c)) : "rcx", "r11", "r8", "r9", "memory"); r; })

static char out[1 << 19]; static u32 len;
static void putc_(char c) { if (len < sizeof out) out[len++] = c; }
static void puts_(const char *s) { while (*s) putc_(*s++); }
static void dec(long v) { char b[24]; int i = 0; ulong u = v; if (v < 0) { putc_('-'); u = -v; }
    do b[i++] = '0' + u % 10; while (u /= 10); while (i) putc_(b[--i]); }
static void hex(ulong v) { static const char d[] = "0123456789abcdef"; int s = 60; while (s && !(v >> s)) s -= 4;
    for (; s >= 0; s -= 4) putc_(d[(v >> s) & 15]); }
static void flush(void) { u32 o = 0; while (o < len) { u32 n = len - o; if (n > 512) n = 512;
    HC(18, 0, n, out + o, 0); o += n; } len = 0; }
void *memcpy(void *d, const void *s, ulong n) { u8 *a = d; const u8 *b = s; while (n--) *a++ = *b++; return d; }
void *memset(void *d, int c, ulong n) { u8 *a = d; while (n--) *a++ = c; return d; }

static u64 rng;
static u32 rnd(u32 n) { rng = rng * 6364136223846793005ul + 1442695040888963407ul; return (u32)(rng >> 33) % n; }

static u32 upcalls, handled;
static int fifo, pages;
static u32 control[2][1024] __attribute__((aligned(4096)));
static u32 event_array[4][1024] __attribute__((aligned(4096)));
static u32 *block[2];                                   /* control blocks that Xen has taken */
static ulong *p2m;
static ulong p2m_of(ulong va) { return p2m[va >> 12]; }

static void scan_2l(int v)
{
    ulong sel = SI->vcpu[v].pending_sel; SI->vcpu[v].pending_sel = 0;
    for (int i = 0; i < 64; i++) if (sel >> i & 1)
        for (int b = 0; b < 64; b++) {
            ulong w = SI->pending[i] & ~SI->mask[i];
            if (w >> b & 1) { SI->pending[i] &= ~(1ul << b); handled++; puts_(" !"); dec(i * 64 + b); } }
}
static void scan_fifo(int v)
{
    u32 *ready = block[v], r;
    if (!ready) return;
    r = *ready; *ready = 0;
    for (int q = 0; q < 16; q++) while (r >> q & 1) {
        u32 head = ready[2 + q];
        if (!head) { r &= ~(1u << q); break; }
        while (head) {
            u32 *w = &event_array[head >> 10][head & 1023], link = *w & 0x1ffff;
            *w &= ~((1u << 29) | 0x1ffff);
            if ((*w >> 31 & 1) && !(*w >> 30 & 1)) {
                *w &= ~(1u << 31); handled++; puts_(" !q"); dec(q); putc_(':'); dec(head); }
            head = link;
            if (!head) r &= ~(1u << q);
            ready[2 + q] = head;
        }
        r |= *ready; *ready = 0;
    }
}
static void scan(int v) { SI->vcpu[v].upcall_pending = 0; if (fifo) scan_fifo(v); else scan_2l(v); }
void on_upcall(void) { upcalls++; putc_('^'); scan(0); }
static ulong hash(void)
{
    ulong h = 1469598103934665603ul;
#define MIX(x) (h = (h ^ (ulong)(x)) * 1099511628211ul)
    for (int i = 0; i < 64; i++) { MIX(SI->pending[i]); MIX(SI->mask[i]); }
    for (int v = 0; v < 2; v++) {
        MIX(SI->vcpu[v].upcall_pending); MIX(SI->vcpu[v].upcall_mask); MIX(SI->vcpu[v].pending_sel);
        if (block[v]) for (int i = 0; i < 18; i++) MIX(block[v][i]);
    }
    for (int i = 0; i < 512; i++) MIX(event_array[0][i]);
    return h;
}
static long num(const char *c, const char *k, long dflt)
{
    for (; *c; c++) { const char *a = c, *b = k; while (*b && *a == *b) a++, b++;
        if (!*b && *a == '=') { long v = 0; for (a++; *a >= '0' && *a <= '9'; a++) v = v * 10 + *a - '0'; return v; } }
    return dflt;
}
#define EV(op, arg) HC(32, op, arg, 0, 0)
static u32 top = 8;
static u32 port_arg(void) { u32 k = rnd(24); return k == 0 ? 0 : k == 1 ? 4095 + rnd(4) : rnd(top + 3); }
static void new_port(long rc, u32 port) { puts_(" = "); dec(rc); if (!rc) { putc_(' '); dec(port); if (port > top) top = port; } }

void kmain(ulong *si)
{
    char *base = (char *)si;
    ulong shared = *(ulong *)(base + 40), pt_base = *(ulong *)(base + 88); p2m = *(ulong **)(base + 104);
    char *cmd = base + 128;
    rng = num(cmd, "seed", 1) * 2654435761ul + 54321; long ops = num(cmd, "ops", 400);
    HC(14, shared_page, shared | 7, 2, 0);                 /* update_va_mapping, UVMF_INVLPG */
    HC(4, upcall_entry, failsafe_entry, 0, 0);             /* set_callbacks */
    HC(24, 7, 0, 0, 0);                                    /* vcpu_op stop_periodic_timer */
    puts_("evfuzz seed="); dec(num(cmd, "seed", 1)); puts_(" ops="); dec(ops); puts_(" deep\n");
    SI->vcpu[0].upcall_mask = 0;
    for (long i = 0; i < ops; i++) {
        u32 k = rnd(140); long rc; dec(i); putc_(' ');
        if (k < 10) { struct { u16 dom, rdom; u32 port; } a = { 0x7ff0, rnd(12) ? 0x7ff0 : 5, 0 };
            rc = EV(6, &a); puts_("alloc "); hex(a.rdom); new_port(rc, a.port); }
        else if (k < 24) { struct { u16 dom; u32 rport, port; } a = { 0x7ff0, port_arg(), 0 };
            rc = EV(0, &a); puts_("inter "); dec(a.rport); new_port(rc, a.port); }
        else if (k < 29) { struct { u32 virq, vcpu, port; } a = { rnd(24), 0, 0 }; a.vcpu = rnd(3);
            if (a.virq == 0 || a.virq == 2 || a.virq == 8) a.virq = 1;
            rc = EV(1, &a); puts_("virq "); dec(a.virq); putc_(' '); dec(a.vcpu); new_port(rc, a.port); }
        else if (k < 34) { struct { u32 vcpu, port; } a = { rnd(3), 0 };
            rc = EV(7, &a); puts_("ipi "); dec(a.vcpu); new_port(rc, a.port); }
        else if (k < 42) { u32 a = port_arg(); puts_("close "); dec(a); rc = EV(3, &a); puts_(" = "); dec(rc); }
        else if (k < 72) { u32 a = port_arg(); puts_("send "); dec(a); rc = EV(4, &a); puts_(" = "); dec(rc); }
        else if (k < 76) { struct { u16 dom; u32 port; u32 status, vcpu; struct { u16 dom; u32 port; } u; } a = { 0x7ff0, port_arg(), 0, 0, {0, 0} };
            rc = EV(5, &a); puts_("status "); dec(a.port); puts_(" = "); dec(rc);
            if (!rc) { putc_(' '); dec(a.status); putc_(' '); dec(a.vcpu); putc_(' '); hex(*(ulong *)&a.u); } }
        else if (k < 84) { struct { u32 port, vcpu; } a = { port_arg(), 0 }; a.vcpu = rnd(3);
            rc = EV(8, &a); puts_("bindvcpu "); dec(a.port); putc_(' '); dec(a.vcpu); puts_(" = "); dec(rc); }
        else if (k < 94) { u32 a = port_arg(); puts_("unmask "); dec(a); rc = EV(9, &a); puts_(" = "); dec(rc); }
        else if (k < 104) { struct { u32 port, prio; } a = { port_arg(), 0 }; a.prio = rnd(17);
            puts_("prio "); dec(a.port); putc_(' '); dec(a.prio); rc = EV(13, &a); puts_(" = "); dec(rc); }
        else if (k < 110) { u32 p = rnd(top + 1); puts_("mask "); dec(p);
            if (fifo) event_array[p >> 10][p & 1023] |= 1u << 30; else SI->mask[p >> 6] |= 1ul << (p & 63); }
        else if (k < 113) { struct { const u32 *ports; u32 n; u64 timeout; } a; u32 pp[4], m = SI->vcpu[0].upcall_mask;
            for (int j = 0; j < 4; j++) pp[j] = port_arg();
            a.ports = pp; a.n = rnd(5); a.timeout = 1; SI->vcpu[0].upcall_mask = 1;
            puts_("poll "); dec(a.n); for (u32 j = 0; j < a.n; j++) { putc_(' '); dec(pp[j]); }
            rc = HC(29, 3, &a, 0, 0); SI->vcpu[0].upcall_mask = m; HC(17, 0, 0, 0, 0); puts_(" = "); dec(rc); }
        else if (k < 117) { puts_("cli"); SI->vcpu[0].upcall_mask = 1; }
        else if (k < 122) { puts_("sti"); SI->vcpu[0].upcall_mask = 0; HC(17, 0, 0, 0, 0); }
        else if (k < 127) { puts_("drain"); scan(1); }
        else if (k < 131) { static const u16 offsets[6] = { 0, 8, 4024, 4028, 4, 2048 };
            struct { u64 gfn; u32 off, vcpu; u8 link_bits; u8 pad[7]; } ic = { 0, 0, 0, 0, {0} };
            u32 v = rnd(4) ? 0 : rnd(3), o = offsets[rnd(6)], f = rnd(6);
            if (v == 0 && rnd(2)) v = 1;
            ic.off = o; ic.vcpu = v; ic.gfn = f == 0 ? ~0ul : f == 1 ? p2m_of(pt_base) : p2m_of((ulong)&control[v & 1]);
            rc = EV(11, &ic); puts_("init "); dec(v); putc_(' '); dec(o); putc_(' '); dec(f); puts_(" = "); dec(rc); putc_(' '); dec(ic.link_bits);
            if (!rc) { fifo = 1; block[v] = &control[v][o / 4]; } }
        else if (k < 134) { u32 f = rnd(6); struct { u64 gfn; } ea = { f == 0 || pages == 4 ? 1ul << 40 : f == 1 ? p2m_of(pt_base) : p2m_of((ulong)&event_array[pages]) };
            puts_("expand "); dec(f); rc = EV(12, &ea); puts_(" = "); dec(rc); if (!rc) pages++; }
        else if (k < 135 && !rnd(3)) { u16 d = 0x7ff0; rc = EV(10, &d); puts_("reset = "); dec(rc);
            if (!rc && fifo) { fifo = 0; pages = 0; block[0] = block[1] = 0; memset(control, 0, sizeof control);
                if (rnd(2)) memset(event_array, 0, sizeof event_array); } }
        else puts_("nop");
        puts_(" #"); hex(hash()); putc_('\n');
    }
    puts_("upcalls "); dec(upcalls); puts_(" handled "); dec(handled); puts_("\nevfuzz done\n");
    flush();
    struct { u32 reason; } sd = { 1 };
    for (;;) HC(29, 2, &sd, 0, 0);
}
