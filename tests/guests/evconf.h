/*
 * What evconf.c (the event-channel conformance kernel) knows of its own state: the vCPUs and who of them acts, the
 * transcript, the two ABIs as a guest sees them. Included once, by evconf.c.
 */
#include "lib.h"

#define ARRAY_PAGES 6
#define PENDING (1u << 31)
#define MASKED (1u << 30)
#define LINKED (1u << 29)
#define BUSY (1u << 28)
#define LINK 0x1ffffu
#define NEVER 1000000000000000ul       /* ns from now: ten days */

/* ---- vCPUs: one of them acts (the driver), the other waits; see `settle` ---- */
static u32 vcpus;
static volatile int driver;            /* who acts; only it touches anything but its own log */
static volatile int parked[2];         /* in a sleeping hypercall, or about to be */
static volatile u32 beat[2];           /* rounds of the waiting loop */
static volatile u8 closed[2] = { 1, 1 }; /* waits with its upcalls masked (in a handler they are, too: not to be asked of vi) */
static volatile struct vcpu_info *vi[2];
static u32 upcalls_of[2], handled[2];

static s64 vop(u32 cmd, u32 vcpu, void *arg) { return HC3(HC_vcpu_op, cmd, vcpu, arg); }
static void yield(void) { HC2(HC_sched_op, 0, 0); }
static int runstate(u32 v)
{
    struct { u32 state, pad; u64 entry, time[4]; } rs;
    return vop(4, v, &rs) ? -1 : (int)rs.state;
}
static int asleep(int v) { return parked[v] && runstate(v) == 2; }

static u64 now(void) { return system_time(&vi[driver]->time); }

/* ---- random numbers: one stream for the driver, one for each vCPU's upcalls ---- */
static u64 rng, upcall_rng[2];
static u32 draw(u64 *state, u32 n)
{
    *state = *state * 6364136223846793005ul + 1442695040888963407ul;
    return (u32)(*state >> 33) % n;
}
static u32 rnd(u32 n) { return draw(&rng, n); }

/* ---- the transcript: each vCPU writes to its own log; the driver puts them together at the end of a step ---- */
static struct log { u32 len; char text[1 << 14]; } logs[2];
static char out[1 << 16];
static u32 out_len;

static void put(int v, char c) { if (logs[v].len < sizeof logs[v].text) logs[v].text[logs[v].len++] = c; }
static void puts_(int v, const char *s) { while (*s) put(v, *s++); }
static void putn(int v, u64 n, u32 base)
{
    char digits[24];
    int i = 0;
    do digits[i++] = "0123456789abcdef"[n % base]; while (n /= base);
    while (i)
        put(v, digits[--i]);
}
static void dec(int v, s64 n)
{
    if (n < 0)
        put(v, '-');
    putn(v, n < 0 ? -(u64)n : (u64)n, 10);
}
/* " word a b": the operation and its numbers, before it is done */
static void word(int v, const char *s) { put(v, ' '); puts_(v, s); }
static void arg(int v, u64 n) { put(v, ' '); n > 0xffff ? put(v, 'x'), putn(v, n, 16) : putn(v, n, 10); }
static s64 result(int v, s64 rc) { puts_(v, " ="); put(v, ' '); dec(v, rc); return rc; }
static void emit(void)
{
    for (u32 done = 0; done < out_len; done += 128)
        HC3(HC_console_io, 0, out_len - done < 128 ? out_len - done : 128, out + done);
    out_len = 0;
}
static void take_log(int v)
{
    if (out_len + logs[v].len + 256 > sizeof out)
        emit();
    memcpy(out + out_len, logs[v].text, logs[v].len);
    out_len += logs[v].len;
    logs[v].len = 0;
}

/* ---- the ABIs: two-level in shared_info, FIFO in control blocks and event words ---- */
static int fifo, blocks_given;
static u32 array_pages;
static u32 control[2][1024] __attribute__((aligned(4096)));
static volatile u32 array[ARRAY_PAGES * 1024] __attribute__((aligned(4096)));
static volatile u32 *block[2];
static u8 owner[1 << 17];              /* the vCPU that a port was last bound to */
static u32 timer_port[2];

static int has_word(u32 port) { return port < array_pages * 1024; }
static int is_pending(u32 port)
{
    if (fifo)
        return has_word(port) && (array[port] & PENDING);
    return port < 4096 && (SI->pending[port / 64] >> port % 64 & 1);
}
static int is_masked(u32 port)
{
    if (fifo)
        return !has_word(port) || (array[port] & MASKED);
    return port >= 4096 || (SI->mask[port / 64] >> port % 64 & 1);
}
/* Sets or clears the port's pending or mask bit in memory, if it has one. */
static void change(u32 port, u32 bit, int set)
{
    if (fifo) {
        if (has_word(port))
            array[port] = set ? array[port] | bit : array[port] & ~bit;
    } else if (port < 4096) {
        volatile u64 *map = bit == PENDING ? SI->pending : SI->mask;
        map[port / 64] = set ? map[port / 64] | 1ul << port % 64 : map[port / 64] & ~(1ul << port % 64);
    }
}
/* Everything shared with the hypervisor, in one number. */
static u64 state_hash(void)
{
    u64 h = 1469598103934665603ul;
#define MIX(x) (h = (h ^ (u64)(x)) * 1099511628211ul)
    for (int i = 0; i < 64; i++) {
        MIX(SI->pending[i]);
        MIX(SI->mask[i]);
    }
    for (int v = 0; v < 2; v++) {
        MIX(vi[v]->upcall_pending);
        MIX(vi[v]->upcall_mask);
        MIX(vi[v]->pending_sel);
        for (int i = 0; block[v] && i < 18; i++)
            MIX(block[v][i]);
    }
    for (u32 i = 0; i < array_pages * 512; i++)
        MIX(((volatile u64 *)array)[i]);
    return h ^ h >> 32;
}
/* The same in full, for whoever looks for a difference. */
static void dump_state(void)
{
    for (int i = 0; i < 64; i++)
        if (SI->pending[i] || SI->mask[i])
            say("  ports from %d: pending %lx mask %lx\n", i * 64, SI->pending[i], SI->mask[i]);
    for (int v = 0; v < 2; v++) {
        say("  vcpu %d: upcall pending %d mask %d sel %lx\n", v, vi[v]->upcall_pending, vi[v]->upcall_mask, vi[v]->pending_sel);
        for (int i = 0; block[v] && i < 18; i++)
            if (block[v][i])
                say("  vcpu %d: control block +%d: %x\n", v, i * 4, block[v][i]);
    }
    for (u32 i = 0; i < array_pages * 1024; i++)
        if (array[i])
            say("  word of port %u:%s%s%s%s link %u rest %x\n", i, array[i] & PENDING ? " PENDING" : "", array[i] & MASKED ? " MASKED" : "",
                array[i] & LINKED ? " LINKED" : "", array[i] & BUSY ? " BUSY" : "", array[i] & LINK, array[i] & 0xffe0000);
}
