/* The runtime of the test kernels: start, console, traps, page-table helpers. */
#include "lib.h"

struct start_info *si;
u64 *p2m;
u8 pages[48][4096] __attribute__((aligned(4096)));
volatile struct seen seen;
volatile u64 probe_rip, probe_resume, probe_rsp;
int (*trap_hook)(struct regs *r);
void (*upcall_hook)(struct regs *r);
volatile u32 upcalls, fired[4096];

void *memcpy(void *d, const void *s, u64 n) { u8 *a = d; const u8 *b = s; while (n--) *a++ = *b++; return d; }
void *memset(void *d, int c, u64 n) { u8 *a = d; while (n--) *a++ = c; return d; }
int memcmp(const void *a, const void *b, u64 n)
{
    const u8 *x = a, *y = b;
    for (; n--; x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

/* ---- console: HYPERVISOR_console_io for the initial domain, the PV ring for any other ---- */
struct ring { char in[1024], out[2048]; u32 in_cons, in_prod, out_cons, out_prod; };
static char line[1 << 14];
static u32 line_len;

int priv(void) { return !!(si->flags & SIF_INITDOMAIN); }

static void ring_write(const char *s, u32 n)
{
    volatile struct ring *r = va_of_mfn(si->console_mfn);
    u32 port = si->console_evtchn;
    for (u32 i = 0, spins = 0; i < n;) {
        if (r->out_prod - r->out_cons >= sizeof r->out) {
            EV(4, &port);
            HC2(HC_sched_op, 0, 0); /* yield, until the console daemon has read */
            if (++spins > 100000)
                return;
            continue;
        }
        r->out[r->out_prod & (sizeof r->out - 1)] = s[i++];
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        r->out_prod++;
    }
    EV(4, &port);
}
void flush(void)
{
    if (!priv())
        ring_write(line, line_len);
    else
        for (u32 o = 0; o < line_len; o += 128)
            HC3(HC_console_io, 0, line_len - o < 128 ? line_len - o : 128, line + o);
    line_len = 0;
}
const char *line_tag = "";
static void put(char c)
{
    if (line_len == 0)
        for (const char *t = line_tag; *t; t++)
            line[line_len++] = *t;
    if (line_len < sizeof line)
        line[line_len++] = c;
    if (c == '\n')
        flush();
}
static void puts_(const char *s) { while (*s) put(*s++); }
static void number(u64 v, u32 base)
{
    char b[24];
    int i = 0;
    do b[i++] = "0123456789abcdef"[v % base]; while (v /= base);
    while (i)
        put(b[--i]);
}
static void decimal(s64 v)
{
    if (v < 0)
        put('-');
    number(v < 0 ? -(u64)v : (u64)v, 10);
}
static const struct { u8 no; const char *name; } errnos[] = {
    {1, "EPERM"}, {2, "ENOENT"}, {3, "ESRCH"}, {4, "EINTR"}, {5, "EIO"}, {6, "ENXIO"}, {7, "E2BIG"}, {8, "ENOEXEC"},
    {9, "EBADF"}, {10, "ECHILD"}, {11, "EAGAIN"}, {12, "ENOMEM"}, {13, "EACCES"}, {14, "EFAULT"}, {16, "EBUSY"},
    {17, "EEXIST"}, {18, "EXDEV"}, {19, "ENODEV"}, {22, "EINVAL"}, {23, "ENFILE"}, {24, "EMFILE"}, {28, "ENOSPC"},
    {30, "EROFS"}, {33, "EDOM"}, {34, "ERANGE"}, {35, "EDEADLK"}, {36, "ENAMETOOLONG"}, {37, "ENOLCK"},
    {38, "ENOSYS"}, {61, "ENODATA"}, {62, "ETIME"}, {74, "EBADMSG"}, {75, "EOVERFLOW"}, {84, "EILSEQ"},
    {85, "ERESTART"}, {90, "EMSGSIZE"}, {95, "EOPNOTSUPP"}, {105, "ENOBUFS"}, {106, "EISCONN"}, {107, "ENOTCONN"},
    {110, "ETIMEDOUT"},
};
static void errno_or_count(s64 v)
{
    for (u32 i = 0; i < sizeof errnos / sizeof *errnos; i++)
        if (v == -(s64)errnos[i].no) {
            put('-');
            return puts_(errnos[i].name);
        }
    decimal(v);
}
void say(const char *f, ...)
{
    __builtin_va_list ap;
    __builtin_va_start(ap, f);
    for (; *f; f++) {
        if (*f != '%') {
            put(*f);
            continue;
        }
        int wide = *++f == 'l';
        f += wide;
        switch (*f) {
        case 'd': decimal(wide ? __builtin_va_arg(ap, s64) : __builtin_va_arg(ap, s32)); break;
        case 'u': number(wide ? __builtin_va_arg(ap, u64) : __builtin_va_arg(ap, u32), 10); break;
        case 'x': number(wide ? __builtin_va_arg(ap, u64) : __builtin_va_arg(ap, u32), 16); break;
        case 'e': errno_or_count(__builtin_va_arg(ap, s64)); break;
        case 's': puts_(__builtin_va_arg(ap, const char *)); break;
        case 'c': put(__builtin_va_arg(ap, s32)); break;
        default: put(*f);
        }
    }
    __builtin_va_end(ap);
}
void rc(const char *name, long v) { say("%s: %e\n", name, v); }

long num(const char *key, long dflt)
{
    for (const char *c = si->cmd_line; *c; c++) {
        const char *a = c, *b = key;
        while (*b && *a == *b)
            a++, b++;
        if (!*b && *a == '=') {
            long v = 0;
            for (a++; *a >= '0' && *a <= '9'; a++)
                v = v * 10 + *a - '0';
            return v;
        }
    }
    return dflt;
}
void shutdown(u32 reason)
{
    struct { u32 reason; } s = { reason };
    flush();
    for (;;)
        HC2(HC_sched_op, 2, &s);
}

/* ---- traps ---- */
void lib_trap(struct regs *r, u64 flags)
{
    u32 n = seen.n++;
    seen.flags_inside = flags;
    if (n < 8)
        seen.log[n] = r->vector;
    if (n > 1000) {
        say("trap storm: vector %lx rip %lx cr2 %lx\n", r->vector, r->rip, VI->cr2);
        shutdown(3);
    }
    seen.vec = r->vector; seen.err = r->error; seen.rip = r->rip; seen.cs = r->cs; seen.flags = r->rflags;
    seen.rsp = r->rsp; seen.ss = r->ss; seen.cr2 = VI->cr2; seen.rax = r->rax; seen.rcx = r->rcx; seen.r11 = r->r11;
    seen.mask_inside = VI->upcall_mask; seen.sp_inside = (u64)(r + 1);
    if (trap_hook && trap_hook(r))
        return;
    if (probe_resume) { /* also when a jump was probed and rip is its target */
        r->rip = probe_resume;
        r->rsp = probe_rsp;
        r->cs = KCS & ~3;
        r->ss = KDS;
        r->rflags = (r->rflags & 0x200) | 2;
        return;
    }
    say("unexpected trap %lx err %lx rip %lx cs %lx rsp %lx cr2 %lx\n", r->vector, r->error, r->rip, r->cs, r->rsp,
        VI->cr2);
    shutdown(3);
}
void lib_upcall(struct regs *r, u64 flags)
{
    seen.flags_inside = flags;
    upcalls++;
    VI->upcall_pending = 0;
    if (upcall_hook)
        return upcall_hook(r);
    u64 sel = __atomic_exchange_n((u64 *)&VI->pending_sel, 0, __ATOMIC_SEQ_CST);
    for (int w = 0; w < 64; w++)
        for (u64 bits; (sel >> w & 1) && (bits = SI->pending[w] & ~SI->mask[w]);) {
            int b = __builtin_ctzl(bits);
            __atomic_and_fetch((u64 *)&SI->pending[w], ~(1ul << b), __ATOMIC_SEQ_CST);
            fired[w * 64 + b]++;
        }
}
void enable_events(void)
{
    VI->upcall_mask = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (VI->upcall_pending)
        HC2(HC_xen_version, 0, 0); /* any hypercall delivers */
}
void disable_events(void)
{
    VI->upcall_mask = 1;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void show(const char *name)
{
    if (!seen.n)
        say("%s%sno trap\n", name, *name ? ": " : "");
    else
        say("%s%strap %lx err %lx rip +%ld%s\n", name, *name ? ": " : "", seen.vec, seen.err, seen.rip - probe_rip, seen.n > 1 ? " (several)" : "");
}
void show_full(const char *name)
{
    if (!seen.n)
        return show(name);
    /* Flags: TF, IF, DF, IOPL, NT, AC, ID. Arithmetic flags are noise, RF differs between real and emulated processors. */
    say("%s%strap %lx err %lx rip +%ld cs %lx mask %lx flags %lx rsp %ld ss %lx inside: mask %lx flags %lx depth %ld\n", name,
        *name ? ": " : "", seen.vec, seen.err, seen.rip - probe_rip, seen.cs & 0xffff, seen.cs >> 32, seen.flags & 0x247700,
        seen.rsp - probe_rsp, seen.ss, seen.mask_inside, seen.flags_inside & 0x44500,
        (seen.rsp & ~15ul) - seen.sp_inside);
}
long set_traps(const struct trap_info *t) { return HC1(HC_set_trap_table, t); }
void set_gate(u8 vec, u8 flags, u64 address)
{
    struct trap_info t[2] = { { vec, flags, KCS, address }, { 0, 0, 0, 0 } };
    set_traps(t);
}

/* ---- page tables ---- */
u64 *l1e_of(u64 va)
{
    u64 *t = (u64 *)si->pt_base;
    for (int shift = 39;; shift -= 9) {
        u64 *e = t + (va >> shift & 511);
        if (shift == 12)
            return e;
        if ((*e & (P | PSE)) != P)
            return 0;
        t = va_of_mfn((*e & 0xffffffffff000) >> 12);
    }
}
u64 l1e_maddr(u64 va)
{
    u64 *e = l1e_of(va);
    return e ? MFN(e) << 12 | ((u64)e & 4095) : 0;
}
long remap(volatile void *va, u64 pte) { return HC3(HC_update_va_mapping, va, pte, 2); }
long set_ro(volatile void *va) { return remap(va, PTE(va, P | US | A)); }
long set_rw(volatile void *va) { return remap(va, PTE(va, P | US | RW | A | D)); }
long mmu_update1(u64 ptr, u64 val, u32 *done)
{
    struct mmu_update u = { ptr, val };
    return HC(HC_mmu_update, &u, 1, done, DOMID_SELF);
}
long mmuext1(u32 cmd, u64 arg1, u64 arg2)
{
    struct mmuext_op o = { cmd, arg1, arg2 };
    return HC(HC_mmuext_op, &o, 1, 0, DOMID_SELF);
}

void kmain(struct start_info *start)
{
    struct trap_info t[36];
    u32 n = 0;
    si = start;
    p2m = si->mfn_list;
    HC3(HC_update_va_mapping, shared_page, si->shared_info | P | RW | US, 2);
    HC3(HC_set_callbacks, upcall_entry, failsafe_entry, syscall_entry);
    HC3(HC_vcpu_op, 7, 0, 0); /* stop_periodic_timer */
    if (!priv()) { /* answers of the console and xenstore must not mix with what a test does */
        SI->mask[si->console_evtchn / 64] |= 1ul << si->console_evtchn % 64;
        SI->mask[si->store_evtchn / 64] |= 1ul << si->store_evtchn % 64;
    }
    for (u32 v = 0; v < 32; v++)
        if (v != 2 && v != 15) /* all but NMI and the reserved one; #BP and #OF from anywhere */
            t[n++] = (struct trap_info){ v, v == 3 || v == 4 ? 3 : 0, KCS, (u64)trap_entries + v * 32 };
    t[n] = (struct trap_info){ 0, 0, 0, 0 };
    set_traps(t);
    say("begin\n");
    test();
    say("done\n");
    shutdown(0);
}

u64 system_time(volatile struct time_info *t)
{
    u32 version, lo, hi;
    u64 tsc, ns;
    do {
        version = t->version;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
        tsc = ((u64)hi << 32 | lo) - t->tsc_timestamp;
        tsc = t->tsc_shift < 0 ? tsc >> -t->tsc_shift : tsc << t->tsc_shift;
        ns = t->system_time + (u64)((unsigned __int128)tsc * t->tsc_to_system_mul >> 32);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    } while ((version & 1) || version != t->version);
    return ns;
}
